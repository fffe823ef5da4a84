"""The dense part of a tied table as left and right vectors, however the exporter wrote it.

The loss of every graph is Σ h·g + Σ z·d with rows h of W at `ids` and a projection z of x by W; g and d are
inputs, so δ = dL/dz = d, and the statistics of both sides are known without running the graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from preset_names import COUNTING

from kfac_onnx.api import scan, transform, why
from kfac_onnx.errors import UserError
from kfac_onnx.reference import TableReference
from kfac_onnx.reports.inspect import inspect
from kfac_onnx.runtime import TrainingSession

V, D = 5, 3
HEAD = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>'
FLAT = "float[P, 3] x, float[P, 5] d"
DEEP = "float[B, 2, 3] x, float[B, 2, 5] d"


def tied(
    projection: str,
    backward: str,
    inputs: str = FLAT,
    weight: str = "float[5, 3] W",
    lookup: str = "h = Gather (W, ids)",
    rows: str = 'index = Unsqueeze (ids, last) R = ScatterND <reduction = "add"> (zeros, index, g)',
) -> ir.Model:
    """Return a training graph with a lookup and a projection; `backward` makes dense from x and d."""
    shape = weight[5 : weight.index("]") + 1]
    text = f"""{HEAD}
    tied (int64[N] ids, float[N, 3] g, {inputs}, {weight}) => (float loss, float{shape} W_grad)
    <int64[1] last = {{-1}}, int64[2] size = {{5, 3}}, int64[1] first = {{0}}, int64[2] two = {{-1, 3}},
     int64[2] five = {{-1, 5}}, float scale = {{0.5}}> {{
        {lookup}
        hg = Mul (h, g)
        one = ReduceSum <keepdims = 0> (hg)
        {projection}
        zd = Mul (z, d)
        other = ReduceSum <keepdims = 0> (zd)
        loss = Add (one, other)
        zeros = ConstantOfShape (size)
        {rows}
        {backward}
        W_grad = Add (R, dense)
    }}"""
    proto = onnx.parser.parse_model(text)
    size = [int(dim) for dim in shape.strip("[]").split(",")]  # FusedMatMul has no shape inference of its own
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("dense", onnx.TensorProto.FLOAT, size))
    return ir.from_proto(proto)


COLUMNS = {
    "weight": "float[3, 5] W",
    "lookup": "hT = Gather <axis = 1> (W, ids) h = Transpose <perm = [1, 0]> (hT)",
    "rows": 'index = Unsqueeze (ids, last) S = ScatterND <reduction = "add"> (zeros, index, g) '
    "R = Transpose <perm = [1, 0]> (S)",
}

CASES: dict[str, ir.Model] = {
    "MatMul of the transposed gradient": tied(
        "T = Transpose <perm = [1, 0]> (W) z = MatMul (x, T)",
        "dT = Transpose <perm = [1, 0]> (d) dense = MatMul (dT, x)",
    ),
    "transposed MatMul": tied(
        "T = Transpose <perm = [1, 0]> (W) z = MatMul (x, T)",
        "xT = Transpose <perm = [1, 0]> (x) p = MatMul (xT, d) dense = Transpose <perm = [1, 0]> (p)",
    ),
    "Gemm": tied("z = Gemm <transB = 1> (x, W)", "dense = Gemm <transA = 1> (d, x)"),
    "Gemm of both operands transposed": tied(
        "z = Gemm <transB = 1> (x, W)",
        "dT = Transpose (d) xT = Transpose (x) dense = Gemm <transB = 1> (dT, xT)",
    ),
    "Gemm, stored transposed": tied(
        "z = Gemm <transB = 1> (x, W)", "p = Gemm <transA = 1> (x, d) dense = Transpose (p)"
    ),
    "FusedMatMul": tied(
        "z = com.microsoft.FusedMatMul <transB = 1> (x, W)",
        "dense = com.microsoft.FusedMatMul <transA = 1> (d, x)",
    ),
    "minus": tied(
        "T = Transpose (W) z = MatMul (x, T)",
        "m = Neg (d) n = Gemm <transA = 1> (m, x) dense = Neg (n)",
    ),
    "reshaped to two axes": tied(
        "T = Transpose (W) z = MatMul (x, T)",
        "d2 = Reshape (d, five) x2 = Reshape (x, two) dense = Gemm <transA = 1> (d2, x2)",
        DEEP,
    ),
    "batched and summed": tied(
        "T = Transpose (W) z = MatMul (x, T)",
        "dT = Transpose <perm = [0, 2, 1]> (d) p = MatMul (dT, x) "
        "dense = ReduceSum <keepdims = 0> (p, first)",
        DEEP,
    ),
    "batched, transposed and summed": tied(
        "T = Transpose (W) z = MatMul (x, T)",
        "xT = Transpose <perm = [0, 2, 1]> (x) p = MatMul (xT, d) "
        "s = ReduceSum <keepdims = 1> (p, first) q = Squeeze (s, first) dense = Transpose (q)",
        DEEP,
    ),
    "a table of columns": tied("z = MatMul (x, W)", "dense = Gemm <transA = 1> (x, d)", **COLUMNS),
}


def feed(seed: int, inputs: tuple[str, ...] = ("ids", "g", "x", "d"), deep: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lead = (4, 2) if deep else (8,)
    made = {
        "ids": rng.integers(0, V, 6),
        "g": rng.normal(size=(6, D)).astype(np.float32),
        "x": rng.normal(size=(*lead, D)).astype(np.float32),
        "d": (rng.normal(size=(*lead, V)) * rng.uniform(0.1, 2, size=V)).astype(np.float32),
    }
    return {name: made[name] for name in inputs}


def start(columns: bool = False) -> dict[str, np.ndarray]:
    W = np.random.default_rng(9).normal(size=(V, D)).astype(np.float32)
    return {"W": np.ascontiguousarray(W.T) if columns else W}


@pytest.mark.parametrize("preset", COUNTING)
@pytest.mark.parametrize("case", list(CASES))
def test_three_steps_take_in_both_sides(case: str, preset: str) -> None:
    model = CASES[case]
    columns = case == "a table of columns"
    deep = len(model.graph.inputs[2].shape or ()) == 3
    scale = 2.0 if preset == "r1.7" else None
    step = transform(model, preset=preset, lr=0.1, tied="both", uses="multi-indep", grad_scale=scale)
    reference = TableReference(preset, V, D, 0.1, num_uses=2)
    with TrainingSession(step, parameters=start(columns)) as session:
        W = start()["W"].astype(np.float64)
        for seed in range(3):
            batch = feed(seed, deep=deep)
            session.step(batch)
            d, x = batch["d"].reshape(-1, V).astype(np.float64), batch["x"].reshape(-1, D).astype(np.float64)
            W = reference.step(W, batch["ids"], batch["g"], scale=2.0, dense=d.T @ x, projections=[(d, x)])
            got = session.parameters["W"].T if columns else session.parameters["W"]
            # float32 rounding over three steps, relative to the largest weight
            np.testing.assert_allclose(got, W, rtol=0, atol=2e-5 * np.abs(W).max())


def test_a_projection_from_the_vocabularys_side() -> None:
    """z = x·W, a bag of words as the input of an autoencoder: left vectors are x, right ones δ."""
    model = tied("z = MatMul (x, W)", "dense = Gemm <transA = 1> (x, d)", "float[P, 5] x, float[P, 3] d")
    reference = TableReference("half", V, D, 0.1)
    batch = feed(0)
    batch["x"], batch["d"] = batch["d"], batch["x"]
    with TrainingSession(transform(model, preset="half", lr=0.1, tied="both"), parameters=start()) as session:
        session.step(batch)
        x, d = batch["x"].astype(np.float64), batch["d"].astype(np.float64)
        want = reference.step(start()["W"], batch["ids"], batch["g"], dense=x.T @ d, projections=[(x, d)])
        np.testing.assert_allclose(session.parameters["W"], want, rtol=0, atol=1e-5)


def test_positions_without_a_gradient_do_not_count() -> None:
    """δ = 0 everywhere: the factors are those of the lookups alone."""
    model = CASES["Gemm"]
    batch = feed(0)
    batch["d"] = np.zeros_like(batch["d"])
    kept = []
    for choice in ("lookup", "both"):
        with TrainingSession(transform(model, preset="half", tied=choice), parameters=start()) as session:
            assert session.step(batch)["skipped"] is False
            states = session.states
            scale = float(states.get("kfac/W/A.scale", np.array(1.0)))
            kept.append((states["kfac/W/A"] * scale, states["kfac/W/G"], session.parameters["W"]))
    for one, other in zip(*kept, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.abs(kept[0][2] - start()["W"]).max() > 1e-3


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    batch = feed(0)
    batch["d"][0, 0] = np.inf
    with TrainingSession(transform(CASES["Gemm"], tied="both"), parameters=start()) as session:
        before = session.states
        assert session.step(batch)["skipped"] is True
        for name, value in session.states.items():
            np.testing.assert_array_equal(value, before[name])
        assert session.step(feed(1))["skipped"] is False


SCALED = tied(
    "S = Mul (W, scale) z = Gemm <transB = 1> (x, S)", "p = Gemm <transA = 1> (d, x) dense = Mul (p, scale)"
)
NO_PRODUCT = tied(
    "z = Gemm <transB = 1> (x, W)", "e = Add (d, d) m = Gemm <transA = 1> (e, x) dense = Abs (m)"
)
OTHER = tied("z = Gemm <transB = 1> (x, W)", "y = Exp (x) dense = Gemm <transA = 1> (d, y)")


@pytest.mark.parametrize(
    ("model", "trail"),
    [
        (SCALED, "tied=both cannot be had: Gemm 'z' is no product with the table"),
        (NO_PRODUCT, "tied=both cannot be had: 'dense' is no product of two tensors"),
        (OTHER, "tied=both cannot be had: 'dense' does not multiply what the table was multiplied with"),
    ],
)
def test_what_is_no_product_is_refused_for_both_sides_only(model: ir.Model, trail: str) -> None:
    assert trail in why(model, "W").trail
    with pytest.raises(UserError) as caught:
        transform(model, tied="both")
    use = scan(model).sites[0].dense_uses[0]
    assert str(caught.value) == (
        f"tied=both needs the statistics of {use.op} '{use.output}', which also uses 'W', and its part of the "
        "gradient is no product of two tensors\n"
        "  in:   insert-embedding-kfac\n"
        "  help: set tied=lookup; `why` says what was tried"
    )
    transform(model, tied="lookup")


def test_tied_tables_may_be_refused() -> None:
    with pytest.raises(UserError) as caught:
        transform(CASES["Gemm"], tied="refuse")
    assert str(caught.value) == (
        "parameter 'W' is used in a way that no block covers: it is tied: Gemm 'z' uses the whole table too, "
        "and tied=refuse is set\n"
        "  path: W -> z\n"
        "  in:   insert-embedding-kfac\n"
        "  help: set tied=lookup or tied=both, or leave it to --rest: allow-fallback=W"
    )


def test_a_refused_tied_table_may_be_left_to_the_rest() -> None:
    step = transform(CASES["Gemm"], tied="refuse", allow_fallback=("W",), rest="sgd", rest_lr=0.5)
    report = inspect(step)
    assert not report.sites
    assert [item.parameter for item in report.refused] == ["W"]
    assert [(item.name, item.optimizer) for item in report.others] == [("W", "Sgd")]
    batch = feed(3)
    with TrainingSession(step, parameters=start()) as session:
        session.step(batch)
        gradient = batch["d"].T @ batch["x"]
        np.add.at(gradient, batch["ids"], batch["g"])
        np.testing.assert_allclose(session.parameters["W"], start()["W"] - 0.5 * gradient, atol=1e-5)


def test_inspect_says_what_the_factors_take_in() -> None:
    def statistics(**options: str) -> str:
        (site,) = inspect(transform(CASES["Gemm"], **options)).sites
        return site.statistics

    assert statistics(tied="lookup") == "lookups; G from at most 1024 rows"
    assert statistics() == statistics(tied="both") == "lookups and projection, 2 uses stacked"
    assert statistics(tied="both", uses="multi-indep") == (
        "lookups and projection, 2 independent uses: damping λ/2, coefficient 2"
    )
    assert statistics(tied="lookup", uses="multi-indep") == "lookups; G from at most 1024 rows"
