"""Every committed graph, transformed and trained: twelve steps equal the float64 reference.

At each step the reference starts from the session's own weights and takes the gradients of the
exporter's graph at those weights, so an error is that of one step and rounding does not pile up.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import StepReference, initial_state, marked
from corpus_steps import compare, rest_of
from corpus_table import ROWS, names
from preset_names import ALL

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.metadata import State, Step
from kfac_onnx.runtime import TrainingSession

NAMES = names("trained")


@pytest.mark.parametrize("name", NAMES)
def test_half_on_four_threads(name: str) -> None:
    compare(name, "half", threads=4, steps=12, rest=rest_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_r17_on_one_thread(name: str) -> None:
    compare(name, "r1.7", threads=1, steps=12, rest=rest_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_adagrad_on_one_thread(name: str) -> None:
    compare(name, "adagrad", threads=1, steps=12, rest=rest_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_adaptive_on_four_threads(name: str) -> None:
    compare(name, "adaptive", threads=4, steps=12, rest=rest_of(name))


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize(
    "name", [name for name in NAMES if max(t.uses for t in ROWS[name].tables.values()) > 1]
)
def test_several_uses_as_independent(name: str, preset: str) -> None:
    compare(name, preset, threads=2, steps=12, rest="sgd", uses="multi-indep")


TIED = [name for name in NAMES if any(t.tied for t in ROWS[name].tables.values())]


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("name", TIED)
def test_tied_tables_with_statistics_of_both_sides(name: str, preset: str) -> None:
    compare(name, preset, threads=2, steps=12, rest="sgd", tied="both")


@pytest.mark.parametrize("name", TIED[:2])
def test_tied_tables_with_both_sides_as_independent_uses(name: str) -> None:
    compare(name, "half", threads=2, steps=12, rest="sgd", tied="both", uses="multi-indep")
    compare(name, "r1.7", threads=2, steps=12, rest="sgd", tied="both", uses="multi-indep")


@pytest.mark.parametrize("options", [{"uses": "multi-indep"}, {"tied": "both"}])
def test_the_choices_make_a_difference(options: dict[str, str]) -> None:
    """The reference without the option fails at the first step of the graph with it."""
    name = "ortart_legcore__siamese" if "uses" in options else "ortart_legloss__gpt_tied"
    case, graph = marked(name)
    weights = graph.initial(case)
    reference = StepReference(graph, weights, "half", 0.01, "sgd", 1e-3, tied="lookup")
    out = graph.run(reference.feed(case.feed()))
    reference.step(out)
    model = transform(case.path, preset="half", rest="sgd", **options)
    with TrainingSession(model, parameters=weights) as session:
        session.step({item.name: case.feed()[item.name] for item in session.batch_inputs})
        for site in graph.sites:
            if len(site.uses) > 1 or site.dense:
                got, start = session.parameters[site.parameter], weights[site.parameter]
                moved = np.abs(reference.weights[site.parameter] - start).max()
                assert np.abs(got - reference.weights[site.parameter]).max() > 0.05 * moved


def test_comparison_notices_one_percent() -> None:
    with pytest.raises(AssertionError, match="step 1"):
        compare("torchjoint_in__nplm", "half", threads=1, steps=1, scaled=1.01)


def test_marked_rows_sum_to_the_exporters_gradient() -> None:
    for name in NAMES:
        case, graph = marked(name)
        if graph.half:
            continue  # the exporter rounds the summed gradient to half precision, the rows are not rounded
        out = graph.run({**case.feed(), **graph.fed_back(case), **graph.initial(case)})
        gradients = {item.name: item.gradient for item in graph.parameters}
        for site in graph.sites:
            if site.dense is not None:
                continue
            scattered = np.zeros((site.vocab_size, site.embedding_dim))
            np.add.at(scattered, out[site.ids], np.asarray(out[site.rows], np.float64))
            stored = np.asarray(out[gradients[site.parameter]], np.float64)
            table = stored.T if site.layout == "columns" else stored.reshape(scattered.shape)
            np.testing.assert_allclose(scattered, table, rtol=0, atol=2e-6 * np.abs(table).max())


@pytest.mark.parametrize("shape_name", ["torchjoint_in__nplm_pad0", "ortart_legloss__gpt_tied"])
@pytest.mark.parametrize("preset", ["half", "adaptive"])
def test_unaided_host_trains_alike(shape_name: str, preset: str) -> None:
    """A host that only feeds state outputs back gets the numbers of the session, on four threads."""
    case, graph = marked(shape_name)
    weights = graph.initial(case)
    model = transform(case.path, preset=preset, lr=0.01, rest="sgd", rest_lr=1e-3)
    states = metadata.read_list(model, "state", State)
    step = metadata.read(model, "step", Step)
    assert step is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    host = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    held = {state.input: initial_state(state, weights) for state in states}
    with TrainingSession(model, parameters=weights, threads=2) as session:
        for t in range(12):
            feed = case.feed("in" if t % 2 == 0 else "in2")
            batch = {key: feed[key] for key in step.batch}
            metrics = session.step(batch)
            names = [step.loss, step.ok, *(state.output for state in states)]
            loss, ok, *news = host.run(names, {**batch, **held})
            held = {state.input: new for state, new in zip(states, news, strict=True)}
            assert bool(ok)
            np.testing.assert_allclose(loss, metrics["loss"], rtol=2e-6)
        for key, value in session.parameters.items():
            np.testing.assert_allclose(held[key], value, rtol=0, atol=2e-6 * np.abs(value).max())


def test_skipped_step_in_an_unaided_host_keeps_every_state() -> None:
    case, graph = marked("torchjoint_in__nplm")
    weights = graph.initial(case)
    model = transform(case.path, preset="half", rest="adam")
    states = metadata.read_list(model, "state", State)
    step = metadata.read(model, "step", Step)
    assert step is not None
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    held = {state.input: initial_state(state, weights) for state in states}
    names = [step.ok, *(state.output for state in states)]
    batch = {key: case.feed()[key] for key in step.batch}
    _, *news = host.run(names, {**batch, **held})
    held = {state.input: new for state, new in zip(states, news, strict=True)}
    broken = {**held, "m.fc.bias": np.full_like(held["m.fc.bias"], np.nan)}
    ok, *news = host.run(names, {**batch, **broken})
    assert not bool(ok)
    for state, new in zip(states, news, strict=True):
        np.testing.assert_array_equal(new, broken[state.input])


def test_twenty_steps_are_bit_equal_when_repeated() -> None:
    case, graph = marked("torchjoint_in__nplm")
    weights = graph.initial(case)
    model = transform(case.path, preset="half")
    runs = []
    for _ in range(2):
        with TrainingSession(model, parameters=weights, threads=4) as session:
            for t in range(20):
                feed = case.feed("in" if t % 2 == 0 else "in2")
                session.step({item.name: feed[item.name] for item in session.batch_inputs})
            runs.append({key: np.array(value) for key, value in session.parameters.items()})
    for key, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][key])
    assert any(np.abs(value - weights[key]).max() > 1e-3 for key, value in runs[0].items())


@pytest.mark.parametrize(
    "name", ["torchjoint_in__nplm_pad0", "torchjoint_in__gpt_tied", "torchjoint_in__lookup_axis1"]
)
def test_dense_shape_keeps_the_interface(name: str) -> None:
    """The gradient outputs stay, and the table's is (W − W') / lr of the reference's first step."""
    case, graph = marked(name)
    weights = graph.initial(case)
    reference = StepReference(graph, weights, "half", 1.0, "sgd", 0.0)
    out = graph.run(reference.feed(case.feed()))
    reference.step(out)
    model = transform(case.path, preset="half", shape="dense")
    before = ort.InferenceSession(str(case.path), providers=["CPUExecutionProvider"])
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in before.get_outputs()]
    assert names == [item.name for item in host.get_outputs()][: len(names)]
    states = metadata.read_list(model, "state", State)
    feed = {item.name: case.feed()[item.name] for item in before.get_inputs()}
    held = {state.input: initial_state(state, weights) for state in states}
    results = dict(zip(names, host.run(names, {**feed, **held}), strict=True))
    plain = dict(zip(names, before.run(names, feed), strict=True))
    tables = {site.parameter for site in graph.sites}
    for item in graph.parameters:
        if item.name in tables:
            want = weights[item.name] - reference.weights[item.name]
        else:
            want = plain[item.gradient]
        np.testing.assert_allclose(results[item.gradient], want, rtol=0, atol=3e-5 * np.abs(want).max())
