from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kfac_onnx.canonical.widen import BFLOAT16_KERNELS, widen

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = """<ir_version: 10, opset_import: ["" : 18]>
    g (bfloat16[5,3] table, int64[4] ids, bfloat16[3,2] w) => (bfloat16[4,2] y) {
        rows = Gather (table, ids)
        product = MatMul (rows, w)
        flat = Transpose (product)
        bent = Tanh (flat)
        y = Transpose (bent)
    }"""


def test_each_operator_rounds_once_and_movement_stays(
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    rng = np.random.default_rng(0)
    table, w = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((5, 3), (3, 2)))
    ids = np.array([0, 4, 4, 1])
    model = build(MODEL)
    assert widen(model) == ["nodes without a bfloat16 kernel that compute in float32: 2"]
    kinds = [node.op_type for node in model.graph]
    assert kinds == [
        "Gather",
        "Cast",
        "Cast",
        "MatMul",
        "Cast",
        "Transpose",
        "Cast",
        "Tanh",
        "Cast",
        "Transpose",
    ]
    assert [
        node.outputs[0].name for node in model.graph if not str(node.outputs[0].name).startswith("kfac/")
    ] == [
        "rows",
        "product",
        "flat",
        "bent",
        "y",
    ]
    product = (table[ids].astype(np.float32) @ w.astype(np.float32)).astype(ml_dtypes.bfloat16)
    expected = np.tanh(product.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    result = run(model, {"table": table, "ids": ids, "w": w})["y"]
    check(
        result, expected, 2.0**-8
    )  # one unit in bfloat16's last place, where tanh differs in float32's last


def test_other_types_stay(build: Callable[[str], ir.Model]) -> None:
    for dtype in ("float", "float16", "double"):
        model = build(MODEL.replace("bfloat16", dtype))
        assert widen(model) == []


def test_a_float64_operator_without_a_kernel_computes_in_float32(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build(
        '<ir_version: 10, opset_import: ["" : 18]> g (double[2] x) => (double[2] y) { y = Erf (x) }'
    )
    assert widen(model) == ["nodes without a double kernel that compute in float32: 1"]
    result = run(model, {"x": np.array([0.0, 0.5])})["y"]
    np.testing.assert_allclose(result, [0.0, 0.5204998778], rtol=1e-6)  # float32
    assert result.dtype == np.float64


def test_nested_graphs_are_widened(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build("""<ir_version: 10, opset_import: ["" : 18]>
        g (bfloat16[2] x, bool c) => (bfloat16[2] y) {
            y = If (c) <
                then_branch = one () => (bfloat16[2] p) { p = Add (x, x) },
                else_branch = two () => (bfloat16[2] q) { q = Identity (x) }
            >
        }""")
    widen(model)
    x = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(model, {"x": x, "c": np.array(True)})["y"], [3.0, -4.0])


SHAPES = {
    "Concat": ("y = Concat <axis = 0> (x, x)", ""),
    "Flatten": ("y = Flatten (x)", ""),
    "Gather": ("y = Gather (x, i)", ", int64[2] i"),
    "GatherElements": ("y = GatherElements (x, i)", ", int64[2,3] i"),
    "GatherND": ("y = GatherND (x, i)", ", int64[2,1] i"),
    "Identity": ("y = Identity (x)", ""),
    "Reshape": ("y = Reshape (x, i)", ", int64[2] i"),
    "ScatterElements": ("y = ScatterElements (x, i, x)", ", int64[4,3] i"),
    "ScatterND": ("y = ScatterND (x, i, x)", ", int64[4,1] i"),
    "Slice": ("y = Slice (x, i, i)", ", int64[1] i"),
    "Split": ("y, z = Split <num_outputs = 2> (x)", ""),
    "Squeeze": ("y = Squeeze (x)", ""),
    "Transpose": ("y = Transpose (x)", ""),
    "Unsqueeze": ("y = Unsqueeze (x, i)", ", int64[1] i"),
}


@pytest.mark.parametrize("operator", SHAPES)
def test_the_listed_kernels_exist(operator: str, build: Callable[[str], ir.Model]) -> None:
    assert operator in BFLOAT16_KERNELS
    body, more = SHAPES[operator]
    text = f'<ir_version: 10, opset_import: ["" : 18]> g (bfloat16[4,3] x{more}) => (bfloat16 y) {{ {body} }}'
    model = build(text)
    model.graph.outputs[0].shape = None
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
