"""Bounds and parts that are computed from constants become constants; parameters never do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.fold_constants import FoldConstants
from kfac_onnx.graph.shapes import infer_shapes
from kfac_onnx.pipeline.log import Log

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from kfac_onnx.pipeline.base import Changes

X = np.arange(24, dtype=np.float32).reshape(6, 4) - 7.25
ONE_EACH = """
    zero = Constant <value = int64 {0}> () one = Constant <value = int64 {1}> ()
    first = Constant <value = int32 {2}> () last = Constant <value = int32 {5}> ()
    flat = Constant <value_ints = [-1]> () at = Constant <value_ints = [0]> ()
    wide = Cast <to = 7> (first) start = Reshape (wide, flat)
    broad = Cast <to = 7> (last) stop = Unsqueeze (broad, at)
    axis = Unsqueeze (zero, at) step = Unsqueeze (one, at)
"""


def fold(model: ir.Model, keep: tuple[str, ...] = ()) -> Changes:
    infer_shapes(model)
    return FoldConstants(keep=keep).run(model, Log())


def graph(body: str, output: str = "float[N, M] y", held: str = "") -> str:
    return f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[6, 4] x, int64 k) => ({output}) <{held}> {{ {ONE_EACH} {body} }}"""


@pytest.mark.parametrize(
    ("body", "shape", "expected"),
    [
        ("z = Slice (x, start, stop, axis, step) y = Neg (z)", [3, 4], -X[2:5]),
        ("size = Add (broad, one) rows = Reshape (size, flat) target = Concat <axis = 0> (rows, flat)"
         " z = Reshape (x, target) y = Neg (z)", [6, 4], -X),
        ("more = Mul (start, stop) both = Concat <axis = 0> (axis, axis, more, axis)"
         " z = Pad (x, both) y = Neg (z)", [16, 4], -np.pad(X, ((0, 10), (0, 0)))),
    ],
)  # fmt: skip
def test_computed_bounds_are_constants(
    body: str,
    shape: list[int],
    expected: np.ndarray,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
) -> None:
    model = build(graph(body))
    assert fold(model)
    infer_shapes(model)
    (neg,) = [node for node in model.graph if node.op_type == "Neg"]
    source = neg.inputs[0]
    assert source is not None
    assert source.shape is not None
    assert list(source.shape) == shape
    np.testing.assert_array_equal(run(model, {"x": X, "k": np.array(0)})["y"], expected)
    assert not fold(model)


def test_bounds_of_the_batch_stay(build: Callable[[str], ir.Model]) -> None:
    model = build(graph("stops = Unsqueeze (k, at) y = Slice (x, at, stops, axis)"))
    fold(model)
    (node,) = [node for node in model.graph if node.op_type == "Slice"]
    assert node.inputs[2] is not None
    assert node.inputs[2].producer() is not None
    assert node.inputs[2].name == "stops"


def test_ids_that_are_constants_keep_their_name(build: Callable[[str], ir.Model]) -> None:
    model = build(graph("ids = Range (zero, broad, one) y = Gather (x, ids)"))
    fold(model)
    (node,) = [node for node in model.graph if node.op_type == "Gather"]
    assert node.inputs[1] is not None
    assert node.inputs[1].name == "ids"


@pytest.mark.parametrize("held", ["float[2, 2] w = {1, 2, 3, 4}", "float w = {2}"])
def test_what_is_computed_from_a_parameter_stays(held: str, build: Callable[[str], ir.Model]) -> None:
    model = build(graph("n = Neg (w) m = Transpose (n) s = Abs (m) y = Mul (x, s)", held=held))
    fold(model)
    assert [node.op_type for node in model.graph][-4:] == ["Neg", "Transpose", "Abs", "Mul"]


def test_a_counter_stays_if_it_is_named(build: Callable[[str], ir.Model]) -> None:
    text = graph("t2 = Add (t, one) f = Cast <to = 1> (t2) y = Mul (x, f)", held="int64 t = {3}")
    model = build(text)
    fold(model, keep=("t",))
    assert [node.op_type for node in model.graph][-3:] == ["Add", "Cast", "Mul"]
    assert fold(build(text))


def test_values_keep_their_names_and_new_ones_get_ours(build: Callable[[str], ir.Model]) -> None:
    """onnxscript names what it makes val_0, val_1, ...: so do the exporters whose names a user gives."""
    model = build(
        graph("val_0 = Identity (x) val_1 = Slice (val_0, start, stop, axis, step) y = Identity (val_1)"
              " val_2 = Neg (val_1)", "float[N, M] y, float[N, M] val_2")
    )  # fmt: skip
    fold(model)
    made = {value.name: node.op_type for node in model.graph for value in node.outputs}
    assert [value.name for value in model.graph.outputs] == ["y", "val_2"]
    assert made["val_2"] == "Neg"
    assert made["val_0"] == "Identity"
    assert made["y"] == "Slice"


def test_nothing_is_folded_where_a_gradient_names_an_inner_value(build: Callable[[str], ir.Model]) -> None:
    node = 'd = ai.onnx.preview.training.Gradient <xs: strings = ["h"], zs: strings = ["x"], y: string = "y"> (h, x)'
    text = graph(
        f"h = Identity (x) z = Slice (h, start, stop, axis, step) y = ReduceSum (z) {node}", "float y"
    )
    model = build(text.replace('"" : 18', '"" : 18, "ai.onnx.preview.training" : 1'))
    assert not fold(model)


def split(lengths: str, axis: int = 1) -> str:
    return f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[B, 6] x, int64 k) => (float[B, N] y, float[B, M] z) {{
            lengths = Constant <value = {lengths}> ()
            first = Constant <value = int64 {{0}}> ()
            last = Constant <value = int64 {{-1}}> ()
            parts = SplitToSequence <axis = {axis}> (x, lengths)
            y = SequenceAt (parts, first)
            end = SequenceAt (parts, last)
            z = Neg (end)
        }}"""


@pytest.mark.parametrize(
    ("lengths", "first", "last"),
    [("int64[3] {1, 2, 3}", slice(0, 1), slice(3, 6)), ("int64 {3}", slice(0, 3), slice(3, 6))],
)
@pytest.mark.parametrize("batch", ["2", "B"])
def test_known_parts_become_a_split(
    lengths: str,
    first: slice,
    last: slice,
    batch: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
) -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 6) - 5.5
    model = build(split(lengths).replace("float[B, 6]", f"float[{batch}, 6]"))
    assert fold(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    live = [node.op_type for node in model.graph if any(value.uses() for value in node.outputs)]
    assert not [kind for kind in live if "Sequence" in kind]
    infer_shapes(model)
    results = run(model, {"x": x, "k": np.array(0)})
    np.testing.assert_array_equal(results["y"], x[:, first])
    np.testing.assert_array_equal(results["z"], -x[:, last])


def test_parts_that_are_chosen_at_run_time_stay(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 6) - 5.5
    model = build(split("int64[3] {1, 2, 3}").replace("(parts, last)", "(parts, k)"))
    fold(model)
    infer_shapes(model)
    results = run(model, {"x": x, "k": np.array(1)})
    np.testing.assert_array_equal(results["z"], -x[:, 1:3])


def test_an_axis_of_unknown_size_is_not_split(build: Callable[[str], ir.Model]) -> None:
    model = build(split("int64 {1}", axis=0))
    fold(model)
    assert "SplitToSequence" in [node.op_type for node in model.graph]
