"""Bounds that are computed from constants become constants, so that shapes are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.fixed_bounds import fix_bounds
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

X = np.arange(24, dtype=np.float32).reshape(6, 4) - 7.25
ONE_EACH = """
    zero = Constant <value = int64 {0}> () one = Constant <value = int64 {1}> ()
    first = Constant <value = int32 {2}> () last = Constant <value = int32 {5}> ()
    flat = Constant <value_ints = [-1]> () at = Constant <value_ints = [0]> ()
    wide = Cast <to = 7> (first) start = Reshape (wide, flat)
    broad = Cast <to = 7> (last) stop = Unsqueeze (broad, at)
    axis = Unsqueeze (zero, at) step = Unsqueeze (one, at)
"""


def graph(body: str, output: str = "float[N, M] y") -> str:
    return f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[6, 4] x, int64 k) => ({output}) {{ {ONE_EACH} {body} }}"""


@pytest.mark.parametrize(
    ("body", "fixed", "shape", "expected"),
    [
        ("z = Slice (x, start, stop, axis, step) y = Neg (z)", 4, [3, 4], -X[2:5]),
        ("size = Add (broad, one) rows = Reshape (size, flat) target = Concat <axis = 0> (rows, flat)"
         " z = Reshape (x, target) y = Neg (z)", 1, [6, 4], -X),
        ("more = Mul (start, stop) both = Concat <axis = 0> (axis, axis, more, axis)"
         " z = Pad (x, both) y = Neg (z)", 1, [16, 4], -np.pad(X, ((0, 10), (0, 0)))),
    ],
)  # fmt: skip
def test_computed_bounds_are_constants(
    body: str,
    fixed: int,
    shape: list[int],
    expected: np.ndarray,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
) -> None:
    model = build(graph(body))
    infer_shapes(model)
    assert fix_bounds(model) == fixed
    infer_shapes(model)
    (neg,) = [node for node in model.graph if node.op_type == "Neg"]
    source = neg.inputs[0]
    assert source is not None
    assert source.shape is not None
    assert list(source.shape) == shape
    np.testing.assert_array_equal(run(model, {"x": X, "k": np.array(0)})["y"], expected)
    assert fix_bounds(model) == 0


def test_bounds_of_the_batch_stay(build: Callable[[str], ir.Model]) -> None:
    model = build(graph("stops = Unsqueeze (k, at) y = Slice (x, at, stops, axis)"))
    (node,) = [node for node in model.graph if node.op_type == "Slice"]
    before = node.inputs[2]
    fix_bounds(model)
    assert node.inputs[2] is before


def test_ids_are_never_made_constants(build: Callable[[str], ir.Model]) -> None:
    """A position table's ids keep their names: only what decides shapes is fixed."""
    model = build(graph("ids = Range (zero, broad, one) y = Gather (x, ids)"))
    fix_bounds(model)
    (node,) = [node for node in model.graph if node.op_type == "Gather"]
    assert node.inputs[1] is not None
    assert node.inputs[1].name == "ids"
