"""Padding rows: not counted, not updated; those that the exporter lost are given back by the user."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from corpus_cases import Case, MarkedGraph, StepReference, initial_state, marked
from preset_names import ALL

from kfac_onnx import metadata
from kfac_onnx.api import TransformOptions, scan, transform
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import State
from kfac_onnx.reports.inspect import inspect
from kfac_onnx.runtime import TrainingSession

LOST = {"ortart_leg14loss__nplm_pad0": "m.emb.weight", "ortart_legcore__bert_sum": "tok.weight"}
KEPT = {
    "torchjoint_in__nplm_pad0": "m.emb.weight",
    "torchjoint_in__bert_sum": "m.tok.weight",
    "ortgrad_aten__nplm_pad0": "emb.weight",
    "torchmakefx__nplm_pad0": "arg0_0",
}
TOLERANCE = 4e-6  # a few units in the last place of float32, relative to the largest weight


def trained_by(
    case: Case, graph: MarkedGraph, preset: str, padding: dict[str, int] | None
) -> tuple[dict[str, np.ndarray], StepReference]:
    """Train twelve steps, each equal to the float64 reference; return the weights and the reference."""
    weights = graph.initial(case)
    reference = StepReference(graph, weights, preset, 0.01, "sgd", 1e-3)
    model = transform(case.path, preset=preset, rest="sgd", lr=0.01, rest_lr=1e-3, padding_idx=padding)
    with TrainingSession(model, parameters=weights) as session:
        names = [item.name for item in session.batch_inputs]
        for t in range(12):
            feed = case.feed("in2" if t % 2 else "in")
            reference.weights = {
                key: np.asarray(value, np.float64) for key, value in session.parameters.items()
            }
            reference.step(graph.run(reference.feed(feed)))
            assert session.step({name: feed[name] for name in names})["skipped"] is False
            for key, want in reference.weights.items():
                limit = TOLERANCE * np.abs(want).max()
                np.testing.assert_allclose(session.parameters[key], want, rtol=0, atol=limit, err_msg=key)
        return dict(session.parameters.items()), reference


def padded_lookups(graph: MarkedGraph, case: Case, table: str) -> tuple[int, int]:
    """Return how many lookups of the second batch there are, and how many of them are of row 0."""
    (site,) = [site for site in graph.sites if site.parameter == table]
    ids = graph.run({**case.feed("in2"), **graph.initial(case)})[str(site.ids)]
    return ids.size, int((ids == 0).sum())


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("name", LOST)
def test_a_lost_padding_row_is_given_back(name: str, preset: str) -> None:
    case, table = Case(name), LOST[name]
    graph = MarkedGraph(case, {table: 0})
    total, padded = padded_lookups(graph, case, table)
    assert padded > 0
    weights, reference = trained_by(case, graph, preset, {table: 0})
    np.testing.assert_array_equal(weights[table][0], graph.initial(case)[table][0])
    assert reference.tables[table].lookups == total - padded


@pytest.mark.parametrize("name", LOST)
def test_the_corrected_gradient_is_that_of_the_framework(name: str) -> None:
    """torch leaves the padding row out, the exporter does not: with the option the two agree."""
    case, table = Case(name), LOST[name]
    want = case.arrays[f"ref:grad:{table.removeprefix('m.')}"]  # the sidecar has the inner module's names
    for padding, right in (({table: 0}, True), (None, False)):
        graph = MarkedGraph(case, padding)
        (gradient,) = [item.gradient for item in graph.parameters if item.name == table]
        found = graph.run({**case.feed(), **graph.initial(case)})[str(gradient)]
        error = np.abs(found - want).max() / np.abs(want).max()
        assert bool(error <= 2e-6) is right, error
        assert bool(found[0].any()) is not right


@pytest.mark.parametrize("name", KEPT)
def test_a_padding_row_of_the_graph_is_respected_without_a_word(name: str) -> None:
    (case, graph), table = marked(name), KEPT[name]
    (site,) = [site for site in graph.sites if site.parameter == table]
    assert site.padding_idx == 0
    total, padded = padded_lookups(graph, case, table)
    assert padded > 0
    weights, reference = trained_by(case, graph, "half", None)
    np.testing.assert_array_equal(weights[table][0], graph.initial(case)[table][0])
    assert reference.tables[table].lookups == total - padded
    said = transform(case.path, padding_idx={table: 0})  # what the graph does may be said
    assert inspect(said).sites[0].parameter == inspect(transform(case.path)).sites[0].parameter


@pytest.mark.parametrize("preset", ["plain-sgd", "plain-adam", "plain-adagrad"])
def test_plain_optimizers_leave_the_row_alone(preset: str) -> None:
    name = "ortart_leg14loss__nplm_pad0"
    case, graph = marked(name)
    weights = graph.initial(case)
    moved = []
    for padding in ({LOST[name]: -100}, None):
        model = transform(case.path, preset=preset, lr=0.1, padding_idx=padding)
        with TrainingSession(model, parameters=weights) as session:
            session.step({item.name: case.feed()[item.name] for item in session.batch_inputs})
            moved.append(np.abs(session.parameters[LOST[name]] - weights[LOST[name]]).max(axis=1))
    assert moved[0][0] == 0.0 < moved[1][0]
    np.testing.assert_allclose(moved[0][1:], moved[1][1:], rtol=1e-6)


def small(kind: str, tied: bool, layout: str = "rows") -> ir.Model:
    """Return a graph with V = 5, D = 3: lookups of `ids` with rows g, and with `tied` a projection of x."""
    columns = layout == "columns"
    shape = "[3, 5]" if columns else "[5, 3]"
    turned = "Transpose (W)" if columns else "Identity (W)"
    dense = "p = Gemm <transA = 1> (d, x)" if tied else "p = Mul (S, nil)"
    dense += " A = Add (S, p)" if tied else " A = Identity (S)"
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    small (int64[N] ids, {kind}[N, 3] g, {kind}[P, 3] x, {kind}[P, 5] d, {kind}{shape} W)
        => (float loss, {kind}{shape} W_grad)
    <int64[1] last = {{-1}}, int64[2] size = {{5, 3}}, {kind} nil = {{0.0}}> {{
        R = {turned} h = Gather (R, ids) hg = Mul (h, g)
        z = Gemm <transB = 1> (x, {"R" if tied else "g"}) zd = {"Mul (z, d)" if tied else "Mul (d, nil)"}
        a = ReduceSum <keepdims = 0> (hg) b = ReduceSum <keepdims = 0> (zd) c = Add (a, b)
        loss = Cast <to = 1> (c)
        zeros = ConstantOfShape <value = {kind}[1] {{0.0}}> (size) index = Unsqueeze (ids, last)
        S = ScatterND <reduction = "add"> (zeros, index, g)
        {dense}
        W_grad = {"Transpose (A)" if columns else "Identity (A)"}
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_layouts_and_tied_tables(layout: str, tied: bool) -> None:
    """The gradient of a drop-in graph with root and counts at 1 is the exporter's without the padding."""
    rng = np.random.default_rng(1)
    batch = {
        "ids": np.array([2, 1, 2, 4, 0, 2]),
        "g": rng.normal(size=(6, 3)).astype(np.float32),
        "x": rng.normal(size=(4, 3)).astype(np.float32),
        "d": rng.normal(size=(4, 5)).astype(np.float32),
    }
    want = batch["d"].T @ batch["x"] if tied else np.zeros((5, 3), np.float32)
    np.add.at(want, batch["ids"], batch["g"] * (batch["ids"] != 2)[:, None])
    model = transform(small("float", tied, layout), preset="plain-momentum", lr=1.0, padding_idx={"W": 2})
    W = rng.normal(size=(5, 3)).astype(np.float32)
    with TrainingSession(model, parameters={"W": W if layout == "rows" else W.T.copy()}) as session:
        session.step(batch)
        got = session.parameters["W"]
        moved = W - (got if layout == "rows" else got.T)
    np.testing.assert_allclose(moved, want, atol=2e-6)
    if not tied:
        np.testing.assert_array_equal(moved[2], np.zeros(3))


