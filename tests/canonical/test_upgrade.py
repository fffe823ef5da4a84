from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kfac_onnx.canonical.upgrade import InlineFunctions, SortNodes, clean_imports, upgrade
from kfac_onnx.errors import UserError
from kfac_onnx.pipeline.log import Log

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

X = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
REDUCTIONS = ["Max", "Min", "Mean", "Prod", "L1", "L2", "LogSumExp", "SumSquare"]


def original(text: str, x: np.ndarray) -> list[np.ndarray]:
    proto = onnx.parser.parse_model(text)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17])
@pytest.mark.parametrize(
    "body",
    [
        *[f"y = Reduce{kind} <axes = [1, -1], keepdims = 0> (x)" for kind in REDUCTIONS],
        "y = ReduceMean <keepdims = 1> (x)",
        "a, b = Split <axis = 1> (x)  y = Add (a, b)",
        "s = Constant <value = int64[2] {3, 3}> () a, b = Split <axis = 1> (x, s)  y = Mul (a, b)",
    ],
)
def test_old_forms_compute_the_same_at_opset_18(
    opset: int,
    body: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[2,6,4] x) => (float y) {{ {body} }}'
    text = text.replace(
        "(float y)", "(float[" + ",".join("abc"[: 1 if "keepdims = 0" in body else 3]) + "] y)"
    )
    (expected,) = original(text, X)
    model = build(text)
    assert upgrade(model, None) == f"converted from opset {opset} to 18"
    assert model.opset_imports == {"": 18}
    check(run(model, {"x": X})["y"], expected, 1e-6)  # the same kernels: equal up to their summation order


def test_batch_normalization_in_training_keeps_using_the_batch(
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    head = "g (float[2,6,4] x, float[6] s, float[6] b, float[6] m, float[6] v) => (float[2,6,4] y)"
    feeds = {"x": X, **{name: np.linspace(1, 2, 6, dtype=np.float32) for name in "sbmv"}}
    x_hat = (X - X.mean((0, 2), keepdims=True)) / np.sqrt(X.var((0, 2), keepdims=True) + 1e-5)
    column = feeds["s"][:, None]
    for outputs in ("y, m2, v2, m3, v3", "y, m2, v2"):
        node = f"{outputs} = BatchNormalization (x, s, b, m, v)"
        model = build(f'<ir_version: 8, opset_import: ["" : 13]> {head} {{ {node} }}')
        upgrade(model, None)
        # float32 means of eight entries
        check(run(model, feeds)["y"], x_hat * column + column, 1e-5)
    model = build(
        f'<ir_version: 8, opset_import: ["" : 13]> {head} {{ y = BatchNormalization (x, s, b, m, v) }}'
    )
    upgrade(model, None)
    spread = np.sqrt(feeds["v"][:, None] + 1e-5)
    check(run(model, feeds)["y"], (X - feeds["m"][:, None]) / spread * column + column, 1e-5)


def test_roi_align_keeps_its_old_default(build: Callable[[str], ir.Model]) -> None:
    body = "<output_height = 2, output_width = 2> (x, r, i) }"
    head = "g (float[1,1,4,4] x, float[1,4] r, int64[1] i) => (float[1,1,2,2] y) { y = RoiAlign " + body
    for opset, mode in ((15, "output_half_pixel"), (16, None)):
        model = build(f'<ir_version: 8, opset_import: ["" : {opset}]> {head}')
        upgrade(model, None)
        found = model.graph[0].attributes.get("coordinate_transformation_mode")
        assert (None if found is None else found.as_string()) == mode


def test_changes_reach_nested_graphs(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build("""<ir_version: 8, opset_import: ["" : 13]>
        g (float[2,6,4] x, bool c) => (float[a,b] y) {
            y = If (c) <
                then_branch = one () => (float[a,b] p) { p = ReduceMean <axes = [1], keepdims = 0> (x) },
                else_branch = two () => (float[a,b] q) { q = ReduceMax <axes = [1], keepdims = 0> (x) }
            >
        }""")
    upgrade(model, None)
    results = run(model, {"x": X, "c": np.array(False)})
    np.testing.assert_array_equal(results["y"], X.max(1))


@pytest.mark.parametrize("opset", range(18, 25))
def test_newer_opsets_stay(opset: int, build: Callable[[str], ir.Model]) -> None:
    model = build(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g (float[2] x) => (float[2] y) {{ y = Neg (x) }}'
    )
    assert upgrade(model, None) is None
    assert model.opset_imports[""] == opset


def test_too_old_an_opset_is_refused(build: Callable[[str], ir.Model]) -> None:
    model = build('<ir_version: 7, opset_import: ["" : 12]> g (float[2] x) => (float[2] y) { y = Neg (x) }')
    with pytest.raises(UserError) as caught:
        upgrade(model, "old.onnx")
    assert str(caught.value) == (
        "the graph uses opset 12, and 13 is the oldest that can be read\n"
        "  --> old.onnx\n"
        "  help: export it again with opset 17 or newer"
    )


def test_functions_are_inlined_and_nodes_sorted(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build("""<ir_version: 9, opset_import: ["" : 18, "own" : 1, "ai.onnx.ml" : 3]>
        g (float[2] x) => (float[2] y) { y = own.Twice (h)  h = Neg (x) }
        <domain: "own", opset_import: ["" : 18]> Twice (a) => (b) { b = Add (a, a) }""")
    InlineFunctions().run(model, Log())
    SortNodes().run(model, Log())
    clean_imports(model)
    assert not model.functions
    assert model.opset_imports == {"": 18}
    assert [node.op_type for node in model.graph] == ["Neg", "Add"]
    np.testing.assert_array_equal(run(model, {"x": np.ones(2, np.float32)})["y"], [-2, -2])


def test_a_circle_is_refused(build: Callable[[str], ir.Model]) -> None:
    model = build("""<ir_version: 9, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y) { y = Add (x, z)  z = Neg (y) }""")
    with pytest.raises(UserError, match="the ONNX model is malformed"):
        SortNodes().run(model, Log())


def test_the_other_spelling_of_the_standard_domain(build: Callable[[str], ir.Model]) -> None:
    model = build('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Neg (x) }')
    model.opset_imports["ai.onnx"] = model.opset_imports.pop("")
    upgrade(model, None)
    assert model.opset_imports == {"": 18}
