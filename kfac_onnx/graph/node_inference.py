"""Types and shapes of a node's outputs, from those of its inputs: one small function per operator.

For nodes that are emitted one by one; whole graphs are inferred by ONNX (`graph.shapes`). What a function
cannot tell stays unknown: never a guess. A dimension is a number, the name of a symbolic one, or None. The
tests check all of it against ONNX's own inference.

Broadcasting: dimensions are aligned right; of two, 1 gives way, equal ones stay, a number other than 1 wins
over an unknown one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.operators import REDUCTIONS, SCATTERS, Trait, having
from kfac_onnx.graph.values import ONNX_DOMAINS, REMEMBERED, constant, dtype_of

__all__ = ["Dimensions", "describe_outputs", "dimensions_of", "numbers_of"]

Dimension: TypeAlias = int | str | None
Dimensions: TypeAlias = Sequence[Dimension]
Described: TypeAlias = "tuple[ir.DataType | None, Dimensions | None]"
"""Type and shape of one output."""
Rule: TypeAlias = "Callable[[ir.Node], Sequence[Described]]"

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
UNKNOWN: Described = (None, None)


def describe_outputs(node: ir.Node) -> None:
    """Give the outputs of a node the types and shapes that they lack, where they can be told.

    A type without a shape is remembered (`dtype_of` returns it) but not written: a file has no place for it.
    """
    rule = RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
    if rule is None:
        return
    for value, (dtype, dims) in zip(node.outputs, rule(node), strict=False):
        dtype = value.dtype or dtype
        if dims is None and value.shape is None:
            if dtype is not None:
                value.meta[REMEMBERED] = dtype
            continue
        if dtype is None:
            continue
        if value.shape is None and dims is not None:
            value.shape = ir.Shape(dims)
        if value.type is None:
            value.type = ir.TensorType(dtype)


def dimensions_of(value: ir.Value | None) -> list[Dimension] | None:
    """Return a value's dimensions, None without a rank."""
    if value is None:
        return None
    if value.const_value is not None:
        return [int(dim) for dim in value.const_value.shape.numpy()]
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def numbers_of(value: ir.Value | None) -> list[Dimension] | None:
    """Return the entries of a vector that holds dimensions: those that are known, None for others."""
    for _ in range(16):  # a vector of dimensions is a few nodes away from its sources
        array = constant(value)
        if array is not None:
            integer = array.ndim == 1 and array.dtype.kind in "iu"
            return [int(number) for number in array] if integer else None
        node = None if value is None else value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type == "Shape":
            dims = dimensions_of(node.inputs[0])
            start, end = _int(node, "start", 0), node.attributes.get("end")
            return None if dims is None else dims[start : None if end is None else end.as_int()]
        if node.op_type == "Concat":
            parts = [numbers_of(part) for part in node.inputs]
            return (
                None if None in parts else [number for part in parts if part is not None for number in part]
            )
        if node.op_type == "Slice":
            return _sliced_numbers(node)
        if node.op_type != "Identity":
            return None
        value = node.inputs[0]
    return None


