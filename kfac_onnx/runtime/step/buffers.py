"""Where each value of a step lies: state buffers, values of fixed shape, and what flows between stages.

A name resolves to the buffer of a state (in its version at this point of the step), to memory that is bound
for good, or to what a stage made last; a value that a stage left out makes is the one that stands for it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.disk.memory import require_memory
from kfac_onnx.runtime.step.runner import Port
from kfac_onnx.runtime.step.tensors import Buffer, Device, element_type, host_value

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnxruntime as ort

    from kfac_onnx.runtime.step.runner import Holder, Runner
    from kfac_onnx.step.plan import Plan

__all__ = ["Wiring"]


class Wiring:
    """The values of a step by name; arguments as those of `Engine`."""

    def __init__(
        self,
        plan: Plan,
        holders: Mapping[str, Holder],
        *,
        constants: Mapping[str, Buffer],
        scalars: Mapping[str, np.ndarray],
        batch: Collection[str],
        host: Collection[str],
        device: Device,
    ) -> None:
        self._plan = plan
        self._names = list(holders)
        self._holders = [holders[name] for name in self._names]
        self._device = device
        self._host = set(host)
        self._index = {name: index for index, name in enumerate(self._names)}
        self._spare_of = {
            candidate: self._index[state]
            for state, candidate in plan.candidates.items()
            if candidate != state and state in self._index and state not in plan.versions.values()
        }
        self._fixed: dict[str, ort.OrtValue] = {name: buffer.value for name, buffer in constants.items()}
        self._scalars = {
            name: host_value(array, element_type(str(array.dtype))) for name, array in scalars.items()
        }
        self._fixed.update(self._scalars)
        self._readable: dict[str, np.ndarray] = {}
        self._keep_alive: list[object] = [dict(scalars), dict(constants)]
        self._batch = set(batch)
        self._otherwise: dict[str, str] = {}
        self._types: dict[str, tuple[int, tuple[object, ...]]] = {}
        self._flow: dict[str, ort.OrtValue] = {}
        self._ran: dict[str, bool] = {}
        self._copies = {
            index
            for index, holder in enumerate(self._holders)
            if len(holder.buffers) == 2 and holder.state.input in plan.versions.values()
        }
        self._doubles = [
            (holder, candidate)
            for index, (name, holder) in enumerate(zip(self._names, self._holders, strict=True))
            if len(holder.buffers) == 2 and index not in self._copies
            for candidate in (plan.candidates[name],)
            if candidate != name
        ]
        self._location = [0] * len(self._holders)

    def _output_port(self, name: str, shape: tuple[object, ...], *, may_fix: bool) -> Port:
        if name in self._plan.versions:
            return Port(name, holder=self._index[self._plan.versions[name]], spare=True)
        if name in self._spare_of:
            return Port(name, holder=self._spare_of[name], spare=True)
        if name in self._fixed:  # two stages that stand for each other write the same
            return Port(name, fixed=self._fixed[name])
        if may_fix and self._is_fixed(name, shape):
            element = self._types[name][0]
            sizes = [int(str(size)) for size in shape]
            require_memory(math.prod(sizes) * 8, f"the value '{name}' of shape {sizes}")
            zeros = np.zeros(sizes)
            place = Device("cpu", 0) if name in self._host else self._device
            buffer = Buffer(zeros, element, place)
            self._keep_alive.append(buffer)
            self._fixed[name] = buffer.value
            if buffer.array is not None:
                self._readable[name] = buffer.array
            return Port(name, fixed=buffer.value)
        return Port(name, flow=True)

    def _is_fixed(self, name: str, shape: tuple[object, ...]) -> bool:
        """Return whether a value has one shape always; no dimensions are a scalar if the model says so."""
        if shape:
            return all(isinstance(size, int) for size in shape)
        declared = self._plan.source.types.get(name)
        kind = None if declared is None else declared.type.tensor_type
        return kind is not None and kind.HasField("shape") and not kind.shape.dim

    def _input_port(self, name: str) -> Port:
        if name in self._plan.versions:
            return Port(name, holder=self._index[self._plan.versions[name]])
        if name in self._index:
            return Port(name, holder=self._index[name])
        if name in self._otherwise:
            return Port(name, flow=True)
        if name in self._spare_of:
            return Port(name, holder=self._spare_of[name], spare=True)
        if name in self._fixed:
            return Port(name, fixed=self._fixed[name])
        return Port(name, batch=name in self._batch, flow=name not in self._batch)

    def start(self) -> None:
        """Forget the values of the step before."""
        self._flow.clear()
        self._ran.clear()
        for index, holder in enumerate(self._holders):
            self._location[index] = holder.current

    def _buffer(self, port: Port) -> Buffer:
        index = 0 if port.holder is None else port.holder
        holder = self._holders[index]
        location = self._location[index]
        if port.spare and len(holder.buffers) == 2:
            location ^= 1
        return holder.buffers[location]

    def value(self, name: str) -> ort.OrtValue:
        """Return the value a name has in this step, after the conditions that were decided."""
        while name in self._otherwise and not self._ran.get(name, False):
            name = self._otherwise[name]
        if name in self._flow:
            return self._flow[name]
        if name in self._fixed:
            return self._fixed[name]
        return self.buffer(name).value

    def buffer(self, name: str) -> Buffer:
        """Return the state buffer that a value of this step lives in; KeyError if it lives in none."""
        while name in self._otherwise and not self._ran.get(name, False):
            name = self._otherwise[name]
        if name in self._plan.versions:
            return self._buffer(Port(name, holder=self._index[self._plan.versions[name]]))
        if name in self._index:
            return self._buffer(Port(name, holder=self._index[name]))
        return self._buffer(Port(name, holder=self._spare_of[name], spare=True))

    def read(self, name: str) -> np.ndarray:
        """Return a value of this step on the host (not a copy where it lives there)."""
        while name in self._otherwise and not self._ran.get(name, False):
            name = self._otherwise[name]
        if name in self._readable:
            return self._readable[name]
        if name in self._index or name in self._spare_of or name in self._plan.versions:
            return self.buffer(name).read()
        return self._copied(self.value(name))

    def _copied(self, value: ort.OrtValue) -> np.ndarray:
        return value.numpy()

    def swap(self) -> None:
        """Keep the step: make the new value of every state the current one."""
        for index in self._copies:
            self._holders[index].current = self._location[index]
        for holder, candidate in self._doubles:
            if self._ran.get(candidate, True):
                holder.current ^= 1

    def settle(self) -> None:
        """Skip the step: double states keep their current buffer, copied ones follow the undo."""
        for index in self._copies:
            self._holders[index].current = self._location[index]

    @property
    def in_place(self) -> bool:
        """Whether some state has one buffer only, so that writing it cannot be taken back by not swapping."""
        return any(len(holder.buffers) == 1 for holder in self._holders)

    def overwrites(self, runner: Runner) -> bool:
        """Say whether a stage, run now, writes where a state's value before the step lies.

        It does in place; in two buffers, the second version of a state in one step does.
        """
        written = [self._index[state] for state in runner.stage.writes.values()]
        return any(
            len(self._holders[index].buffers) == 1 or self._location[index] != self._holders[index].current
            for index in written
        )
