"""Float constants that a model keeps as buffers: frequencies, positions, centres and slopes.

Nobody trains them, but a file keeps them as it keeps weights. They are known by what they feed: a frequency
meets nothing but positions on its way into a sine; and by their numbers: positions and centres lie at equal
distances, the slopes that attention adds to distances (ALiBi) form a geometric series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.graph.values import ONNX_DOMAINS, ancestors, dtype_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["why_buffer"]

FREQUENCIES: Final = "frequencies: it meets only positions on its way into a sine"
SPACED: Final = "equally spaced numbers, as positions and centres are"
SLOPES: Final = "a geometric series that multiplies only positions"
TRIGONOMETRIC: Final = frozenset({"Sin", "Cos"})
PASSING: Final = frozenset(
    {"Add", "Cast", "CastLike", "Concat", "Div", "Einsum", "Expand", "Flatten", "Gather", "Gemm", "Identity"}
    | {"MatMul", "Mul", "Neg", "Pow", "Reciprocal", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Tile"}
    | {"Transpose", "Unsqueeze", "Where", "Exp"}
)
"""Operators of the arithmetic that makes angles of frequencies and positions."""
VIEWS: Final = frozenset(
    {"Cast", "CastLike", "Expand", "Identity", "Reshape", "Squeeze", "Tile", "Unsqueeze"}
)
COMPARING: Final = frozenset(
    {"Sub", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Floor", "Mod", "Clip"}
)
"""Operators that measure distances from positions or centres, of whatever."""
LEAST: Final = 4
"""Numbers from which a series is seen."""
STEP: Final = 1e-4
"""How far distances or ratios may be from equal, relative: they were rounded to float32 or less."""


def why_buffer(value: ir.Value, array: np.ndarray) -> str | None:
    """Return why a float constant of one or more dimensions is a buffer, None where nothing shows it."""
    if max(array.shape, default=0) != array.size:
        return None  # a matrix on the way into a sine may be a layer over coordinates
    if _feeds_angles(value):
        return FREQUENCIES
    numbers = array.astype(np.float64).reshape(-1)
    if numbers.size >= LEAST and np.all(np.isfinite(numbers)):
        if _is_spaced(numbers) and _meets(value, COMPARING):
            return SPACED
        if _is_geometric(numbers) and _meets(value, frozenset()):
            return SLOPES
    return None


def _feeds_angles(value: ir.Value) -> bool:
    """Say whether every way from a value leads into a sine or cosine, past positions and constants only."""
    stack, seen, reached = [value], {value}, False
    while stack:
        source = stack.pop()
        readers = [use.node for use in source.uses() if use.node.op_type not in ("Shape", "Size")]
        if source.is_graph_output() or not readers:
            return False
        for node in readers:
            if node.domain not in ONNX_DOMAINS:
                return False
            if node.op_type in TRIGONOMETRIC:
                reached = True
                continue
            others = [item for item in node.inputs if item is not None and item not in seen]
            if node.op_type not in PASSING or not all(map(_is_positional, others)):
                return False
            for output in node.outputs:
                if output not in seen:
                    seen.add(output)
                    stack.append(output)
    return reached


def _is_positional(value: ir.Value) -> bool:
    """Say whether a value comes from integers, shapes and constants alone: no float that a batch brings.

    A constant of two or more dimensions counts as a weight, unless its rows are at equal distances.
    """
    for source in ancestors([value]):
        if source.is_graph_input():
            dtype = dtype_of(source)
            if dtype is None or dtype.is_floating_point():
                return False
        tensor = source.const_value
        if (
            tensor is not None
            and tensor.dtype.is_floating_point()
            and sum(d > 1 for d in tensor.shape.numpy()) > 1
        ):
            return False
    return True


def _is_spaced(numbers: np.ndarray) -> bool:
    steps = np.diff(numbers)
    return bool(steps[0] != 0 and np.all(np.abs(steps - steps.mean()) <= STEP * np.abs(numbers).max()))


def _is_geometric(numbers: np.ndarray) -> bool:
    if np.any(numbers <= 0):
        return False
    steps = np.diff(np.log(numbers))
    return bool(abs(steps[0]) > STEP and np.all(np.abs(steps - steps.mean()) <= STEP))


def _meets(value: ir.Value, others_too: frozenset[str]) -> bool:
    """Say whether a value, behind views, is only read by `others_too`, or multiplied by positions."""
    stack = [value]
    while stack:
        source = stack.pop()
        if source.is_graph_output() or not source.uses():
            return False
        for node, _ in source.uses():
            if node.op_type in ("Shape", "Size"):
                continue
            if node.op_type in others_too:
                continue
            if node.op_type in VIEWS and node.domain in ONNX_DOMAINS:
                stack.extend(node.outputs)
                continue
            others = [item for item in node.inputs if item is not None and item is not source]
            if node.op_type not in ("Mul", "MatMul") or not others or not all(map(_is_positional, others)):
                return False
    return True
