"""Products with a one-hot matrix, read as lookups and scatters.

With E[n, v] = 1 where ids[n] = v, E·W reads the rows `ids` of W, and Eᵀ·g scatters the rows of g. A
product may be MatMul, Gemm, FusedMatMul or Einsum; `contraction` writes it as an equation of axis labels, in
which a Transpose of an operand is only another order of its labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kfac_onnx.graph.values import int_attribute, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = [
    "Contraction",
    "OneHot",
    "Operand",
    "Scattering",
    "contraction",
    "one_hot",
    "reading",
    "scattering",
]

Labels: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor with one label for each of its axes; axes of the same label are summed over together."""

    value: ir.Value
    labels: Labels


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors: `result` are the labels that are left, in order; the others are summed."""

    operands: tuple[Operand, Operand]
    result: Labels


@dataclass(frozen=True)
class OneHot:
    """A tensor that is 1 where its entry along `axis` is the id, and 0 elsewhere.

    `ids` has the tensor's other axes in order (or 1 in the place of `axis`). `wraps` says that -1 means the
    last class; every other id that is no class makes zeros alone.
    """

    ids: ir.Value
    axis: int
    wraps: bool


@dataclass(frozen=True)
class Scattering:
    """The sum of rows by their ids: `axis` of the result are the classes.

    `updates`, transposed to `order`, has one axis for each of the ids' and then the columns.
    """

    encoded: OneHot
    updates: ir.Value
    axis: int
    order: tuple[int, ...]


def contraction(node: ir.Node) -> Contraction | None:
    """Return a matrix product or Einsum of two operands as an equation, otherwise None."""
    one, other = (*node.inputs, None, None)[:2]
    if one is None or other is None or one.shape is None or other.shape is None:
        return None
    match node.op_type:
        case "Einsum":
            found = _einsum(node, one, other)
        case "MatMul":
            found = _matmul(one, other)
        case "Gemm" | "FusedMatMul":
            found = _gemm(node, one, other)
        case _:
            found = None
    if found is None:
        return None
    first, second = found.operands
    return replace(found, operands=(_untransposed(first), _untransposed(second)))


def _einsum(node: ir.Node, one: ir.Value, other: ir.Value) -> Contraction | None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != 2 or len(node.inputs) != 2:
        return None
    if any(len(set(labels)) != len(labels) for labels in (*terms, result)):
        return None
    return Contraction((Operand(one, tuple(terms[0])), Operand(other, tuple(terms[1]))), tuple(result))


def _matmul(one: ir.Value, other: ir.Value) -> Contraction | None:
    ranks = len(one.shape or ()), len(other.shape or ())
    if min(ranks) < 1 or (ranks[1] > 2 and ranks[0] > 2 and not _same_batch(one, other)):
        return None
    batch = tuple(f"batch {index}" for index in range(max(*ranks, 2) - 2))
    left = (*batch[: max(ranks[0] - 2, 0)], "row", "inner") if ranks[0] > 1 else ("inner",)
    right = (*batch[: max(ranks[1] - 2, 0)], "inner", "column") if ranks[1] > 1 else ("inner",)
    result = (*batch, *(label for label in ("row", "column") if label in left + right))
    return Contraction((Operand(one, left), Operand(other, right)), result)


def _same_batch(one: ir.Value, other: ir.Value) -> bool:
    """Say whether two tensors have as many axes, but for the last two, and none is broadcast.

    Two dimensions that no number is known of are taken for equal: if one of them were broadcast, there
    would be another number of rows than of ids, and the scatter would fail.
    """
    first, second = list(one.shape or ())[:-2], list(other.shape or ())[:-2]
    return len(first) == len(second) and all(
        a == b or not (isinstance(a, int) or isinstance(b, int)) for a, b in zip(first, second, strict=True)
    )


def _gemm(node: ir.Node, one: ir.Value, other: ir.Value) -> Contraction | None:
    scale, shift = node.attributes.get("alpha"), node.attributes.get("beta")
    bias = len(node.inputs) > 2 and node.inputs[2] is not None
    ranks = {len(one.shape or ()), len(other.shape or ())}
    if ranks != {2} or (scale is not None and scale.as_float() != 1.0):
        return None
    if bias and (shift is None or shift.as_float() != 0.0):
        return None
    left = ("inner", "row") if int_attribute(node, "transA", 0) else ("row", "inner")
    right = ("column", "inner") if int_attribute(node, "transB", 0) else ("inner", "column")
    return Contraction((Operand(one, left), Operand(other, right)), ("row", "column"))


def _untransposed(operand: Operand) -> Operand:
    """Return what an operand is the transpose of, its labels in that order."""
    node = operand.value.producer()
    while node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        rank = len(operand.labels)
        perm = node.attributes.get("perm")
        order = list(range(rank))[::-1] if perm is None else list(perm.as_ints())
        operand = Operand(node.inputs[0], tuple(operand.labels[order.index(axis)] for axis in range(rank)))
        node = operand.value.producer()
    return operand


def one_hot(value: ir.Value | None, facts: Facts) -> OneHot | None:
    """Return what a value is the one-hot encoding of, otherwise None."""
    rank = None if value is None or value.shape is None else len(value.shape)
    while value is not None and rank is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in ("Cast", "Identity"):
            value = node.inputs[0]
        elif node.op_type in ("Reshape", "Flatten"):
            source = node.inputs[0]
            found = one_hot(source, facts) if _same_last(source, value) else None
            last = None if found is None or source is None else len(source.shape or ()) - 1
            return None if found is None or found.axis != last else replace(found, axis=rank - 1)
        elif node.op_type == "Where":
            if facts.scalar(node.inputs[1]) != 1 or facts.scalar(node.inputs[2]) != 0:
                return None
            value = node.inputs[0]
        elif node.op_type == "OneHot":
            values = facts.constant(node.inputs[2])
            ids, axis = node.inputs[0], int_attribute(node, "axis", -1) % rank
            plain = values is not None and values.tolist() == [0, 1]
            return OneHot(ids, axis, wraps=True) if plain and ids is not None else None
        elif node.op_type == "Equal":
            return _equal_to_arange(node, rank, facts)
        else:
            return None
    return None


def _same_last(source: ir.Value | None, value: ir.Value) -> bool:
    if source is None or source.shape is None or value.shape is None or not len(source.shape):
        return False
    return source.shape[-1] == value.shape[-1]


def _equal_to_arange(node: ir.Node, rank: int, facts: Facts) -> OneHot | None:
    """Match ids == 0, 1, .., V - 1, where the classes lie along one axis on which the ids do not vary."""
    for one, other in ((0, 1), (1, 0)):
        line, ids = _unexpanded(node.inputs[one]), _unexpanded(node.inputs[other])
        classes = facts.constant(line)
        if classes is None or ids is None or ids.shape is None or len(ids.shape) != rank:
            continue
        padded = (1,) * (rank - classes.ndim) + classes.shape
        if max(padded, default=0) != classes.size or classes.ndim > rank:
            continue
        axis = padded.index(classes.size)
        if not _varies_elsewhere(ids, node.outputs[0], axis):
            continue
        if classes.size > 1 and np.array_equal(classes.reshape(-1), np.arange(classes.size)):
            return OneHot(ids, axis, wraps=False)
    return None


def _varies_elsewhere(ids: ir.Value, result: ir.Value, axis: int) -> bool:
    """Say whether integer ids have one entry for each of the result's, but for the axis of the classes."""
    if ids.dtype is None or not ids.dtype.is_integer() or ids.shape is None or result.shape is None:
        return False
    own, full = list(ids.shape), list(result.shape)
    return own.pop(axis) == 1 and (full.pop(axis), own == full)[1]


