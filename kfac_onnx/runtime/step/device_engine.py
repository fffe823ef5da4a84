"""The engine on a device that is not the CPU: nothing but scalars, ids and a batch crosses the bus in a step.

What differs from the CPU's:

- ONNX Runtime copies a host value to the device when it is bound. A binding that is kept would hold an old
  copy, so learning rates and keys have memory on the device that is written when they change, and whatever
  else a session takes from the host is bound at every run.
- All outputs stay on the device. What the host reads (the finite flag, the loss, what is due, computed ids)
  it copies when it asks.
- A batch is read where a `Feeder` has put it.
- Each stage has ended before the next one starts, since each session has a stream of its own.
- Stages that can have one are replayed as CUDA graphs, if asked for (`cuda_graphs`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.runtime.feed.feeding import on_device
from kfac_onnx.runtime.step.cuda_graphs import CudaGraphs, graph_problem, host_inputs, with_graphs
from kfac_onnx.runtime.step.engine import Engine
from kfac_onnx.runtime.step.tensors import Buffer, element_type, open_session, read_value, write_value

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import onnxruntime as ort

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.runtime.step.runner import Holder, Port, Runner
    from kfac_onnx.runtime.step.tensors import Device
    from kfac_onnx.step.plan import Plan, Stage

    Batch = Mapping[str, np.ndarray | ort.OrtValue]

__all__ = ["DeviceEngine"]

_log = logging.getLogger(__name__)


class DeviceEngine(Engine):
    """An `Engine` on a device.

    Args:
        plan, holders, constants, scalars, batch, providers, device, threads: as for an `Engine`.
        cuda_graph: capture the stages that can be; `graph_problems` says of each other one why not.
        lock: held while something is copied, and while a stage is captured, which fails meanwhile.

    """

    def __init__(
        self,
        plan: Plan,
        holders: Mapping[str, Holder],
        *,
        constants: Mapping[str, Buffer],
        scalars: Mapping[str, np.ndarray],
        batch: Collection[str],
        providers: Providers,
        device: Device,
        threads: int,
        cuda_graph: bool,
        lock: AbstractContextManager[object],
    ) -> None:
        self._host_inputs: dict[int, set[str]] = {}
        self._graphs: dict[int, CudaGraphs] = {}
        self._wants_graphs = cuda_graph
        self._lock = lock
        self._keeping = False
        self._now: Batch = {}
        self.graph_problems: dict[str, str] = {}
        self._host_scalars = {name: (array, array.copy()) for name, array in scalars.items()}
        self._scalar_buffers = {
            name: Buffer(array, element_type(str(array.dtype)), device) for name, array in scalars.items()
        }
        super().__init__(
            plan,
            holders,
            constants={**constants, **self._scalar_buffers},
            scalars={},
            batch=batch,
            host=(),
            providers=providers,
            device=device,
            threads=threads,
        )
        for runner in self.runners:
            if id(runner.session) in self._graphs and runner.loose and not runner.keeps:
                self.graph_problems[runner.stage.name] = "what it makes gets new memory in every step"

    # -- opening ---------------------------------------------------------------------------------

    def _session(self, stage: Stage, providers: Providers, threads: int) -> ort.InferenceSession:
        """Open a stage, for CUDA graphs where it can have them."""
        if self._wants_graphs:
            problem = graph_problem(stage)
            if problem is None:
                try:
                    session = open_session(stage.model, with_graphs(providers), threads=threads)
                except UserError as e:
                    problem = first_line(e)
                else:
                    problem = graph_problem(stage, session)
                    if problem is None:
                        self._graphs[id(session)] = CudaGraphs(stage.name, session, self._lock)
                        return self._noted(session)
            self.graph_problems[stage.name] = problem
            _log.info("stage '%s' has no CUDA graph: %s", stage.name, problem)
        return self._noted(open_session(stage.model, providers, threads=threads))

    def _noted(self, session: ort.InferenceSession) -> ort.InferenceSession:
        self._host_inputs[id(session)] = host_inputs(session)
        return session

    def _moving(self, inputs: Sequence[Port], session: ort.InferenceSession) -> tuple[Port, ...]:
        hosted = self._host_inputs[id(session)]
        return tuple(port for port in inputs if port.batch or port.flow or port.name in hosted)

    # -- one step --------------------------------------------------------------------------------

    def start(self) -> None:
        """Forget the values of the step before, and write learning rates and keys that are new."""
        super().start()
        for name, (array, known) in self._host_scalars.items():
            if array.tobytes() != known.tobytes():
                known[...] = array
                with self._lock:
                    write_value(self._scalar_buffers[name].value, known, self._scalar_buffers[name].element)

    def run(self, runner: Runner, batch: Batch) -> bool:
        """Run one stage; return False if its condition does not hold and it was left out."""
        self._now = batch
        return super().run(runner, batch)

    def _ready(
        self, runner: Runner, batch: Batch, made: Mapping[str, ort.OrtValue]
    ) -> tuple[tuple[int, ...], ort.IOBinding]:
        key = tuple(self._location[index] for index in runner.holders)
        for name in self._host_inputs[id(runner.session)]:  # what is bound is a copy of what it was
            runner.bound.get(key, {}).pop(name, None)
        return super()._ready(runner, batch, made)

    def _given(self, runner: Runner, port: Port, batch: Batch) -> np.ndarray | ort.OrtValue:
        hosted = port.name in self._host_inputs[id(runner.session)]
        return batch[port.name] if hosted else on_device(batch, port.name)

    def _run_kept(self, runner: Runner, binding: ort.IOBinding) -> bool:
        self._keeping = True
        try:
            return super()._run_kept(runner, binding)
        finally:
            self._keeping = False

    def _run_session(self, runner: Runner, binding: ort.IOBinding) -> None:
        graphs = self._graphs.get(id(runner.session))
        if graphs is None:
            runner.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return
        graphs.run(binding, self._places(runner), lambda: self._outputs(runner))
        if graphs.problem is not None:
            self.graph_problems[runner.stage.name] = graphs.problem

    def _places(self, runner: Runner) -> Hashable | None:
        """Return the addresses and shapes of all that moves; None where outputs get new memory."""
        if runner.loose and not self._keeping:
            return None
        key = tuple(self._location[index] for index in runner.holders)
        values = [*runner.kept[key][1].values()] if runner.loose else []
        for port in runner.moving:
            value = self._given(runner, port, self._now) if port.batch else self.value(port.name)
            if isinstance(value, np.ndarray):
                return None
            values.append(value)
        return (key, *((value.data_ptr(), tuple(value.shape())) for value in values))

    def _outputs(self, runner: Runner) -> dict[str, np.ndarray]:
        """Return copies of what a stage has made."""
        made: dict[str, np.ndarray] = {}
        for port in runner.outputs:
            if port.holder is not None:
                made[port.name] = self._buffer(port).read()
            elif port.fixed is not None:
                made[port.name] = self._copied(port.fixed)
        key = tuple(self._location[index] for index in runner.holders)
        loose = runner.kept[key][1] if runner.loose else {}
        return made | {name: self._copied(value) for name, value in loose.items()}

    def _copied(self, value: ort.OrtValue) -> np.ndarray:
        return read_value(value, element_type(value.data_type()))
