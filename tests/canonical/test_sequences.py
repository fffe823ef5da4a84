"""Splits through a sequence, as PyTorch's unoptimized exports write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.sequences import split_without_sequences
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

X = np.arange(12, dtype=np.float32).reshape(2, 6) - 5.5


def graph(split: str, axis: int = 1) -> str:
    return f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[B, 6] x, int64 k) => (float[B, N] y, float[B, M] z) {{
            lengths = Constant <value = {split}> ()
            first = Constant <value = int64 {{0}}> ()
            last = Constant <value = int64 {{-1}}> ()
            parts = SplitToSequence <axis = {axis}> (x, lengths)
            y = SequenceAt (parts, first)
            end = SequenceAt (parts, last)
            z = Neg (end)
        }}"""


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("int64[3] {1, 2, 3}", slice(0, 1), slice(3, 6)), ("int64 {4}", slice(0, 4), slice(4, 6))],
)
@pytest.mark.parametrize("batch", ["2", "B"])
def test_known_parts_become_a_split(
    split: str,
    first: slice,
    last: slice,
    batch: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
) -> None:
    model = build(graph(split).replace("float[B, 6]", f"float[{batch}, 6]"))
    assert split_without_sequences(model) == 1
    assert not [node for node in model.graph if "Sequence" in node.op_type]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    infer_shapes(model)
    results = run(model, {"x": X, "k": np.array(0)})
    np.testing.assert_array_equal(results["y"], X[:, first])
    np.testing.assert_array_equal(results["z"], -X[:, last])


def test_other_sequences_stay_and_keep_their_kind(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build(graph("int64[3] {1, 2, 3}").replace("(parts, last)", "(parts, k)"))
    assert split_without_sequences(model) == 0
    infer_shapes(model)
    results = run(model, {"x": X, "k": np.array(1)})
    np.testing.assert_array_equal(results["z"], -X[:, 1:3])


def test_an_axis_of_unknown_size_is_not_split(build: Callable[[str], ir.Model]) -> None:
    model = build(graph("int64 {1}", axis=0))
    assert split_without_sequences(model) == 0