def _unexpanded(value: ir.Value | None) -> ir.Value | None:
    """Return what is broadcast to a value without new axes."""
    node = None if value is None else value.producer()
    while value is not None and node is not None and node.op_type in ("Expand", "Identity"):
        source = node.inputs[0]
        if source is None or source.shape is None or value.shape is None:
            break
        if len(source.shape) != len(value.shape):
            break
        value, node = source, source.producer()
    return value


def scattering(node: ir.Node, facts: Facts) -> Scattering | None:
    """Return what the product of a node adds up, if it is that of one-hot rows with rows to add."""
    found = _summed(node, facts)
    if found is None or len(found.result) != 2:
        return None
    for index in (0, 1):
        hot, updates = found.operands[index], found.operands[1 - index]
        encoded = one_hot(hot.value, facts)
        if encoded is None:
            continue
        rows = [label for axis, label in enumerate(hot.labels) if axis != encoded.axis]
        classes = hot.labels[encoded.axis]
        column = [label for label in found.result if label != classes]
        if classes not in found.result or set(rows) & set(found.result):
            continue
        if sorted(updates.labels) == sorted([*rows, *column]):
            order = tuple(updates.labels.index(label) for label in (*rows, *column))
            return Scattering(encoded, updates.value, found.result.index(classes), order)
    return None


def _summed(node: ir.Node, facts: Facts) -> Contraction | None:
    """Return a product, or the sum of a batch of products, as one equation."""
    if node.op_type != "ReduceSum":
        return contraction(node)
    source = None if node.inputs[0] is None else node.inputs[0].producer()
    axes = facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    found = None if source is None else contraction(source)
    if found is None or axes is None or int_attribute(node, "keepdims", 1):
        return None
    gone = {int(axis) % len(found.result) for axis in axes.reshape(-1)}
    return replace(found, result=tuple(label for axis, label in enumerate(found.result) if axis not in gone))


def reading(node: ir.Node, index: int, facts: Facts) -> tuple[OneHot, int] | None:
    """Return what one-hot rows a node multiplies its input `index` with, and how many rows that table has."""
    found = contraction(node)
    if found is None or index > 1:
        return None
    table, hot = found.operands[index], found.operands[1 - index]
    shape, encoded = static_shape(table.value), one_hot(hot.value, facts)
    if encoded is None or shape is None or len(table.labels) != 2:
        return None
    classes = hot.labels[encoded.axis]
    wanted = {label for label in (*hot.labels, *table.labels) if label != classes}
    if classes not in table.labels or set(found.result) != wanted or len(wanted) != len(hot.labels):
        return None
    return encoded, shape[table.labels.index(classes)]