def test_the_drop_in_shape_leaves_the_row_out_too() -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(2)
    feed: dict[str, Any] = {
        "ids": np.array([2, 1, 2, 4, 0, 2]),
        "g": rng.normal(size=(6, 3)).astype(np.float32),
        "x": np.zeros((1, 3), np.float32),
        "d": np.zeros((1, 5), np.float32),
        "W": rng.normal(size=(5, 3)).astype(np.float32),
    }
    model = transform(small("float", False), shape="dense", padding_idx={"W": 2})
    assert [value.name for value in model.graph.outputs][:2] == ["loss", "W_grad"]
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feed |= {state.input: initial_state(state, feed) for state in metadata.read_list(model, "state", State)}
    (gradient,) = host.run(["W_grad"], feed)
    assert not gradient[[2, 3]].any()
    assert np.abs(gradient[[0, 1, 4]]).min() > 0


def test_words_and_rows_that_do_not_fit() -> None:
    model = small("float", False)
    graph = {
        ("W=5",): "padding names row 5 of 'W', which has 5 rows",
        ("V=0",): ("padding names 'V', which is no embedding table\n  help: `scan MODEL` lists the tables"),
        ("W",): "padding wants PARAM=ROW, not 'W'",
        ("W=x",): "padding wants PARAM=ROW, not 'W=x'",
        ("W=1", "W=2"): "padding names two rows of 'W': 1 and 2",
    }
    for words, message in graph.items():
        text = TransformOptions().text.replace(
            "find-embeddings", "find-embeddings{padding=[" + ",".join(f'"{word}"' for word in words) + "]}"
        )
        with pytest.raises(UserError) as caught:
            transform(model, pipeline=text)
        assert str(caught.value).split("\n  in:")[0] == message.split("\n")[0]
        assert caught.value.help == (message.partition("help: ")[2] or None)
    with pytest.raises(UserError) as caught:
        transform(Case("torchjoint_in__nplm_pad0").path, padding_idx={"m.emb.weight": 3})
    assert str(caught.value) == (
        "padding names row 3 of 'm.emb.weight', but the graph drops row 0\n"
        "  in:   find-embeddings, pass 1 of 6\n"
        "  help: leave it out: the graph's own padding row is respected"
    )


