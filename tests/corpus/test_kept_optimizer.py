"""Drop-in graphs that contain their optimizer: it takes the preconditioned gradients, all else is as before."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import Case, StepReference, case_names, marked
from preview_training import formula

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.metadata import State
from kfac_onnx.runtime import TrainingSession

DOMAIN = "ai.onnx.preview.training"
NAMES = [*case_names("traininginfo_"), "tf2onnx_sgd__nplm"]
# Float32 rounding of one step, relative to its largest entry. Adam divides by the root of the square of the
# very gradient, so an entry that is rounding noise moves by the whole rate: compared only where it is not.
STEP, NOISE = 2e-5, 1e-3


def own_update(case: Case, weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return a parameter after the first step of the graph's own optimizer, float64."""
    proto = onnx.load(case.path)
    nodes = [node for info in proto.training_info for node in info.algorithm.node]
    found = [node for node in nodes if node.domain == DOMAIN and node.op_type != "Gradient"]
    if not found:
        return weight - 0.1 * gradient
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in found[0].attribute}
    if "mode" in attributes:
        attributes["mode"] = attributes["mode"].decode()
    nothing = [np.zeros_like(weight)] * (2 if found[0].op_type == "Adam" else 1)
    return formula(found[0].op_type, attributes, 0.1, 0, weight, gradient, *nothing)[0]


def first_value(state: State, weights: dict[str, np.ndarray]) -> np.ndarray:
    if state.input in weights:
        return weights[state.input]
    dtype = np.dtype(state.dtype)
    match state.initial:
        case "identity":
            return np.eye(state.shape[0], dtype=dtype)
        case "ones":
            return np.ones(state.shape, dtype)
        case "zeros":
            return np.zeros(state.shape, dtype)
        case _:
            return np.full(state.shape, float(state.initial), dtype)


def compare(name: str, preset: str, scaled: float = 1.0) -> None:
    case, graph = marked(name)
    weights = graph.initial(case)
    reference = StepReference(graph, weights, preset, 1.0, "sgd", 1.0)
    out = graph.run(reference.feed(case.feed()))
    reference.step(out)  # W' = W − preconditioned gradient, and W − gradient for the others
    model = transform(case.path, preset=preset, shape="dense")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    host = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    states = {state.input: state for state in metadata.read_list(model, "state", State)}
    feed = {}
    for item in host.get_inputs():
        held = states.get(item.name)
        if held is None:
            feed[item.name] = case.feed()[item.name]
        elif held.initial != "parameter" or item.name in weights:
            feed[item.name] = first_value(held, weights)
    outputs = [item.name for item in host.get_outputs()]
    results = dict(zip(outputs, host.run(outputs, feed), strict=True))
    assert bool(results["kfac/ok"])
    for parameter, weight in weights.items():
        start = np.asarray(weight, np.float64)
        gradient = start - reference.weights[parameter]
        want = own_update(case, start, gradient)
        got = results[states[parameter].output] * np.float32(scaled)
        known = np.abs(gradient) > NOISE * np.abs(gradient).max()
        known |= gradient == 0.0
        limit = STEP * max(np.abs(want).max(), 1.0)
        error = np.abs(got - want)[known].max()
        assert error <= limit, f"{name}, {preset}, {parameter}: {error:.1e} > {limit:.1e}"


@pytest.mark.parametrize("preset", ["half", "adaptive"])
@pytest.mark.parametrize("name", NAMES)
def test_own_optimizer_takes_the_preconditioned_gradient(name: str, preset: str) -> None:
    compare(name, preset)


def test_comparison_notices_one_percent() -> None:
    with pytest.raises(AssertionError, match="weight: "):
        compare("traininginfo_handnplm__nplm_adam", "half", scaled=1.01)


@pytest.mark.parametrize("name", NAMES)
def test_interface_stays(name: str) -> None:
    """Inputs and outputs of the exporter keep their names; its mutable initializers become inputs."""
    case = Case(name)
    proto = onnx.load(case.path)
    algorithms = [info.algorithm for info in proto.training_info]
    inputs = [item.name for graph in (proto.graph, *algorithms) for item in graph.input]
    outputs = [item.name for graph in (proto.graph, *algorithms) for item in graph.output]
    model = transform(case.path, shape="dense")
    assert [value.name for value in model.graph.inputs][: len(inputs)] == inputs
    found = [str(value.name) for value in model.graph.outputs]
    assert found[: len(outputs)] == outputs
    assert all(item.startswith("kfac/") for item in found[len(outputs) :])


@pytest.mark.parametrize("name", NAMES)
def test_a_session_trains_with_the_own_optimizer(name: str) -> None:
    case, graph = marked(name)
    model = transform(case.path, shape="dense")
    feed, weights = case.feed(), graph.initial(case)
    with TrainingSession(model, parameters=weights, threads=1) as session:
        batch = {item.name: feed[item.name] for item in session.batch_inputs}
        for _ in range(5):
            metrics = session.step(batch)
            assert metrics["skipped"] is False
            assert np.isfinite(metrics["loss"])
        for key, weight in weights.items():
            assert np.any(session.parameters[key] != weight), f"{key} did not move"


@pytest.mark.parametrize("name", case_names("traininginfo_"))
def test_without_kfac_the_optimizer_does_what_the_file_says(name: str) -> None:
    """Parameters that are no table end where the sidecar says: one step of the file's own optimizer."""
    case, graph = marked(name)
    model = transform(case.path, shape="dense")
    tables = {site.parameter for site in graph.sites}
    weights = graph.initial(case)
    with TrainingSession(model, parameters=weights, threads=1) as session:
        feed = case.feed()
        session.step({item.name: feed[item.name] for item in session.batch_inputs})
        for key in set(weights) - tables:
            want = np.asarray(case.arrays[f"ref:new:{key}"], np.float64)
            gradient = np.abs(case.arrays[f"ref:grad:{key}"])
            known = gradient > NOISE * gradient.max()
            error = np.abs(session.parameters[key] - want)[known].max()
            assert error <= STEP * max(np.abs(want).max(), 1.0), f"{key}: {error:.1e}"
