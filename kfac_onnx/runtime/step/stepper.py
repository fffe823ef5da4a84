"""One training step over an engine's stages: run, check, then keep or undo (docs/architecture.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.ids import check_ids, explain_failure, origin_of
from kfac_onnx.runtime.step.monitor import RootMonitor
from kfac_onnx.runtime.step.runner import StageError
from kfac_onnx.runtime.step.short_cut import ShortWay
from kfac_onnx.step.plan import Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnxruntime as ort

    from kfac_onnx.metadata import IdCheck
    from kfac_onnx.runtime.step.engine import Engine
    from kfac_onnx.runtime.step.runner import Runner
    from kfac_onnx.step.plan import Plan

    Batch = Mapping[str, np.ndarray | ort.OrtValue]

__all__ = ["Stepper"]

_UNDONE: Final = "nothing of the step was kept, and the session can go on"
_BROKEN: Final = "parameters and states are half written: go on from the last checkpoint"


class Stepper:
    """Runs steps; `checks` are the lookups whose ids are looked at in every step.

    `roots` watches the inverse roots. `broken` says that a step failed
    while it was being written, so that what the buffers hold belongs to no step.
    """

    def __init__(self, plan: Plan, engine: Engine, checks: Sequence[IdCheck]) -> None:
        self._plan = plan
        self._engine = engine
        self._checks = checks
        self._forward = engine.stages(lambda slot: slot == Slot.FORWARD)
        self._before = engine.stages(lambda slot: Slot.FORWARD < slot <= Slot.PRECONDITION)
        self._keep = engine.stages(lambda slot: Slot.PRECONDITION < slot <= Slot.RENORMALIZE)
        self._undo = engine.stages(lambda slot: slot >= Slot.UNDO_READ)
        self._short: ShortWay | None = None
        if plan.short is not None and engine.whole is not None:
            self._short = ShortWay(plan.short, engine, self._restore)
        self.roots = RootMonitor(plan.step.root_checks)
        self.broken = False
        self.vote: Callable[[bool], bool] = bool
        """Whether a step is kept, of its finite flag: the host may know of more than this process."""

    @property
    def host_roots(self) -> int:
        """How often an inverse root was computed on the host in the run so far."""
        return self.roots.fallbacks

    @host_roots.setter
    def host_roots(self, count: int) -> None:
        self.roots.restored = count

    def forward(self, batch: Batch) -> None:
        """Run the half of a step that leads to the predictions, and check the ids that reached the tables."""
        self._engine.start()
        for runner in self._forward:
            self._run_first(runner, batch)

    def step(self, batch: Batch, *, forwarded: bool = False) -> tuple[float | None, bool]:
        """Make one step; return the loss (None if it is outside) and whether the step was kept.

        With `forwarded`, `forward` was the last call and ran on this batch: its half is not run again.
        Whatever interrupts the step, parameters and states are as before or as after it; where that cannot be
        had, because ONNX Runtime failed while it wrote them, the stepper is `broken`.

        Raises UserError when the batch, or a stage, cannot be run; it says what was written.
        """
        if not forwarded:
            self.forward(batch)
        try:
            kept = self._step(batch)
        except StageError as e:
            message = f"onnxruntime failed in stage '{e.stage}' of a step: {e}"
            raise UserError(message, help=_BROKEN if self.broken else _UNDONE) from e
        loss = self._plan.step.loss
        if loss is None:
            return None, kept
        value = np.asarray(self._engine.read(loss), np.float64)
        if value.size != 1:
            raise UserError(f"the loss '{loss}' is no scalar: it has the shape {list(value.shape)}")
        return float(value.reshape(())), kept

    def _step(self, batch: Batch) -> bool:
        """Run the second half of a step; return whether it was kept."""
        engine = self._engine
        counted = settled = False
        try:
            counted = self._short is not None and self._short.take(batch)
            if counted:
                self._check_ids(batch)
            else:
                for runner in self._before:
                    slot = runner.stage.slot
                    counted = counted or bool(runner.stage.writes)
                    first = slot == Slot.GRADIENTS
                    ran = self._run_first(runner, batch) if first else engine.run(runner, batch)
                    if slot == Slot.REFRESH and ran:
                        self.roots.after_refresh(engine, runner.stage.outputs)
                if self._short is not None:
                    self._short.learn(batch)
            kept = self.vote(bool(engine.read(self._plan.step.ok)))
            if kept:
                self._commit(batch)
            elif counted:
                self._restore(batch)
            settled = True
            if self._short is not None:
                self._short.ended(kept=kept)
        finally:
            if counted and not settled and not self.broken and self._engine.in_place:
                self._restore(batch)
        return kept

    def _commit(self, batch: Batch) -> None:
        """Write what lasts."""
        self._write(self._keep, batch)
        self._engine.swap()
        self.broken = False

    def _restore(self, batch: Batch) -> None:
        """Undo what the step counted."""
        self._write(self._undo, batch)
        self._engine.settle()
        self.broken = False

    def _write(self, runners: Sequence[Runner], batch: Batch) -> None:
        """Run stages that write; from the first on that writes over a value, nothing can be undone."""
        for runner in runners:
            self.broken = self.broken or self._engine.overwrites(runner)
            self._engine.run(runner, batch)

    def _run_first(self, runner: Runner, batch: Batch) -> bool:
        """Run the gradients, which write nothing, and check the ids that reached the tables."""
        try:
            ran = self._engine.run(runner, batch)
        except StageError as e:
            explain_failure(self._plan, batch, self._engine.value)
            message = f"the batch cannot be run through the graph: {e}"
            raise UserError(message, help="nothing was written") from e
        self._check_ids(batch)
        return ran

    def _check_ids(self, batch: Batch) -> None:
        """Raise UserError for an id that is no row of its table."""
        for check in self._checks:
            given = batch.get(check.ids)
            ids = given if isinstance(given, np.ndarray) else self._engine.read(check.ids)
            check_ids(check, ids, lambda check=check: origin_of(self._plan, check, batch))
