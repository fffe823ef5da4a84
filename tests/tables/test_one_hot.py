"""Products with one-hot rows are lookups and scatters, whatever operator and axis they are written with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graphs import model_of

from kfac_onnx import metadata
from kfac_onnx.metadata import IdCheck, Site
from kfac_onnx.passes.find_embeddings import find_tables
from kfac_onnx.pipeline.pipeline import parse_pipeline

V, D = 5, 3
IDS = np.array([[0, 4], [4, 2], [1, 0]], np.int64)
G = np.random.default_rng(0).standard_normal((3, 2, D)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((V, D)).astype(np.float32)

CONSTANTS = """float[2] values = {0, 1}, int64 depth = {5}, int64[1] last = {-1}, int64[1] first = {0},
    int64[5] classes = {0, 1, 2, 3, 4}, int64[5, 1, 1] standing = {0, 1, 2, 3, 4}, int64[2] flat = {-1, 5},
    int64[2] flat_rows = {-1, 3}, int64[3] deep = {-1, 2, 3}, float one = {1}, float none = {0},
    float[1] nothing = {0}"""
LAST = "hot = OneHot <axis = -1> (ids, depth, values)"
FLAT = f"{LAST} hot2 = Reshape (hot, flat)"
DEEP = "h = Reshape (h2, deep) g2 = Reshape (g, flat_rows)"
EQUAL = "wide = Unsqueeze (ids, last) is = Equal (wide, classes)"

CASES: dict[str, tuple[str, str, str]] = {
    # forward, backward, what the table is stored as
    "MatMul": (
        f"{LAST} h = MatMul (hot, W)",
        "t = Transpose <perm = [0, 2, 1]> (hot) p = MatMul (t, g) W_grad = ReduceSum <keepdims = 0> (p, first)",
        "rows",
    ),
    "flat MatMul": (
        f"{FLAT} h2 = MatMul (hot2, W) {DEEP}",
        "t = Transpose (hot2) W_grad = MatMul (t, g2)",
        "rows",
    ),
    "Gemm": (f"{FLAT} h2 = Gemm (hot2, W) {DEEP}", "W_grad = Gemm <transA = 1> (hot2, g2)", "rows"),
    "Gemm, bias times zero": (
        f"{FLAT} h2 = Gemm <beta = 0.0> (hot2, W, nothing) {DEEP}",
        "t = Transpose (hot2) W_grad = Gemm <beta = 0.0> (t, g2, nothing)",
        "rows",
    ),
    "Gemm of the transposes": (
        f"{FLAT} t = Transpose (hot2) h2 = Gemm <transA = 1> (t, W) {DEEP}",
        "turned = Gemm <transA = 1> (g2, hot2) W_grad = Transpose (turned)",
        "rows",
    ),
    "Einsum": (
        f'{LAST} h = Einsum <equation = "abc,cd->abd"> (hot, W)',
        'turned = Einsum <equation = "abc,abd->cd"> (g, hot) W_grad = Transpose (turned)',
        "rows",
    ),
    "Einsum, table first, batch last": (
        f'{LAST} h = Einsum <equation = "v d, a b v -> a b d"> (W, hot)',
        'tg = Transpose <perm = [2, 1, 0]> (g) W_grad = Einsum <equation = "dba,abv->vd"> (tg, hot)',
        "rows",
    ),
    "Einsum, updates in another order": (
        f'{LAST} h = Einsum <equation = "abc,cd->dab"> (hot, W) h3 = Transpose <perm = [1, 2, 0]> (h)',
        "g3 = Neg (g) g4 = Neg (g3) tg = Transpose <perm = [2, 0, 1]> (g4) still = Identity (tg)"
        ' W_grad = Einsum <equation = "abc,dab->cd"> (hot, still)',
        "rows",
    ),
    "along the first axis": (
        'hot = OneHot <axis = 0> (ids, depth, values) h = Einsum <equation = "abc,ad->bcd"> (hot, W)',
        'W_grad = Einsum <equation = "vab,abd->vd"> (hot, g)',
        "rows",
    ),
    "a table of columns": (
        f'{LAST} h = Einsum <equation = "abc,dc->abd"> (hot, W)',
        'W_grad = Einsum <equation = "abc,abd->cd"> (g, hot)',
        "columns",
    ),
    "Equal": (
        f"{EQUAL} hot = Cast <to = 1> (is) h = MatMul (hot, W)",
        'W_grad = Einsum <equation = "abv,abd->vd"> (hot, g)',
        "rows",
    ),
    "Equal, Where": (
        f"{EQUAL} hot = Where (is, one, none) h = MatMul (hot, W)",
        'W_grad = Einsum <equation = "abv,abd->vd"> (hot, g)',
        "rows",
    ),
    "Equal along the first axis": (
        "wide = Unsqueeze (ids, first) is = Equal (standing, wide) hot = Cast <to = 1> (is)"
        ' h = Einsum <equation = "vab,vd->abd"> (hot, W)',
        'W_grad = Einsum <equation = "vab,abd->vd"> (hot, g)',
        "rows",
    ),
}


def graph(forward: str, backward: str, layout: str = "rows") -> ir.Model:
    weight = "float[5, 3] W" if layout == "rows" else "float[3, 5] W"
    h = "h3" if "h3" in forward else "h"
    return model_of(
        f"""training (int64[N, 2] ids, float[N, 2, 3] g, {weight}) => (float loss, {weight}_grad)
        <{CONSTANTS}> {{
            {forward}
            hg = Mul ({h}, g)
            loss = ReduceSum <keepdims = 0> (hg)
            {backward}
        }}""",
        {"W": "W_grad"},
    )


def marked(model: ir.Model, feed: dict[str, np.ndarray]) -> tuple[Site, dict[str, Any]]:
    """Run `find-embeddings`, and return the site with its values and the exporter's gradient."""
    parse_pipeline("find-embeddings").run(model)
    (found,) = metadata.read_list(model, "sites", Site)
    names = [str(found.ids), str(found.rows), str(found.keep)]
    by_name = {str(value.name): value for node in model.graph for value in node.outputs}
    wanted = [name for name in names if name in by_name]
    model.graph.outputs.extend(by_name[name] for name in wanted)
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {item.name for item in host.get_inputs()}
    results = host.run(["W_grad", *wanted], {key: value for key, value in feed.items() if key in inputs})
    return found, {**feed, **dict(zip(["W_grad", *wanted], results, strict=True))}


