"""Lookups that read another row for an id that is none, as JAX's do: what counts is what the scatter takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graphs import model_of

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import IdCheck, Site
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.runtime import TrainingSession

CONSTANTS = """int64[1] last = {-1}, int64 none = {0}, int64 top = {4}, int64 count = {5}, int64[2] size = {5, 3},
    int64[1] length = {5}, float fill = {0}, float zero = {0}"""
WRAPPED = """low_%s = Less (ids, none) up_%s = Add (ids, count) id_%s = Where (low_%s, up_%s, ids)"""
CLAMPED = "over = Max (%s, none) at = Min (over, top)"
VALID = """above = GreaterOrEqual (%s, none) below = LessOrEqual (%s, top) valid = And (above, below)
    safe = Where (valid, %s, none) index = Unsqueeze (safe, last)"""

W = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
G = np.random.default_rng(2).standard_normal((6, 3)).astype(np.float32)


def wrapped(name: str) -> str:
    return WRAPPED.replace("%s", name)


def filled(ids: str = "id_f", again: str = "id_b", table: str = "rows") -> str:
    """Return a lookup whose invalid ids give zero, and whose backward drops their rows."""
    if table == "flat":
        masked, kept = "", "valid"
        zeros = "zeros = ConstantOfShape (length)"
    else:
        masked, kept = "kept = Unsqueeze (valid, last)", "kept"
        zeros = "zeros = ConstantOfShape (size)"
    bad = "under = Less (X, none) above_top = Greater (X, top) bad = Or (under, above_top)".replace("X", ids)
    hidden = "bads = Unsqueeze (bad, last)" if masked else "bads = Identity (bad)"
    return f"""
        {bad} {hidden} {CLAMPED.replace("%s", ids)}
        read = Gather (W, at) h = Where (bads, fill, read)
        {VALID.replace("%s", again)} {masked}
        rows = Where ({kept}, g, zero) {zeros}
        W_grad = ScatterND <reduction = "add"> (zeros, index, rows)"""


def graph(body: str, *, flat: bool = False) -> ir.Model:
    weight = "float[5] W" if flat else "float[5, 3] W"
    return model_of(
        f"""training (int64[N] ids, float[{"N" if flat else "N, 3"}] g, {weight}) => (float loss, {weight}_grad)
        <{CONSTANTS}> {{ {body} hg = Mul (h, g) loss = ReduceSum <keepdims = 0> (hg) }}""",
        {"W": "W_grad"},
    )


def marked(model: ir.Model, feed: dict[str, np.ndarray]) -> tuple[Site, dict[str, np.ndarray]]:
    parse_pipeline("find-embeddings").run(model)
    (found,) = metadata.read_list(model, "sites", Site)
    by_name = {str(value.name): value for node in model.graph for value in node.outputs}
    names = [name for name in (found.ids, found.rows, found.keep) if name in by_name]
    model.graph.outputs.extend(by_name[str(name)] for name in names)
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {item.name for item in host.get_inputs()}
    wanted = ["W_grad", *map(str, names)]
    results = host.run(wanted, {key: value for key, value in feed.items() if key in inputs})
    return found, {**feed, **dict(zip(wanted, results, strict=True))}


IDS = np.array([4, -1, 7, 0, -6, 4], np.int64)
KEPT = [True, True, False, True, False, True]


@pytest.mark.parametrize("flat", [False, True])
def test_ids_computed_again_for_the_scatter(flat: bool) -> None:
    """Wrapped twice, clamped for the lookup, masked for the scatter: one lookup, and dropped rows do not count."""
    body = wrapped("f") + wrapped("b") + filled(table="flat" if flat else "rows")
    model = graph(body, flat=flat)
    weight, g = (W[:, 0].copy(), G[:, 0].copy()) if flat else (W, G)
    found, values = marked(model, {"ids": IDS, "g": g, "W": weight})
    assert (found.vocab_size, found.embedding_dim) == (5, 1 if flat else 3)
    assert [use.op for use in found.uses] == ["Gather"]
    keep = values[str(found.keep)]
    np.testing.assert_array_equal(keep, KEPT)
    table = np.zeros((5, found.embedding_dim))
    rows = values[str(found.rows)].astype(np.float64) * keep[:, None]
    np.add.at(table, values[str(found.ids)], rows)
    want = np.zeros((5, found.embedding_dim))
    np.add.at(want, np.array([4, 4, 0, 4]), g.reshape(6, -1)[KEPT].astype(np.float64))
    np.testing.assert_allclose(table, want, atol=1e-12)  # the same rows, summed in float64
    np.testing.assert_allclose(values["W_grad"].reshape(want.shape), want, atol=1e-6)


CLIP = f"""{CLAMPED.replace("%s", "ids")} h = Gather (W, at) index = Unsqueeze (ids, last)
    zeros = ConstantOfShape (size) W_grad = ScatterND <reduction = "add"> (zeros, index, g)"""


def test_ids_that_only_the_lookup_clamps_are_checked_as_the_scatter_takes_them() -> None:
    model = graph(CLIP)
    parse_pipeline("find-embeddings").run(model)
    (check,) = metadata.read_list(model, "id_checks", IdCheck)
    assert (check.parameter, check.vocab_size, check.negatives) == ("W", 5, "reject")
    assert check.ids != "at"


@pytest.mark.parametrize("wrong", [5, -1])
def test_such_an_id_stops_the_step(wrong: int) -> None:
    model = transform(ir.to_proto(graph(CLIP)), rest="sgd", loss="loss", gradients={"W": "W_grad"})
    ids = np.array([4, 0, 2, 3, 1, 4], np.int64)
    with TrainingSession(model, parameters={"W": W}) as session:
        assert session.step({"ids": ids, "g": G})["step"] == 1
        before = session.parameters["W"].copy()
        with pytest.raises(UserError) as caught:
            session.step({"ids": np.where(ids == 2, wrong, ids), "g": G})
        assert caught.value.message == (
            f"id {wrong} in input 'ids' is not a row of parameter 'W', which has 5 rows"
        )
        np.testing.assert_array_equal(session.parameters["W"], before)


def test_a_lookup_that_wraps_reads_every_id_itself() -> None:
    body = f"""{wrapped("f")} h = Gather (W, id_f) index = Unsqueeze (id_f, last)
        zeros = ConstantOfShape (size) W_grad = ScatterND <reduction = "add"> (zeros, index, g)"""
    model = graph(body)
    parse_pipeline("find-embeddings").run(model)
    (check,) = metadata.read_list(model, "id_checks", IdCheck)
    assert (check.ids, check.negatives) == ("id_f", "wrap")
