"""CUDA graphs: which stages may have one, for which places a graph is used, and that a wrong replay is found.

The sessions here are stand-ins that capture and replay as ONNX Runtime documents it, and misbehave on demand.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException  # pyright: ignore

from kfac_onnx.device.provider_options import CUDA
from kfac_onnx.runtime.step import cuda_graphs
from kfac_onnx.runtime.step.cuda_graphs import CHECKED, MOST, CudaGraphs, graph_problem, with_graphs
from kfac_onnx.step.plan import Slot, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS_BEFORE_CAPTURE = 2


class Options:
    """Stands for RunOptions, which cannot be read."""

    def __init__(self) -> None:
        self.number = 0

    def add_run_config_entry(self, key: str, value: str) -> None:
        assert key == "gpu_graph_id"
        self.number = int(value)


class Binding:
    def __init__(self, memory: dict[str, np.ndarray]) -> None:
        self.memory = memory
        self.synchronized = 0

    def synchronize_outputs(self) -> None:
        self.synchronized += 1


class Session:
    """y = 2x on bound memory. A graph replays on the memory of its capture.

    `stale` replays with the inputs of the capture; `refuses` cannot capture; `scale` is what a replay makes
    of the result.
    """

    def __init__(self, *, stale: bool = False, refuses: bool = False, scale: float = 1.0) -> None:
        self.stale, self.refuses, self.scale = stale, refuses, scale
        self.graphs: dict[int, Callable[[], None]] = {}
        self.plain = self.replays = 0

    def compute(self, memory: dict[str, np.ndarray], x: np.ndarray) -> None:
        memory["y"][...] = 2 * x

    def run_with_iobinding(self, binding: Binding, options: Options) -> None:
        if options.number in self.graphs:
            self.replays += 1
            self.graphs[options.number]()
            return
        self.plain += 1
        self.compute(binding.memory, binding.memory["x"])
        if options.number == -1:
            return
        if self.refuses:
            raise RuntimeException("CUDA failure 900: operation not permitted when stream is capturing")
        memory = binding.memory
        kept = memory["x"].copy()

        def replay() -> None:
            self.compute(memory, kept if self.stale else memory["x"])
            memory["y"][...] *= self.scale

        self.graphs[options.number] = replay
        for _ in range(RUNS_BEFORE_CAPTURE - 1):
            self.compute(memory, memory["x"])
        replay()


@pytest.fixture(autouse=True)
def options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "RunOptions", Options)


def memory() -> dict[str, np.ndarray]:
    return {"x": np.zeros(4, np.float32), "y": np.zeros(4, np.float32)}


def steps(graphs: CudaGraphs, places: dict[str, np.ndarray], count: int, name: object = "place") -> None:
    """Run on other inputs each time, and expect the numbers of a plain run whatever happens."""
    for step in range(count):
        places["x"][...] = np.arange(4) + 10 * step
        binding = Binding(places)
        graphs.run(binding, name, lambda: {"y": places["y"]})  # type: ignore[arg-type]
        np.testing.assert_array_equal(places["y"], 2 * places["x"])
        assert binding.synchronized > 0


def test_replays_take_over_once_they_were_compared() -> None:
    session = Session()
    graphs = CudaGraphs("gradients", session)  # type: ignore[arg-type]
    places = memory()
    steps(graphs, places, 1 + CHECKED)
    # The first step, one for each comparison, and that of the capture.
    assert (session.plain, session.replays) == (1 + CHECKED + 1, CHECKED - 1)
    plain = session.plain
    steps(graphs, places, 5)
    assert session.plain == plain
    assert session.replays == CHECKED - 1 + 5
    assert graphs.problem is None
    assert graphs.count == 1


def test_a_graph_is_used_for_its_own_places_alone() -> None:
    session = Session()
    graphs = CudaGraphs("gradients", session)  # type: ignore[arg-type]
    one, other = memory(), memory()
    for _ in range(CHECKED + 4):
        steps(graphs, one, 1, "one")
        steps(graphs, other, 1, "other")
    assert len(session.graphs) == 2


@pytest.mark.parametrize("name", [None, "new"])
def test_places_that_do_not_last_run_plainly(name: str | None) -> None:
    session = Session()
    graphs = CudaGraphs("gradients", session)  # type: ignore[arg-type]
    for number in range(300):
        steps(graphs, memory(), 1, None if name is None else (name, number))
    assert (session.plain, session.replays) == (300, 0)


def test_the_number_of_graphs_is_bounded() -> None:
    session = Session()
    graphs = CudaGraphs("gradients", session)  # type: ignore[arg-type]
    for number in range(MOST + 4):
        steps(graphs, memory(), 3, number)
    assert graphs.count == len(session.graphs) == MOST


def test_a_replay_with_old_inputs_is_found(caplog: pytest.LogCaptureFixture) -> None:
    session = Session(stale=True)
    graphs = CudaGraphs("gradients", session)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        steps(graphs, memory(), 6)
    assert graphs.problem == "a replay gives another 'y' than a run"
    assert caplog.messages == [
        "stage 'gradients' runs without a CUDA graph: a replay gives another 'y' than a run"
    ]
    assert session.replays == 1


@pytest.mark.parametrize(("scale", "found"), [(1.01, True), (1.001, True), (1 + 2e-5, False)])
def test_how_close_a_replay_must_be(scale: float, found: bool) -> None:
    session = Session(scale=scale)
    graphs = CudaGraphs("gradients", session)  # type: ignore[arg-type]
    places = memory()
    places["x"][...] = 1.0
    for _ in range(2):
        graphs.run(Binding(places), "place", lambda: {"y": places["y"]})  # type: ignore[arg-type]
    assert (graphs.problem is not None) == found


def test_what_cannot_be_captured_runs_plainly(caplog: pytest.LogCaptureFixture) -> None:
    session = Session(refuses=True)
    graphs = CudaGraphs("refresh", session)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        steps(graphs, memory(), 4)
    assert caplog.messages == [
        "stage 'refresh' runs without a CUDA graph: it cannot be captured: CUDA failure 900: operation not permitted when stream is capturing"
    ]


def test_nothing_is_captured_while_something_is_copied() -> None:
    held: list[str] = []

    class Lock:
        def __enter__(self) -> None:
            held.append("taken")

        def __exit__(self, *_: object) -> None:
            held.append("left")

    session = Session()
    graphs = CudaGraphs("gradients", session, Lock())  # type: ignore[arg-type]
    places = memory()
    steps(graphs, places, 2)
    assert held == ["taken", "left"]
    steps(graphs, places, CHECKED)
    held.clear()
    steps(graphs, places, 3)
    assert held == [], "a replay need not wait for copies"


def test_a_plain_run_that_fails_is_the_callers() -> None:
    class Failing(Session):
        def compute(self, memory: dict[str, np.ndarray], x: np.ndarray) -> None:
            raise RuntimeError("no such row")

    graphs = CudaGraphs("gradients", Failing())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no such row"):
        steps(graphs, memory(), 1)
    assert graphs.problem is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1.0, np.nan], [1.0, np.nan], True),
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, np.inf], [1.0, 2.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1e-9], False),
        ([[1.0]], [1.0], False),
    ],
)
def test_what_counts_as_the_same(one: Any, other: Any, same: bool) -> None:
    arrays = {"y": np.array(one, np.float32)}, {"y": np.array(other, np.float32)}
    assert (cuda_graphs._differing(*arrays) is None) == same


@pytest.mark.parametrize(("other", "same"), [([1, 2], True), ([1, 3], False)])
def test_whole_numbers_are_the_same_or_not(other: list[int], same: bool) -> None:
    found = cuda_graphs._differing({"n": np.array([1, 2])}, {"n": np.array(other)})
    assert (found is None) == same


def stage(body: str, **options: Any) -> Stage:
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) {{ {body} }}'
    return Stage(Slot.GRADIENTS, onnx.parser.parse_model(text), ("x",), ("y",), one_thread=False, **options)


def session_of(made: Stage) -> ort.InferenceSession:
    return ort.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_stage_that_writes_in_place_has_none() -> None:
    made = stage("y = Relu(x)", writes={"y": "table"})
    assert graph_problem(made) == "it writes over what it reads, and capturing runs it several times"


def test_a_stage_that_draws_has_none() -> None:
    assert graph_problem(stage("y = RandomNormalLike(x)")) == (
        "RandomNormalLike would draw the same numbers at every step"
    )
    assert graph_problem(stage("y = Dropout(x)")) is None
    branch = stage("c = Constant<value = bool {1}>() y = If<then_branch = t () => (float[N] z) { z = RandomNormalLike(x) }, else_branch = e () => (float[N] w) { w = Relu(x) }>(c)")  # fmt: skip
    assert str(graph_problem(branch)).startswith("RandomNormalLike")


def test_a_stage_with_values_on_the_host_has_none() -> None:
    made = stage("y = Relu(x)")
    assert graph_problem(made) is None
    assert graph_problem(made, session_of(made)) == "its value 'x' lies on the host"


def test_the_option_goes_to_cuda_alone() -> None:
    given = [(CUDA, {"device_id": "1"}), "CPUExecutionProvider"]
    assert with_graphs(given) == [
        (CUDA, {"device_id": "1", "enable_cuda_graph": "1"}), "CPUExecutionProvider"
    ]  # fmt: skip
    assert with_graphs([CUDA]) == [(CUDA, {"enable_cuda_graph": "1"})]