def table_of(found: Site, values: dict[str, Any]) -> np.ndarray:
    """Return Σ of the kept rows at their ids, in float64."""
    table = np.zeros((V, D))
    kept = values[str(found.keep)].astype(np.float64)[:, None]
    np.add.at(table, values[str(found.ids)], values[str(found.rows)].astype(np.float64) * kept)
    return table


@pytest.mark.parametrize("name", CASES)
def test_rows_sum_to_the_graphs_own_gradient(name: str) -> None:
    model = graph(*CASES[name])
    layout = CASES[name][2]
    stored = W if layout == "rows" else np.ascontiguousarray(W.T)
    found, values = marked(model, {"ids": IDS, "g": G, "W": stored})
    assert (found.vocab_size, found.embedding_dim, found.layout) == (V, D, layout)
    assert len(found.uses) == 1
    assert found.dense_uses == ()
    gradient = values["W_grad"] if layout == "rows" else values["W_grad"].T
    want = np.zeros((V, D))
    np.add.at(want, IDS.reshape(-1), G.reshape(-1, D).astype(np.float64))
    np.testing.assert_allclose(gradient, want, atol=1e-6)  # float32 sums of at most two
    np.testing.assert_allclose(table_of(found, values), want, atol=1e-12)  # the same rows, summed in float64
    np.testing.assert_array_equal(values[str(found.keep)], 1)


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("Einsum", [True, True, True, False, False, True]),  # OneHot: -1 is the last class, -6 and 5 are none
        ("Equal", [True, False, True, False, False, False]),  # only equal numbers are a class
    ],
)
def test_ids_that_are_no_class_make_nothing(name: str, counted: list[bool]) -> None:
    ids = np.array([[0, -1], [4, 5], [-6, -5]], np.int64)
    model = graph(*CASES[name])
    found, values = marked(model, {"ids": ids, "g": G, "W": W})
    np.testing.assert_array_equal(values[str(found.keep)], counted)
    np.testing.assert_allclose(table_of(found, values), values["W_grad"], atol=1e-6)
    assert 0 <= values[str(found.ids)].min() <= values[str(found.ids)].max() < V
    assert metadata.read_list(model, "id_checks", IdCheck) == []


@pytest.mark.parametrize(
    "forward",
    [
        f'{LAST} b = Einsum <equation = "abc,cd->ad"> (hot, W) h = Unsqueeze (b, axis)',  # a sum of rows
        "soft = Softmax (x) h = MatMul (soft, W)",  # not one-hot
        "hot = OneHot <axis = -1> (ids, depth, x2) h = MatMul (hot, W)",  # values that the batch gives
    ],
)
def test_other_products_are_no_lookups(forward: str) -> None:
    model = model_of(
        f"""training (int64[N, 2] ids, float[N, 2, 3] g, float[N, 2, 5] x, float[2] x2, float[5, 3] W)
        => (float loss, float[5, 3] W_grad) <{CONSTANTS}, int64[1] axis = {{1}}> {{
            {forward}
            hg = Mul (h, g)
            loss = ReduceSum <keepdims = 0> (hg)
            W_grad = Einsum <equation = "abv,abd->vd"> (x, g)
        }}""",
        {"W": "W_grad"},
    )
    (verdict,) = find_tables(model)
    assert verdict.site is None


def test_scaled_products_are_no_lookups() -> None:
    forward, backward, _ = CASES["Gemm"]
    for changed in (forward.replace("Gemm (", "Gemm <alpha = 2.0> ("), forward):
        model = graph(changed, backward)
        (verdict,) = find_tables(model)
        assert (verdict.site is None) is (changed != forward)


def test_graphs_are_valid() -> None:
    for forward, backward, layout in CASES.values():
        onnx.checker.check_model(ir.to_proto(graph(forward, backward, layout)))
