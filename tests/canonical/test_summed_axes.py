"""Sums whose axes are found at run time get constant ones, where that never changes a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.summed_axes import settle_summed_axes
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

RNG = np.random.default_rng(4)


def graph(
    x: str = "float[b, 4, 3] x",
    leading: int = 1,
    attributes: str = "keepdims = 0, noop_with_empty_axes = 1",
    reader: str = "y = Reshape(sum, target)",
    output: str = "float[4, 3] y",
    target: str = "4, 3",
    mask: str = "longer = Not(one) mask = Identity(longer)",
) -> str:
    size = len(target.split(","))
    return f"""<ir_version: 10, opset_import: ["" : 18]>
    g ({x}) => ({output})
    <int64[1] start = {{0}}, int64[1] end = {{{leading}}}, int64[1] ones = {{1}}, int64[1] size = {{{leading}}},
     int64[{size}] target = {{{target}}}, int64[1] first = {{0}}> {{
        shape = Shape(x) narrow = Cast<to = 6>(shape) dims = Slice(narrow, start, end)
        wide = Cast<to = 7>(dims) rank = Shape(wide) padded = Expand(ones, rank)
        one = Equal(wide, padded)
        {mask}
        where = NonZero(mask) flat = Squeeze(where, first) short = Cast<to = 6>(flat)
        axes = Cast<to = 7>(short)
        sum = ReduceSum<{attributes}>(x, axes)
        {reader}
    }}"""


def axes_of(model: ir.Model) -> list[int] | None:
    (node,) = [node for node in model.graph if node.op_type == "ReduceSum"]
    held = node.inputs[1]
    assert held is not None
    return None if held.const_value is None else held.const_value.numpy().tolist()


CASES = {
    "one axis": (graph(), [0], [(5, 4, 3), (1, 4, 3)]),
    "kept axes": (graph(attributes="keepdims = 1, noop_with_empty_axes = 1"), [0], [(5, 4, 3), (1, 4, 3)]),
    "two axes": (
        graph("float[b, c, 4, 3] x", leading=2),
        [0, 1],
        [(5, 2, 4, 3), (1, 2, 4, 3), (5, 1, 4, 3), (1, 1, 4, 3)],
    ),
    "flattened": (graph(target="12", output="float[12] y"), [0], [(5, 4, 3), (1, 4, 3)]),
}


@pytest.mark.parametrize("case", CASES)
def test_axes_become_constant(
    case: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    text, axes, shapes = CASES[case]
    model, plain = build(text), build(text)
    infer_shapes(model)
    assert settle_summed_axes(model) == 1
    assert axes_of(model) == axes
    for shape in shapes:
        x = RNG.standard_normal(shape).astype(np.float32)
        want = run(plain, {"x": x})["y"]
        check(run(model, {"x": x})["y"], want, 1e-6)  # sums of at most ten float32 terms
        np.testing.assert_allclose(want.reshape(-1), x.sum(tuple(axes)).reshape(-1), rtol=1e-5, atol=1e-6)


OTHERS = {
    "no axes means all": graph(attributes="keepdims = 0, noop_with_empty_axes = 0"),
    "the batch may stay": graph(target="-1, 3", output="float[m, 3] y"),
    "an axis behind may go": graph(leading=2),
    "rest of unknown size": graph("float[b, c, 3] x"),
    "also read as it is": graph(
        reader="y = Reshape(sum, target) z = Neg(sum)", output="float[4, 3] y, float[k, 3] z"
    ),
    "the sum is an output": graph(output="float[4, 3] y, float[k, 3] sum"),
    "a mask of unknown length": graph(mask="n = Size(x) mask = Expand(one, n1)").replace(
        "mask = Expand", "n1 = Unsqueeze(n, first) mask = Expand"
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_sums_stay(case: str, build: Callable[[str], ir.Model]) -> None:
    model = build(OTHERS[case])
    infer_shapes(model)
    assert settle_summed_axes(model) == 0
    assert axes_of(model) is None