MASKED = """<ir_version: 9, opset_import: ["" : 18]>
    masked (int64[N] ids, float[N, 3] g, float[5, 3] W) => (float loss, float[5, 3] W_grad)
    <int64[1] last = {{-1}}, int64[2] size = {{5, 3}}, float nil = {{0.0}}, int64 pad = {{0}}, int64 none = {{0}}> {{
        h = Gather (W, ids) is = Equal (ids, pad) real = Not (is) wide = Unsqueeze (real, last)
        kept = Where (wide, h, nil) hg = Mul (kept, g) loss = ReduceSum <keepdims = 0> (hg)
        mine = Where (wide, g, nil) {backward}
        zeros = ConstantOfShape <value = float[1] {{0.0}}> (size) index = Unsqueeze (ids, last)
        W_grad = ScatterND <reduction = "add"> (zeros, index, rows)
    }}"""  # fmt: skip


@pytest.mark.parametrize(
    ("backward", "padding"),
    [
        ("rows = Identity (mine)", None),  # the user's own mask: those lookups count
        ("low = GreaterOrEqual (ids, none) both = And (low, real) over = Unsqueeze (both, last)"
         " rows = Where (over, mine, nil)", 0),  # the exporter's test for padding shares its node
        ("low = GreaterOrEqual (ids, none) over = Unsqueeze (low, last) rows = Where (over, mine, nil)", None),
    ],
)  # fmt: skip
def test_padding_that_shares_its_comparison_with_the_users_mask(backward: str, padding: int | None) -> None:
    report = scan(onnx.parser.parse_model(MASKED.format(backward=backward)))
    (site,) = report.sites
    assert site.padding_idx == padding


def test_rows_of_torchs_embedding_in_a_view_of_a_table() -> None:
    """The scatter's shape is that of the view whose rows the backward operator counts."""
    op = 'org.pytorch.aten.ATen <operator = "embedding'
    report = scan(
        onnx.parser.parse_model(f"""<ir_version: 9,
            opset_import: ["" : 18, "org.pytorch.aten" : 1, "com.microsoft" : 1]>
        aten (int64[N] ids, float[N, K] g, float[7, 3] W) => (float loss, float[7, 3] W_grad)
        <int64[1] start = {{1}}, int64[1] stop = {{6}}, int64[1] axis = {{0}}, int64 first = {{0}},
         int64 none = {{-1}}, bool no = {{0}}> {{
            view = Slice (W, start, stop, axis) h = {op}"> (view, ids, none, no, no)
            hg = Mul (h, g) loss = ReduceSum <keepdims = 0> (hg)
            dims = Shape (view) count = Gather (dims, first)
            part = {op}_backward"> (g, ids, count, none, no, no)
            whole = Shape (W) W_grad = com.microsoft.SliceGrad (part, whole, start, stop, axis)
        }}""")
    )
    (site,) = report.sites
    assert (site.vocab_size, site.embedding_dim, len(site.uses), report.refused) == (7, 3, 1, ())
