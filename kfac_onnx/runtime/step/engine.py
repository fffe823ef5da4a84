"""Runs the stages of a training step over buffers that are bound once.

Each stage has one session. A value that crosses from one stage to a later one stays on the device; what
has a fixed shape lives in one buffer that both are bound to for good. Bindings are cached by the buffers
they name, so a usual step binds the batch and what depends on its size, and nothing else.

A state held `in-place` has one buffer, which is input and output of the stage that writes it. A `double`
state has two: stages read the current one and write the spare one, and keeping the step swaps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.runtime.step.buffers import Wiring
from kfac_onnx.runtime.step.runner import Port, Runner, StageError
from kfac_onnx.runtime.step.tensors import Buffer, element_type, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import onnx
    import onnxruntime as ort

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.runtime.step.runner import Holder
    from kfac_onnx.runtime.step.tensors import Device
    from kfac_onnx.step.plan import Plan, Slot, Stage

__all__ = ["Engine"]

_OTHER_SHAPE: Final = ("but the computed output shape", "shape verification failed")
"""What ONNX Runtime (1.32; before) says when an output that is bound to memory has another shape."""


def _fill_types(model: onnx.ModelProto, types: Mapping[str, tuple[int, tuple[object, ...]]]) -> None:
    """Give inputs of unknown type the type that the session making them reports."""
    import onnx

    for value in model.graph.input:
        if not value.type.tensor_type.elem_type and value.name in types:
            element, shape = types[value.name]
            dims = [size if isinstance(size, int) else None for size in shape]
            # ONNX Runtime reports no dimensions for a scalar and for an unknown shape alike.
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, element, dims or None))


class Engine(Wiring):
    """The sessions and buffers of one training step.

    Args:
        plan: the stages.
        holders: buffers by `State.input`.
        constants: values bound once, by input name.
        scalars: host arrays that are inputs and that the caller may rewrite between steps.
        batch: names of the inputs given at every step.
        host: values that the caller reads after a stage.
        providers, device, threads: where and how wide the all-thread stages run (0: all cores).

    """

    def __init__(
        self,
        plan: Plan,
        holders: Mapping[str, Holder],
        *,
        constants: Mapping[str, Buffer],
        scalars: Mapping[str, np.ndarray],
        batch: Collection[str],
        host: Collection[str],
        providers: Providers,
        device: Device,
        threads: int,
    ) -> None:
        super().__init__(
            plan, holders, constants=constants, scalars=scalars, batch=batch, host=host, device=device
        )
        self.runners = [self._open(stage, providers, threads) for stage in plan.stages]
        self._require_sources()
        self._conditional = [name for r in self.runners if r.stage.condition for name in r.stage.outputs]
        self.whole: Runner | None = None
        if plan.short is not None and device.is_cpu:
            whole = self._open(plan.short.whole, providers, threads, stands_in=True)
            if not any(port.flow for port in whole.moving):
                self.whole = whole

    # -- opening ---------------------------------------------------------------------------------

    def _open(self, stage: Stage, providers: Providers, threads: int, *, stands_in: bool = False) -> Runner:
        """Open a stage; one that stands in for others has no buffers of its own."""
        _fill_types(stage.model, self._types)
        session = self._session(stage, providers, 1 if stage.one_thread else threads)
        loose: list[tuple[int, str]] = []
        outputs: list[Port] = []
        for place, info in enumerate(session.get_outputs()):
            shape = tuple(info.shape)
            self._types[info.name] = (element_type(info.type), shape)
            may_fix = stage.condition is None and not stands_in
            port = self._output_port(info.name, shape, may_fix=may_fix)
            if port.flow:
                loose.append((place, info.name))
            outputs.append(port)
        inputs = [self._input_port(info.name) for info in session.get_inputs()]
        for name, other in stage.otherwise.items():
            self._otherwise[name] = other
        for name, array in stage.fixed.items():
            element = self._types[name][0] if name in self._types else element_type(str(array.dtype))
            constant = f"{name}/otherwise"
            buffer = Buffer(array, element, self._device)
            self._fixed[constant] = buffer.value
            self._keep_alive.append(buffer)
            if name in self._host:
                self._readable[constant] = buffer.read()
            self._otherwise[name] = constant
        used = sorted({port.holder for port in (*inputs, *outputs) if port.holder is not None})
        moving = self._moving(inputs, session)
        # A stage that writes in place could not be run again if an output turned out to have another shape.
        keeps = bool(loose) and not stage.writes and not any(port.flow for port in moving)
        batch = tuple(port.name for port in moving if port.batch)
        return Runner(stage, session, inputs, outputs, tuple(used), tuple(loose), moving, keeps, batch)

    def _session(self, stage: Stage, providers: Providers, threads: int) -> ort.InferenceSession:
        return open_session(stage.model, providers, threads=threads)

    def _moving(self, inputs: Sequence[Port], session: ort.InferenceSession) -> tuple[Port, ...]:
        """Return what is bound at every run."""
        return tuple(port for port in inputs if port.batch or port.flow)

    def _require_sources(self) -> None:
        """Raise UserError for a stage that reads what neither a stage before it nor the caller gives."""
        made: set[str] = set()
        for runner in self.runners:
            for port in runner.inputs:
                if port.flow and port.name not in made and port.name not in self._otherwise:
                    raise UserError(
                        f"the input '{port.name}' has no value: it is neither a state nor in the batch",
                        help="make the model again from the training graph that its exporter wrote",
                    )
            made.update(name for _, name in runner.loose)

    # -- one step --------------------------------------------------------------------------------

    def run(self, runner: Runner, batch: Mapping[str, np.ndarray | ort.OrtValue]) -> bool:
        """Run one stage; return False if its condition does not hold and it was left out."""
        stage = runner.stage
        if stage.condition is not None:
            holds = bool(self.read(stage.condition))
            self._ran.update(dict.fromkeys(stage.outputs, holds))
            if not holds:
                return False
        key, binding = self._ready(runner, batch, {})
        if runner.keeps:
            given = [batch[name] for name in runner.batch]
            shapes = [value.shape if isinstance(value, np.ndarray) else value.shape() for value in given]
            earlier, made = runner.kept.get(key, (None, {}))
            if shapes != earlier or not self._run_kept(runner, binding):
                made = self._run_loose(runner, binding)
                runner.kept[key] = shapes, made
            self._flow.update(made)
        else:
            self._flow.update(self._run_loose(runner, binding))
        self._written(stage)
        return True

    def run_whole(
        self, batch: Mapping[str, np.ndarray | ort.OrtValue], made: Mapping[str, ort.OrtValue] | None = None
    ) -> None:
        """Run the short cut; `made` is where its outputs of no fixed shape go, the same as in the last call.

        It may be left out where nothing is written in place. Raises StageError; by then something may be
        written.
        """
        runner = self.whole
        if runner is None:
            raise ValueError("this step has no short cut")
        self._ran.update(dict.fromkeys(self._conditional, False))
        if made is None:
            self.run(runner, batch)
            return
        self._flow.update(made)
        _, binding = self._ready(runner, batch, made)
        self._run(runner, binding)
        self._written(runner.stage)

    def _ready(
        self,
        runner: Runner,
        batch: Mapping[str, np.ndarray | ort.OrtValue],
        made: Mapping[str, ort.OrtValue],
    ) -> tuple[tuple[int, ...], ort.IOBinding]:
        """Bind what moves, and at first the rest; return the buffers the stage works on, and its binding."""
        key = tuple(self._location[index] for index in runner.holders)
        binding = runner.bindings.get(key)
        if binding is None:
            binding = runner.bindings[key] = self._bind(runner, made)
            runner.bound[key] = {}
        bound = runner.bound[key]
        for port in runner.moving:
            if port.batch:
                value = self._given(runner, port, batch)
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(port.name, value)
                else:
                    binding.bind_ortvalue_input(port.name, value)
            elif port.flow:
                flowing = self.value(port.name)
                if not self._device.is_cpu or bound.get(port.name) is not flowing:
                    binding.bind_ortvalue_input(port.name, flowing)
                    bound[port.name] = flowing
            else:
                value = port.fixed if port.fixed is not None else self._buffer(port).value
                binding.bind_ortvalue_input(port.name, value)
        return key, binding

    def _written(self, stage: Stage) -> None:
        """Note where states lie that a stage wrote into their other buffer."""
        for name, state in stage.writes.items():
            index = self._index[state]
            if index in self._copies and name in stage.outputs:
                self._location[index] ^= 1

    def _given(
        self, runner: Runner, port: Port, batch: Mapping[str, np.ndarray | ort.OrtValue]
    ) -> np.ndarray | ort.OrtValue:
        return batch[port.name]

    def _run_session(self, runner: Runner, binding: ort.IOBinding) -> None:
        runner.session.run_with_iobinding(binding)

    def _run(self, runner: Runner, binding: ort.IOBinding) -> None:
        try:
            self._run_session(runner, binding)
        except Exception as e:
            if not from_onnxruntime(e):
                raise
            other_shape = any(words in str(e) for words in _OTHER_SHAPE)
            raise StageError(first_line(e), runner.stage.name, other_shape=other_shape) from e

    def _run_loose(self, runner: Runner, binding: ort.IOBinding) -> dict[str, ort.OrtValue]:
        """Run a stage whose loose outputs get new memory, and return them."""
        for _, name in runner.loose:
            if name in self._host:
                binding.bind_output(name, "cpu", 0)
            else:
                binding.bind_output(name, self._device.name, self._device.index)
        self._run(runner, binding)
        if not runner.loose:
            return {}
        made = binding.get_outputs()
        return {name: made[place] for place, name in runner.loose}

    def _run_kept(self, runner: Runner, binding: ort.IOBinding) -> bool:
        """Run a stage into the loose outputs of the run before; return False if they have another shape now.

        Their shapes depend on the values of the batch then, so that they are not kept any more.
        """
        try:
            self._run(runner, binding)
        except StageError as e:
            if e.other_shape:
                runner.keeps = False
                return False
            raise
        return True

    def _bind(self, runner: Runner, made: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        binding = runner.session.io_binding()
        for port in runner.inputs:
            if port.fixed is not None:
                binding.bind_ortvalue_input(port.name, port.fixed)
            elif port.holder is not None:
                binding.bind_ortvalue_input(port.name, self._buffer(port).value)
        for port in runner.outputs:
            if port.fixed is not None:
                binding.bind_ortvalue_output(port.name, port.fixed)
            elif port.holder is not None:
                binding.bind_ortvalue_output(port.name, self._buffer(port).value)
            elif port.name in made:
                binding.bind_ortvalue_output(port.name, made[port.name])
            else:
                binding.bind_output(port.name, self._device.name, self._device.index)
        return binding

    def stages(self, keep: Callable[[Slot], bool]) -> list[Runner]:
        """Return the runners of some stages, in order."""
        return [runner for runner in self.runners if keep(runner.stage.slot)]

    def close(self) -> None:
        """Release the sessions and their bindings."""
        for runner in (*self.runners, self.whole):
            if runner is not None:
                runner.bindings.clear()
                runner.kept.clear()
        self.runners.clear()
        self.whole = None
        self._flow.clear()
