"""Graphs of `data/graphs_more`: tables found, gradients of autograd, steps of the float64 reference."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from corpus_cases import Case, MarkedGraph, StepReference

from kfac_onnx.api import scan, transform
from kfac_onnx.runtime import TrainingSession

FOLDER = Path(__file__).parents[1] / "data" / "graphs_more"
NAMES = sorted(path.stem for path in FOLDER.glob("*.onnx"))

# Float32 sums in another order: relative to the largest entry of a gradient, and of a parameter after a step.
GRADIENT, STEP = 2e-5, 4e-6


@functools.cache
def marked(name: str) -> tuple[Case, MarkedGraph]:
    case = Case(name, FOLDER)
    return case, MarkedGraph(case)


@pytest.mark.parametrize("name", NAMES)
def test_scan_lists_exactly_the_tables(name: str) -> None:
    case = Case(name, FOLDER)
    result = scan(case.path)
    found = {site.parameter: [site.vocab_size, site.embedding_dim, len(site.uses)] for site in result.sites}
    assert found == case.sidecar["tables"]
    assert not result.refused


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_autograd(name: str) -> None:
    case, graph = marked(name)
    for which, ref in (("in", "ref"), ("in2", "ref2")):
        out = graph.run({**case.feed(which), **graph.initial(case)})
        np.testing.assert_allclose(out[graph.loss], case.arrays[f"{ref}:loss"], rtol=3e-6)
        prefix = f"{ref}:grad:"
        expected = {key.removeprefix(prefix) for key in case.arrays if key.startswith(prefix)}
        assert {item.name for item in graph.parameters} == expected
        for item in graph.parameters:
            want = case.arrays[prefix + item.name]
            error = np.abs(out[str(item.gradient)] - want).max()
            assert error <= GRADIENT * max(np.abs(want).max(), 1e-4), f"{item.name}: {error:.1e}"


@pytest.mark.parametrize(("preset", "threads"), [("half", 4), ("r1.7", 1), ("adaptive", 4)])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_the_reference(name: str, preset: str, threads: int) -> None:
    case, graph = marked(name)
    weights = graph.initial(case)
    reference = StepReference(graph, weights, preset, 0.01, "sgd", 1e-3)
    model = transform(case.path, preset=preset, lr=0.01, rest="sgd", rest_lr=1e-3)
    with TrainingSession(model, parameters=weights, threads=threads) as session:
        names = {item.name for item in session.batch_inputs}
        for t in range(12):
            feed = case.feed("in2" if t % 2 else "in")
            reference.weights = {
                key: np.asarray(value, np.float64) for key, value in session.parameters.items()
            }
            reference.step(graph.run(reference.feed(feed)))
            assert session.step({key: feed[key] for key in names})["skipped"] is False
            for key, want in reference.weights.items():
                error = np.abs(session.parameters[key] - want).max()
                limit = STEP * max(np.abs(want).max(), 1e-3)
                assert error <= limit, f"step {t + 1}, {key}: {error:.1e} > {limit:.1e}"