def _sliced_numbers(node: ir.Node) -> list[Dimension] | None:
    numbers = numbers_of(node.inputs[0])
    start, end = (constant(_input(node, place)) for place in (1, 2))
    if numbers is None or start is None or end is None or start.size != 1 or end.size != 1:
        return None
    step = constant(_input(node, 4))
    if len(node.inputs) > 4 and node.inputs[4] is not None and (step is None or int(step.reshape(())) != 1):
        return None
    return numbers[int(start.reshape(())) : int(end.reshape(()))]


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    """Return a value's type where it is told; of an operator without a rule nothing is guessed."""
    if value is None:
        return None
    if value.dtype is not None or value.const_value is not None:
        return value.dtype or dtype_of(value)
    node = value.producer()
    return dtype_of(value) if node is not None and node.op_type in RULES else None


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _entries(array: np.ndarray) -> list[Dimension]:
    return [int(number) for number in array.reshape(-1)]


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _axes(node: ir.Node, rank: int, place: int = 1) -> list[int] | None:
    """Return the axes that an attribute or an input gives; None if unknown, [] if absent."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        axes = list(attribute.as_ints())
    elif _input(node, place) is None:
        return []
    else:
        array = constant(node.inputs[place])
        if array is None:
            return None
        axes = [int(axis) for axis in array.reshape(-1)]
    return [axis % rank if rank else 0 for axis in axes]


def _joined(one: Dimension, other: Dimension) -> Dimension:
    """Return the dimension that two give together when they are broadcast."""
    if one == 1:
        return other
    if other == 1 or one == other:
        return one
    if isinstance(one, int):
        return one
    return other if isinstance(other, int) else None


def broadcast(shapes: Sequence[Dimensions | None]) -> list[Dimension] | None:
    """Return the shape that several give together, None if the rank of one is unknown."""
    result: list[Dimension] = []
    for dims in shapes:
        if dims is None:
            return None
        longer = max(len(result), len(dims))
        left = [1] * (longer - len(result)) + result
        right = [1] * (longer - len(dims)) + list(dims)
        result = [_joined(one, other) for one, other in zip(left, right, strict=True)]
    return result


def _same(node: ir.Node) -> list[Described]:
    """Type and shape of the first input."""
    return [(_dtype(node.inputs[0]), dimensions_of(node.inputs[0]))]


def _truths(node: ir.Node) -> list[Described]:
    """Bool of the shape of the first input."""
    return [(BOOL, dimensions_of(node.inputs[0]))]


def _broadcast(node: ir.Node) -> list[Described]:
    return [(_dtype(node.inputs[0]), broadcast([dimensions_of(value) for value in node.inputs]))]


def _comparison(node: ir.Node) -> list[Described]:
    return [(BOOL, broadcast([dimensions_of(value) for value in node.inputs]))]


def _where(node: ir.Node) -> list[Described]:
    dtype = _dtype(node.inputs[1]) or _dtype(node.inputs[2])
    return [(dtype, broadcast([dimensions_of(value) for value in node.inputs]))]


def _cast(node: ir.Node) -> list[Described]:
    return [(ir.DataType(_int(node, "to", 0)), dimensions_of(node.inputs[0]))]


def _cast_like(node: ir.Node) -> list[Described]:
    return [(_dtype(node.inputs[1]), dimensions_of(node.inputs[0]))]


def _shape(node: ir.Node) -> list[Described]:
    dims = dimensions_of(node.inputs[0])
    if dims is None:
        return [(INT64, [None])]
    end = node.attributes.get("end")
    return [(INT64, [len(dims[_int(node, "start", 0) : None if end is None else end.as_int()])])]


def _size(_: ir.Node) -> list[Described]:
    return [(INT64, [])]


def _constant(node: ir.Node) -> list[Described]:
    value = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(value)
    return [UNKNOWN] if tensor is None else [(tensor.dtype, [int(dim) for dim in tensor.shape.numpy()])]


def _constant_of_shape(node: ir.Node) -> list[Described]:
    fill = node.attributes.get("value")
    dtype = ir.DataType.FLOAT if fill is None else fill.as_tensor().dtype
    return [(dtype, _wanted(node.inputs[0]))]


def _wanted(shape: ir.Value | None) -> list[Dimension] | None:
    """Return the dimensions that a vector asks for; where they are unknown, how many there are."""
    numbers = numbers_of(shape)
    if numbers is not None:
        return numbers
    length = dimensions_of(shape)
    if not length or not isinstance(length[0], int):
        return None
    unknown: list[Dimension] = [None]
    return unknown * length[0]


def _expand(node: ir.Node) -> list[Described]:
    wanted = _wanted(node.inputs[1])
    return [(_dtype(node.inputs[0]), broadcast([dimensions_of(node.inputs[0]), wanted]))]


def _reshape(node: ir.Node) -> list[Described]:
    dims, wanted = dimensions_of(node.inputs[0]), _wanted(node.inputs[1])
    dtype = _dtype(node.inputs[0])
    if wanted is None:
        return [(dtype, None)]
    if not _int(node, "allowzero", 0):
        wanted = [
            dim if dim != 0 else dims[place] if dims is not None and place < len(dims) else None
            for place, dim in enumerate(wanted)
        ]
    if -1 in wanted:
        others = [dim for dim in wanted if dim != -1]
        size = None if dims is None else _product(dims)
        rest = _product(others)
        own = size // rest if size is not None and rest else None
        wanted = [own if dim == -1 else dim for dim in wanted]
    return [(dtype, wanted)]


def _product(dims: Dimensions) -> int | None:
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return int(np.prod(numbers, dtype=np.int64)) if len(numbers) == len(dims) else None


def _transpose(node: ir.Node) -> list[Described]:
    dims, order = dimensions_of(node.inputs[0]), node.attributes.get("perm")
    dtype = _dtype(node.inputs[0])
    if dims is None:
        return [(dtype, None)]
    if order is None:
        return [(dtype, dims[::-1])]
    return [(dtype, [dims[axis] for axis in order.as_ints()])]


def _unsqueeze(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    axes = constant(_input(node, 1))
    if dims is None or axes is None:
        return [(dtype, None)]
    rank = len(dims) + axes.size
    new = {int(axis) % rank for axis in axes.reshape(-1)}
    rest = iter(dims)
    return [(dtype, [1 if axis in new else next(rest) for axis in range(rank)])]


def _squeeze(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    axes = None if dims is None else _axes(node, len(dims))
    if dims is None or axes is None:
        return [(dtype, None)]
    if _input(node, 1) is None:
        if not all(isinstance(dim, int) for dim in dims):
            return [(dtype, None)]
        return [(dtype, [dim for dim in dims if dim != 1])]
    return [(dtype, [dim for axis, dim in enumerate(dims) if axis not in axes])]


def _flatten(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    if dims is None:
        return [(dtype, [None, None])]
    axis = _int(node, "axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return [(dtype, [_product(dims[:axis]), _product(dims[axis:])])]


def _concat(node: ir.Node) -> list[Described]:
    shapes = [dimensions_of(value) for value in node.inputs]
    dtype = next((kind for value in node.inputs if (kind := _dtype(value)) is not None), None)
    known = [dims for dims in shapes if dims is not None]
    if len(known) < len(shapes):
        return [(dtype, None)]
    if not known[0] or any(len(dims) != len(known[0]) for dims in known):
        return [(dtype, None)]
    axis = _int(node, "axis", 0) % len(known[0])
    result: list[Dimension] = []
    for place, dims in enumerate(zip(*known, strict=True)):
        if place == axis:
            result.append(_total(dims))
        else:
            result.append(next((dim for dim in dims if isinstance(dim, int)), dims[0]))
    return [(dtype, result)]


def _total(dims: Dimensions) -> Dimension:
    if len(dims) == 1:
        return dims[0]
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return sum(numbers) if len(numbers) == len(dims) else None


def _split(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    count = len(node.outputs)
    if dims is None:
        return [(dtype, None)] * count
    axis = _int(node, "axis", 0) % len(dims)
    lengths, whole = constant(_input(node, 1)), dims[axis]
    unknown: list[Dimension] = [None]
    sizes = unknown * count
    if lengths is not None and lengths.size == count:
        sizes = _entries(lengths)
    elif _input(node, 1) is None and isinstance(whole, int):
        most = -(-whole // count)
        sizes = [*[most] * (count - 1), whole - most * (count - 1)]
    return [(dtype, [*dims[:axis], size, *dims[axis + 1 :]]) for size in sizes]


def _slice(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    if dims is None:
        return [(dtype, None)]
    starts, ends = (constant(_input(node, place)) for place in (1, 2))
    axes, steps = (constant(_input(node, place)) for place in (3, 4))
    result = list(dims)
    if axes is None and _input(node, 3) is not None:
        return [(dtype, [None] * len(dims))]
    count = 0 if starts is None else starts.size
    places = range(count) if axes is None else [int(axis) % len(dims) for axis in axes.reshape(-1)]
    if starts is None or ends is None or (steps is None and _input(node, 4) is not None):
        cut = range(len(dims)) if axes is None else places
        return [(dtype, [None if place in cut else dim for place, dim in enumerate(dims)])]
    for number, place in enumerate(places):
        whole = dims[place]
        start, end = int(starts.reshape(-1)[number]), int(ends.reshape(-1)[number])
        step = 1 if steps is None else int(steps.reshape(-1)[number])
        result[place] = len(range(whole)[start:end:step]) if isinstance(whole, int) else None
    return [(dtype, result)]


def _gather(node: ir.Node) -> list[Described]:
    dims, places = dimensions_of(node.inputs[0]), dimensions_of(node.inputs[1])
    dtype = _dtype(node.inputs[0])
    if dims is None or places is None:
        return [(dtype, None)]
    axis = _int(node, "axis", 0) % len(dims)
    return [(dtype, [*dims[:axis], *places, *dims[axis + 1 :]])]


def _gather_elements(node: ir.Node) -> list[Described]:
    return [(_dtype(node.inputs[0]), dimensions_of(node.inputs[1]))]


def _gather_nd(node: ir.Node) -> list[Described]:
    dims, places = dimensions_of(node.inputs[0]), dimensions_of(node.inputs[1])
    dtype, batch = _dtype(node.inputs[0]), _int(node, "batch_dims", 0)
    if dims is None or not places or not isinstance(places[-1], int):
        return [(dtype, None)]
    return [(dtype, [*places[:-1], *dims[batch + places[-1] :]])]


def _matmul(node: ir.Node) -> list[Described]:
    left, right = (dimensions_of(value) for value in node.inputs[:2])
    dtype = _dtype(node.inputs[0]) or _dtype(node.inputs[1])
    if not left or not right:
        return [(dtype, None)]
    batch = broadcast([left[:-2], right[:-2]])
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else []
    return [(dtype, [*(batch or []), *rows, *columns])]


def _gemm(node: ir.Node) -> list[Described]:
    left, right = (dimensions_of(value) for value in node.inputs[:2])
    dtype = _dtype(node.inputs[0]) or _dtype(node.inputs[1])
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return [(dtype, [None, None])]
    return [(dtype, [left[_int(node, "transA", 0)], right[1 - _int(node, "transB", 0)]])]


def _reduction(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    if dims is None:
        return [(dtype, None)]
    axes, keep = _axes(node, len(dims)), _int(node, "keepdims", 1)
    if axes is None:
        return [(dtype, [None] * len(dims) if keep else None)]
    if not axes:
        if _int(node, "noop_with_empty_axes", 0):
            return [(dtype, dims)]
        axes = list(range(len(dims)))
    if keep:
        return [(dtype, [1 if axis in axes else dim for axis, dim in enumerate(dims)])]
    return [(dtype, [dim for axis, dim in enumerate(dims) if axis not in axes])]


def _arg_reduction(node: ir.Node) -> list[Described]:
    dims = dimensions_of(node.inputs[0])
    if dims is None:
        return [(INT64, None)]
    axis = _int(node, "axis", 0) % len(dims)
    rest: list[Dimension] = [1] if _int(node, "keepdims", 1) else []
    return [(INT64, [*dims[:axis], *rest, *dims[axis + 1 :]])]


def _top_k(node: ir.Node) -> list[Described]:
    dims, dtype = dimensions_of(node.inputs[0]), _dtype(node.inputs[0])
    if dims is None:
        return [(dtype, None), (INT64, None)]
    count, axis = constant(node.inputs[1]), _int(node, "axis", -1) % len(dims)
    chosen = None if count is None or count.size != 1 else int(count.reshape(()))
    shape = [*dims[:axis], chosen, *dims[axis + 1 :]]
    return [(dtype, shape), (INT64, shape)]


def _range(node: ir.Node) -> list[Described]:
    ends = [constant(value) for value in node.inputs]
    dtype = next((kind for value in node.inputs if (kind := _dtype(value)) is not None), None)
    known = [float(end.reshape(())) for end in ends if end is not None and end.size == 1]
    if len(known) < 3 or known[2] == 0:
        return [(dtype, [None])]
    return [(dtype, [max(int(np.ceil((known[1] - known[0]) / known[2])), 0)])]


def _non_zero(node: ir.Node) -> list[Described]:
    dims = dimensions_of(node.inputs[0])
    return [(INT64, [None, None] if dims is None else [len(dims), None])]


def _one_hot(node: ir.Node) -> list[Described]:
    places, depth = dimensions_of(node.inputs[0]), constant(node.inputs[1])
    dtype = _dtype(node.inputs[2])
    if places is None:
        return [(dtype, None)]
    axis = _int(node, "axis", -1) % (len(places) + 1)
    size = None if depth is None or depth.size != 1 else int(depth.reshape(()))
    return [(dtype, [*places[:axis], size, *places[axis:]])]


def _tile(node: ir.Node) -> list[Described]:
    dims, times = dimensions_of(node.inputs[0]), constant(node.inputs[1])
    dtype = _dtype(node.inputs[0])
    if dims is None:
        return [(dtype, None)]
    counts: list[int | None] = [None] * len(dims) if times is None else [int(number) for number in times]
    return [
        (
            dtype,
            [
                dim * count if isinstance(dim, int) and count is not None else dim if count == 1 else None
                for dim, count in zip(dims, counts, strict=True)
            ],
        )
    ]


def _dropout(node: ir.Node) -> list[Described]:
    dims = dimensions_of(node.inputs[0])
    return [(_dtype(node.inputs[0]), dims), (BOOL, dims)]


_UNARY: Final = having(Trait.ELEMENTWISE) - having(Trait.BROADCASTS)
_BROADCAST: Final = having(Trait.ELEMENTWISE | Trait.BROADCASTS)
_BOOLEAN: Final = having(Trait.BOOLEAN)
RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(_UNARY - _BOOLEAN, _same),
    **dict.fromkeys(_UNARY & _BOOLEAN, _truths),
    **dict.fromkeys(_BROADCAST - _BOOLEAN, _broadcast),
    **dict.fromkeys(_BROADCAST & _BOOLEAN, _comparison),
    **dict.fromkeys(SCATTERS, _same),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "ArgMax": _arg_reduction,
    "ArgMin": _arg_reduction,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _same,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Hardmax": _same,
    "LogSoftmax": _same,
    "MatMul": _matmul,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Softmax": _same,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _same,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""Operator -> what its outputs are."""
