"""Generated graphs in other words: same tables, same numbers, and steps of the float64 reference.

Drawn are the view of each table, who reads it by which ids, what becomes of the rows and who scatters their
gradient; then the graph is rewritten (opset, order, names, decoys). The loss and its gradients are also
checked by finite differences, which know nothing of how the graph was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from corpus_cases import MarkedGraph, StepReference
from generated_graphs import (
    AFTER,
    CHAINS,
    READERS,
    STYLES,
    VIEWS,
    Recipe,
    Table,
    Use,
    recipes,
    scrambled,
    training_graph,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kfac_onnx.api import scan, transform
from kfac_onnx.passes.find_embeddings import find_sites
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.gradcheck.verify import verify_gradients

if TYPE_CHECKING:
    import onnx

OPSETS = range(16, 24)
"""A reducing ScatterElements is new in 16."""
LOSS, GRADIENT, STEP = 1e-6, 1e-5, 4e-6
"""Relative to the largest entry: float32 sums in another order, and one step of rounding."""

FEW = settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=30)


@dataclass
class Generated:
    """What the step reference wants of a graph."""

    path: onnx.ModelProto
    batch: dict[str, np.ndarray]

    def feed(self) -> dict[str, np.ndarray]:
        return self.batch


def described(model: onnx.ModelProto) -> list[object]:
    """Return what `scan` says without the names of inner values."""
    report = scan(model)
    assert not report.refused
    return [
        [
            (
                site.parameter,
                site.vocab_size,
                site.embedding_dim,
                site.layout,
                site.padding_idx,
                sorted(use.op for use in site.uses),
                len(site.dense_uses),
            )
            for site in sorted(report.sites, key=lambda site: site.parameter)
        ],
        report.loss,
        report.reduction,
        sorted(report.batch_inputs),
        sorted((item.name, item.shape) for item in report.parameters),
    ]


def expected(recipe: Recipe) -> list[object]:
    """Return what the recipe says of its tables, as `described` does."""
    layouts = {"Transpose": "columns", "Reshape": "flat"}
    return [
        (
            f"table_{t}",
            table.size,
            table.width,
            layouts.get(table.view, "rows"),
            recipe.padding_idx(t),
            sorted("MatMul" if use.reader == "one-hot" else use.reader for use in table.uses),
            0,
        )
        for t, table in enumerate(recipe.tables)
    ]


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], limit: float) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        error = np.abs(np.asarray(got[name], np.float64) - value).max(initial=0.0)
        assert error <= limit * max(np.abs(value).max(initial=0.0), 1e-3), f"{name}: {error:.1e}"


@given(recipe=recipes(), opset=st.sampled_from(OPSETS), seed=st.integers(0, 10_000))
@MANY
def test_other_words_same_tables_and_gradients(recipe: Recipe, opset: int, seed: int) -> None:
    plain = training_graph(recipe)
    other = scrambled(plain, opset, seed)
    assert described(plain)[0] == expected(recipe)
    assert described(other) == described(plain)
    batch = recipe.batch(4, seed)
    results = []
    for model in (plain, other):
        graph = MarkedGraph(Generated(model, batch))
        out = graph.run({**batch, **graph.stored})
        results.append({item.name: out[item.gradient] for item in graph.parameters})
        results[-1]["loss"] = out[graph.loss]
        for site in graph.sites:  # what is marked is what the gradient is made of
            rows = out[site.rows] if site.keep is None else out[site.rows] * out[site.keep][:, None]
            results[-1][f"rows of {site.parameter}"] = scattered(out[site.ids], rows, site.vocab_size)
    assert_same(results[1], results[0], GRADIENT)


def scattered(ids: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    total = np.zeros((size, rows.shape[1]))
    np.add.at(total, ids, rows.astype(np.float64))
    return total


@given(recipe=recipes(), opset=st.sampled_from(OPSETS), seed=st.integers(0, 10_000))
@FEW
def test_gradients_are_those_of_the_loss(recipe: Recipe, opset: int, seed: int) -> None:
    graph = read_training_graph(scrambled(training_graph(recipe), opset, seed))
    sites, id_checks = find_sites(graph)
    checks = verify_gradients(graph, recipe.batch(4, seed), sites=sites, id_checks=id_checks)
    left_out = {f"table_{t}" for t in range(len(recipe.tables)) if recipe.padding_idx(t) is not None}
    assert len(checks) >= len(recipe.tables) + 1
    assert {check.parameter for check in checks if check.status != "ok"} <= left_out


@given(
    recipe=recipes(),
    opset=st.sampled_from(OPSETS),
    seed=st.integers(0, 10_000),
    preset=st.sampled_from(["half", "r1.7"]),
)
@FEW
def test_steps_are_those_of_the_plain_graph_and_of_the_reference(
    recipe: Recipe, opset: int, seed: int, preset: str
) -> None:
    assert_steps(recipe, opset, seed, preset)


def assert_steps(recipe: Recipe, opset: int, seed: int, preset: str, scaled: float = 1.0) -> None:
    plain = training_graph(recipe)
    graph = MarkedGraph(Generated(plain, {}))
    reference = StepReference(graph, graph.stored, preset, 0.01, "sgd", 1e-3)
    models = [plain, scrambled(plain, opset, seed)]
    sessions = [
        TrainingSession(transform(model, preset=preset, lr=0.01, rest="sgd", rest_lr=1e-3), threads=1)
        for model in models
    ]
    try:
        for number, examples in enumerate((4, 7)):
            batch = recipe.batch(examples, seed + number)
            reference.weights = {name: np.float64(value) for name, value in sessions[0].parameters.items()}
            out = graph.run(reference.feed(batch))
            reference.step(out)
            for session in sessions:
                metrics = session.step(batch)
                np.testing.assert_allclose(metrics["loss"], out[graph.loss], rtol=LOSS)
                got = {name: scaled * value for name, value in session.parameters.items()}
                assert_same(got, reference.weights, STEP)
    finally:
        for session in sessions:
            session.close()


EXAMPLE = Recipe((Table(6, 3, "Transpose", (Use("Gather", "offset", "Tanh", "masked"),)),), "Add", "mean")


def test_the_comparison_notices_one_percent() -> None:
    assert_steps(EXAMPLE, 18, 0, "half")
    with pytest.raises(AssertionError, match=r"^table_0|^bias|^out_0_0"):
        assert_steps(EXAMPLE, 18, 0, "half", scaled=1.01)


@pytest.mark.parametrize("view", VIEWS)
def test_every_reader_and_style_of_every_view_is_found(view: str) -> None:
    """Each pair of reader and style, beside a lookup of another kind; the other choices go round."""
    for place, reader in enumerate(READERS):
        for number, style in enumerate(STYLES):
            ids = CHAINS[(number + place + len(view)) % len(CHAINS)]
            after = AFTER[(number + len(view)) % len(AFTER)]
            beside = Use(READERS[(place + 1) % len(READERS)], "", "Tanh", style)
            uses = (Use(reader, ids, after, style), beside)
            recipe = Recipe((Table(6, 3, view, uses),), "Add", "mean", seed=place)
            assert described(training_graph(recipe))[0] == expected(recipe)
