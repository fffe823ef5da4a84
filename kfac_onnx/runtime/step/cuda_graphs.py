"""CUDA graphs for the stages that can have them: the kernels of a stage are launched with one call.

ONNX Runtime captures the kernels of a run and replays them at later runs (provider option
`enable_cuda_graph`, run option `gpu_graph_id`). What it asks for, and what it does not look at, decides here:

- It runs the model twice before it captures (`min_num_runs_before_cuda_graph_capture_`), then replays, all in
  one call; a stage that writes over what it reads (counts, tables) would do so each time: never captured.
- A replay reads and writes the addresses of the capture, whatever is bound. So a graph belongs to the
  addresses and shapes of all that moves, and is used for them alone; others have graphs of their own.
- What a run takes from the host (an input that lies there, a seed) would be that of the capture for ever:
  stages with such inputs or outputs, or with random operators, are not captured.
- Control flow, and nodes on the CPU with copies between, ONNX Runtime refuses itself when it opens.

Whether a replay does what a run does is not taken on trust: the first replays of each graph, after the one of
the capture on other batches, are compared with plain runs on the same batch; where an output differs, graphs
are given up with a warning.

Source: onnxruntime.ai, CUDA Execution Provider, section "Using CUDA Graphs"; core/providers/cuda/
cuda_execution_provider.cc and core/session/inference_session.cc of ONNX Runtime.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime as ort

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.device.provider_options import CUDA
from kfac_onnx.errors import first_line
from kfac_onnx.runtime.random.seeds import RANDOM

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    import onnx

    from kfac_onnx.device.providers import Provider, Providers
    from kfac_onnx.step.plan import Stage

__all__ = ["CudaGraphs", "graph_problem", "host_inputs", "on_host", "with_graphs"]

_log = logging.getLogger(__name__)
_OPTION: Final = "gpu_graph_id"
_PLAIN: Final = -1
"""The id of a run that is neither captured nor replayed."""
MOST: Final = 16
"""Graphs of one stage: pairs of buffers and places of batches; further ones run plainly."""
_REMEMBERED: Final = 256
"""Places that are remembered to see whether they come back."""
CHECKED: Final = 3
"""Replays of each graph that are compared with a plain run."""
TOLERANCE: Final = 1e-4
"""Of an output's largest entry: what float32 sums in another order (atomic additions) may differ by."""


def on_host(info: ort.OrtMemoryInfo) -> bool:
    """Return whether a session has an input or output on the host."""
    return info.name in ("Cpu", "CudaPinned")


def host_inputs(session: ort.InferenceSession) -> set[str]:
    """Return the inputs that a session has on the host; all of them where this onnxruntime does not tell."""
    names = [value.name for value in session.get_inputs()]
    infos = getattr(session, "get_input_memory_infos", None)
    if infos is None:
        return {*names}
    return {name for name, info in zip(names, infos(), strict=True) if on_host(info)}


def with_graphs(providers: Providers) -> Providers:
    """Return the providers with CUDA's graphs enabled."""
    return [_with_graphs(item) for item in providers]


def _with_graphs(item: Provider) -> Provider:
    name, options = (item, dict[str, str]()) if isinstance(item, str) else item
    return (name, {**options, "enable_cuda_graph": "1"}) if name == CUDA else item


def graph_problem(stage: Stage, session: ort.InferenceSession | None = None) -> str | None:
    """Return why a stage cannot be a CUDA graph, as far as its nodes and its session tell; None if it can."""
    if stage.writes:
        return "it writes over what it reads, and capturing runs it several times"
    random = sorted({node.op_type for node in _nodes(stage.model) if _draws(node)})
    if random:
        return f"{random[0]} would draw the same numbers at every step"
    if session is None:
        return None
    if not hasattr(session, "get_output_memory_infos"):
        return "this onnxruntime does not tell where its inputs and outputs lie"
    infos = (*session.get_input_memory_infos(), *session.get_output_memory_infos())
    values = (*session.get_inputs(), *session.get_outputs())
    for info, value in zip(infos, values, strict=True):
        if on_host(info):
            return f"its value '{value.name}' lies on the host"
    return None


def _draws(node: onnx.NodeProto) -> bool:
    """Return whether a node draws random numbers: Dropout does in training mode, its third input."""
    return node.op_type in RANDOM and (node.op_type != "Dropout" or len(node.input) > 2)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            pending += attribute.g.node
            pending += [inner for graph in attribute.graphs for inner in graph.node]


@dataclass
class _Graph:
    """A captured run: its id, and how many of its replays were compared."""

    number: int
    compared: int = 0


class CudaGraphs:
    """The captured runs of one session.

    Args:
        name: of the stage, for people.
        session: opened with `with_graphs`.
        lock: held while something is captured: no other thread may copy to the device then.

    """

    def __init__(
        self, name: str, session: ort.InferenceSession, lock: AbstractContextManager[object] | None = None
    ) -> None:
        self._name = name
        self._session = session
        self._lock = lock if lock is not None else nullcontext()
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: set[Hashable] = set()
        self._options: dict[int, ort.RunOptions] = {}
        self.problem: str | None = None

    @property
    def count(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def run(
        self, binding: ort.IOBinding, places: Hashable | None, outputs: Callable[[], Mapping[str, np.ndarray]]
    ) -> None:
        """Run the stage, by a graph where there is one for these places.

        Args:
            binding: bound to the places.
            places: addresses and shapes of all that differs between runs; None where they do not last.
            outputs: reads what the run has made.

        Raises what ONNX Runtime raises where a plain run fails.

        """
        graph = self._graphs.get(places)
        if self.problem is not None or places is None or (graph is None and not self._comes_back(places)):
            self._run(binding, _PLAIN)
            return
        if graph is not None and graph.compared >= CHECKED:
            self._run(binding, graph.number)
            return
        self._run(binding, _PLAIN)
        expected = {name: np.array(array) for name, array in outputs().items()}
        if graph is None:
            graph = self._graphs[places] = _Graph(len(self._graphs) + 1)
        try:
            with self._lock:
                self._run(binding, graph.number)
        except Exception as e:
            if not from_onnxruntime(e):
                raise
            self._give_up(f"it cannot be captured: {first_line(e)}")
        else:
            graph.compared += 1
            wrong = _differing(expected, outputs())
            if wrong is None:
                return
            self._give_up(f"a replay gives another '{wrong}' than a run")
        self._run(binding, _PLAIN)

    def _comes_back(self, places: Hashable) -> bool:
        """Return whether a graph is worth capturing: the places were there before, and there is room."""
        known = places in self._seen
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen.add(places)
        return known and len(self._graphs) < MOST

    def _run(self, binding: ort.IOBinding, number: int) -> None:
        options = self._options.get(number)
        if options is None:
            options = self._options[number] = ort.RunOptions()
            options.add_run_config_entry(_OPTION, str(number))
        self._session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        self._graphs.clear()
        _log.warning("stage '%s' runs without a CUDA graph: %s", self._name, problem)


def _differing(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> str | None:
    """Return the first output that is not the same to within rounding, or None."""
    names: Iterable[str] = expected
    for name in names:
        one, other = expected[name], found[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            return name
        if one.dtype.kind != "f":
            if not np.array_equal(one, other):
                return name
            continue
        same = np.isfinite(one)
        if not np.array_equal(same, np.isfinite(other)):
            return name
        largest = float(np.abs(one[same]).max(initial=0.0))
        rounding = max(TOLERANCE, 4 * float(np.finfo(one.dtype).eps)) * largest
        if float(np.abs(one[same].astype(np.float64) - other[same]).max(initial=0.0)) > rounding:
            return name
    return None
