"""Batches on their way to a device: copied there once per step, and ahead of time where a thread makes them.

A step of several stages reads the ids in most of them. Bound as arrays, they would go over the bus at each;
so a batch is copied to the device as a whole, and all stages read it there. Copies start in page-locked
memory (`pinned`). The places on the device are taken in turn, one more of them than batches that are under
way: a place is written again when the step that read it is over. `fit` has its prefetching thread do all
of this for the next batch while the device works on this one: ONNX Runtime's streams do not wait for the
default stream, in which `OrtValue.update_inplace` copies and which it waits for.

What came in stays beside it as arrays, for the checks that the host makes (ids, shapes).
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.runtime.feed.pinned import Pinned
from kfac_onnx.runtime.step.tensors import BFLOAT16, new_value, numpy_dtype, write_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    import onnxruntime as ort

    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.step.tensors import Device

__all__ = ["Fed", "Feeder", "on_device"]

_log = logging.getLogger(__name__)


class Fed(dict[str, "np.ndarray | ort.OrtValue"]):
    """A batch of host values, with copies of them `on_device`, by name; `owner` made those."""

    def __init__(
        self,
        values: Mapping[str, np.ndarray | ort.OrtValue],
        on_device: Mapping[str, ort.OrtValue],
        owner: object,
    ) -> None:
        super().__init__(values)
        self.on_device = dict(on_device)
        self.examples: int | None = getattr(values, "examples", None)
        self.owner = owner


def on_device(batch: Mapping[str, np.ndarray | ort.OrtValue], name: str) -> np.ndarray | ort.OrtValue:
    """Return what a stage is to be bound to: the copy on the device where there is one."""
    return batch.on_device.get(name, batch[name]) if isinstance(batch, Fed) else batch[name]


@dataclass
class _Place:
    """One input's memory: on the device, and the page-locked array that it is copied from."""

    value: ort.OrtValue
    staging: np.ndarray


@dataclass
class _Slot:
    """The memory of one batch, by input name."""

    places: dict[str, _Place] = field(default_factory=dict[str, _Place])


class Feeder:
    """Copies batches to a device.

    Args:
        device: where they go.
        inputs: what a batch holds.
        lock: held while something is copied (capturing a CUDA graph fails meanwhile).

    """

    def __init__(
        self, device: Device, inputs: Sequence[BatchInput], lock: AbstractContextManager[object] | None = None
    ) -> None:
        self._device = device
        self._inputs = {item.name: item for item in inputs}
        self._lock = lock if lock is not None else nullcontext()
        self._pinned = Pinned(device.index)
        self._slots = [_Slot(), _Slot()]
        self._next = 0
        if self._pinned.problem is not None:
            _log.info("batches go to the device from ordinary memory: %s", self._pinned.problem)

    @property
    def problem(self) -> str | None:
        """Why copies do not start in page-locked memory, in words; None where they do."""
        return self._pinned.problem

    def reserve(self, ahead: int) -> None:
        """Have places for so many batches that wait while a step runs."""
        while len(self._slots) < ahead + 2:
            self._slots.append(_Slot())

    def ahead(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return the batch with its arrays on the device too; as it is where it does not fit the graph.

        What is wrong with it is found and said when the step looks at it.
        """
        arrays: dict[str, np.ndarray] = {}
        for name, item in self._inputs.items():
            array = batch.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != numpy_dtype(item.element):
                return batch
            arrays[name] = array
        return Fed(batch, self._copied(arrays), self)  # pyright: ignore[reportReturnType]  its values are arrays

    def fed(
        self, given: Mapping[str, np.ndarray], ready: Mapping[str, np.ndarray | ort.OrtValue]
    ) -> Mapping[str, np.ndarray | ort.OrtValue]:
        """Return a checked batch with its arrays on the device: those of `given` if `ahead` copied them."""
        if isinstance(given, Fed) and given.owner is self:
            return Fed(ready, given.on_device, self)
        arrays = {
            name: np.asarray(given[name]) if self._inputs[name].element == BFLOAT16 else value
            for name, value in ready.items()
            if name in self._inputs
        }
        hosted = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
        return Fed(ready, self._copied(hosted), self)

    def _copied(self, arrays: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        values: dict[str, ort.OrtValue] = {}
        for name, array in arrays.items():
            element = self._inputs[name].element
            place = slot.places.get(name)
            if place is None or place.staging.shape != array.shape:
                slot.places.pop(name, None)  # the old memory is free before the new is taken
                with self._lock:
                    value = new_value(array.shape, element, self._device)
                    place = _Place(value, self._pinned.array(array.shape, numpy_dtype(element)))
                slot.places[name] = place
            np.copyto(place.staging, array.view(place.staging.dtype))
            with self._lock:
                write_value(place.value, place.staging, element)
            values[name] = place.value
        return values
