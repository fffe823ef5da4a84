"""A step between two refreshes in one session, as long as batches keep their shapes (`partition_short_cut`).

It is taken where nothing is due and, if counts are written in place, the batch has the shapes of two that ran
the long way, stage by stage: the sizes of what crosses from stage to stage are known from there. Whatever
goes wrong within it is taken back, and the step made the long way, which says what is wrong with the batch or
does without.

The one session both reads the counts at the ids and writes them, so that a failure leaves open whether they
were written. What was read goes into memory that holds NaN before the run. Where NaN is left, that table's
counts were not written yet: reading them comes first (`partition_short_cut` sees to it).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.runtime.step.runner import StageError
from kfac_onnx.runtime.step.tensors import Buffer, Device, element_type

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnxruntime as ort

    from kfac_onnx.runtime.step.engine import Engine
    from kfac_onnx.step.short_cut import ShortCut

    Batch = Mapping[str, np.ndarray | ort.OrtValue]

__all__ = ["ShortWay"]

_log = logging.getLogger(__name__)


class ShortWay:
    """Runs an engine's short cut, on the CPU; `take_back` undoes counts in the engine's usual way."""

    def __init__(self, plan: ShortCut, engine: Engine, take_back: Callable[[Batch], None]) -> None:
        self._plan = plan
        self._engine = engine
        self._take_back = take_back
        self._shapes: list[tuple[int, ...]] | None = None
        self._seen: list[tuple[int, ...]] | None = None
        self._buffers: dict[str, Buffer] = {}
        self._made: dict[str, ort.OrtValue] = {}
        self._before: list[np.ndarray] = []
        self._idle = False
        self.off = engine.whole is None

    def take(self, batch: Batch) -> bool:
        """Run the stages up to precondition; return False where that cannot be done in this way.

        Then, and whatever is raised, nothing is written.
        """
        engine, whole = self._engine, self._engine.whole
        if self.off or whole is None or not self._idle:
            return False
        if self._plan.counted and self._shapes != _shapes(batch, whole.batch):
            return False
        for array in self._before:
            array.fill(np.nan)
        try:
            engine.run_whole(batch, self._made if self._plan.counted else None)
        except BaseException as e:
            self._restore(batch)
            if not isinstance(e, StageError):
                raise
            self.off = e.other_shape
            _log.debug("a step is made again, stage by stage: %s", e)
            engine.start()
            return False
        return True

    def ended(self, *, kept: bool) -> None:
        """Note whether anything is due in the next step; a step that was not kept does not know."""
        self._idle = kept and not any(bool(self._engine.read(name)) for name in self._plan.due)

    def learn(self, batch: Batch) -> None:
        """Note the sizes of what a step on this batch made; it ran the long way, like the one before it."""
        whole = self._engine.whole
        if self.off or whole is None or not self._plan.counted:
            return
        shapes = _shapes(batch, whole.batch)
        if shapes == self._shapes:
            return
        if shapes != self._seen:  # batches that never have the same shapes twice are not prepared for
            self._seen = shapes
            return
        whole.bindings.clear()
        cpu = Device("cpu", 0)
        self._buffers.clear()
        for _, name in whole.loose:
            value = self._engine.value(name)
            element = element_type(value.data_type())
            self._buffers[name] = Buffer(np.zeros(value.shape()), element, cpu)
        self._made = {name: buffer.value for name, buffer in self._buffers.items()}
        self._before = [self._array(counted.before) for counted in self._plan.counted]
        self._shapes = shapes

    def _array(self, name: str) -> np.ndarray:
        """Return the memory of an output of the short cut; one of fixed shape lies where it always does."""
        buffer = self._buffers.get(name)
        array = self._engine.read(name) if buffer is None else buffer.array
        if array is None:
            raise AssertionError("the short way is for the CPU")
        return array

    def _restore(self, batch: Batch) -> None:
        """Take back the counts of the tables whose old ones were read; for the others, write nothing."""
        engine = self._engine
        if not self._plan.counted or not engine.in_place:
            return
        for counted, before in zip(self._plan.counted, self._before, strict=True):
            if np.isnan(before).any():
                self._array(counted.ids).fill(0)
                before.fill(engine.buffer(counted.state).view().reshape(-1)[0])
        self._take_back(batch)


def _shapes(batch: Batch, names: tuple[str, ...]) -> list[tuple[int, ...]]:
    given = [batch[name] for name in names]
    return [tuple(value.shape if isinstance(value, np.ndarray) else value.shape()) for value in given]
