"""Backward: from a table's gradient through views to the operators that scatter rows into it.

A gradient is a sum of terms. Each term is a chain of views (`ViewStep`, nearest to the gradient first) that
ends in rows with their ids (`RowTerm`) or in a tensor that is dense in the table (`DenseTerm`). Pulling
the chain back over the rows instead of over the table is what makes a step cost O(lookups).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.graph.operators import VIEWS, Trait, having
from kfac_onnx.graph.values import int_attribute, static_shape
from kfac_onnx.tables.lookups import slice_window, unexpanded
from kfac_onnx.tables.masks import drop_mask
from kfac_onnx.tables.one_hot import scattering
from kfac_onnx.tables.terms import DenseTerm, RowStep, RowTerm, ViewStep

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = [
    "SCATTERS",
    "adds_into_zeros",
    "gradient_terms",
    "other_operand",
    "placed_rows",
    "view_step",
]


def gradient_terms(gradient: ir.Value, facts: Facts) -> list[RowTerm | DenseTerm]:
    """Split a table's gradient into its terms."""
    terms: list[RowTerm | DenseTerm] = []
    stack: list[tuple[ir.Value, tuple[ViewStep, ...]]] = [(gradient, ())]
    while stack:
        value, steps = stack.pop()
        node = value.producer()
        if node is None or facts.is_forward(node):
            terms.append(DenseTerm(steps, value))
            continue
        if node.op_type in ("Add", "Sum"):
            shape = static_shape(value)
            if all(static_shape(item) == shape for item in node.inputs):
                stack.extend((item, steps) for item in node.inputs if item is not None)
                continue
        if node.op_type == "Concat" and (parts := _joined_parts(node)) is not None:
            stack.extend((item, (*steps, view)) for item, view in parts)
            continue
        placed = placed_rows(node, facts)
        rule = SCATTERS.get(node.op_type) if placed is None else None
        term = rule(node, steps, facts) if rule is not None else None
        if term is not None:
            terms.append(term)
            continue
        view = placed if placed is not None else view_step(node, value, facts)
        if view is not None:
            if placed is not None:
                source = node.inputs[2]
            else:
                source = node.inputs[0] if view.operand is None else other_operand(node, view.operand)
            if source is not None:
                stack.append((source, (*steps, view)))
                continue
        terms.append(DenseTerm(steps, value))
    return terms[::-1]


def _joined_parts(node: ir.Node) -> list[tuple[ir.Value, ViewStep]] | None:
    """Return the inputs of a Concat, each as a tensor that zeros are added before and after."""
    shapes = [static_shape(item) for item in node.inputs]
    whole = static_shape(node.outputs[0])
    if whole is None or any(shape is None for shape in shapes):
        return None
    axis = int_attribute(node, "axis", 0) % len(whole)
    parts: list[tuple[ir.Value, ViewStep]] = []
    start = 0
    for item, shape in zip(node.inputs, shapes, strict=True):
        if item is None or shape is None:
            return None
        stop = start + shape[axis]
        parts.append((item, ViewStep(node, "Pad", window=(axis, start, whole[axis] - stop))))
        start = stop
    return parts


def other_operand(node: ir.Node, operand: ir.Value) -> ir.Value | None:
    """Return the input of a scaling that is not its factor."""
    return next((item for item in node.inputs if item is not operand), None)


def placed_rows(node: ir.Node, facts: Facts) -> ViewStep | None:
    """Match a scatter that puts its rows at constant consecutive places: that is a Pad of the rows."""
    if node.op_type not in having(Trait.SCATTER) or not adds_into_zeros(node, facts):
        return None
    shape, fixed = static_shape(node.outputs[0]), facts.constant(node.inputs[1])
    if shape is None or len(shape) != 2 or fixed is None or fixed.size == 0:
        return None
    axis = 0
    if node.op_type == "ScatterElements":
        axis = int_attribute(node, "axis", 0) % 2
        fixed = np.moveaxis(fixed, axis, 0)
        if np.any(fixed != fixed[:, :1]) or fixed.shape[1] != shape[1 - axis]:
            return None
        fixed = fixed[:, 0]
    elif fixed.shape[-1] != 1:
        return None
    places = fixed.reshape(-1)
    first = int(places[0])
    if first < 0 or not np.array_equal(places, np.arange(first, first + places.size)):
        return None
    return ViewStep(node, "Pad", window=(axis, first, shape[axis] - first - places.size))


def view_step(node: ir.Node, value: ir.Value, facts: Facts) -> ViewStep | None:
    """Return the operator that makes `value` as a view of a gradient, otherwise None."""
    match node.op_type:
        case op if op in VIEWS or op == "Neg":
            return ViewStep(node, node.op_type)
        case "Expand":
            same = static_shape(node.inputs[0]) == static_shape(value) is not None
            return ViewStep(node, "Identity") if same else None
        case "Slice":
            window = slice_window(node, facts)
            return None if window is None else ViewStep(node, "Slice", window=window[:3])
        case "Split":
            window = _split_window(node, value, facts)
            return None if window is None else ViewStep(node, "Slice", window=window)
        case "Mul" | "Div":
            return _scaling_step(node, value, facts)
        case "Pad":
            window = pad_window(node, facts)
            return None if window is None else ViewStep(node, "Pad", window=window)
        case _:
            return None


def _scaling_step(node: ir.Node, value: ir.Value, facts: Facts) -> ViewStep | None:
    """Match table · factor, where the factor is the smaller operand (or a parameter, or a constant)."""
    shape = static_shape(value)
    sizes = [static_shape(item) for item in node.inputs]
    if shape is None or any(size is None for size in sizes):
        return None
    order = (1,) if node.op_type == "Div" else (1, 0)
    for index in order:
        operand, table = node.inputs[index], sizes[1 - index]
        if table == shape and np.prod(sizes[index] or (1,)) < np.prod(shape):
            return ViewStep(node, node.op_type, operand=operand)
    return None


def _split_window(node: ir.Node, value: ir.Value, facts: Facts) -> tuple[int, int, int] | None:
    source = static_shape(node.inputs[0])
    if source is None:
        return None
    axis = int_attribute(node, "axis", 0) % len(source)
    lengths = facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if lengths is None:
        sizes = [static_shape(item) for item in node.outputs]
        known = [size[axis] for size in sizes if size is not None]
        if len(known) != len(sizes):
            return None
        lengths = np.asarray(known)
    index = next(i for i, item in enumerate(node.outputs) if item is value)
    start = int(lengths[:index].sum())
    return axis, start, start + int(lengths[index])


def pad_window(node: ir.Node, facts: Facts) -> tuple[int, int, int] | None:
    """Return (axis, before, after) of a zero Pad along one axis, otherwise None."""
    source, pads = static_shape(node.inputs[0]), facts.constant(node.inputs[1])
    fill = facts.scalar(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
    mode = node.attributes.get("mode")
    if source is None or pads is None or fill != 0.0 or (mode is not None and mode.as_string() != "constant"):
        return None
    axes = list(range(len(source)))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        chosen = facts.constant(node.inputs[3])
        if chosen is None:
            return None
        axes = [int(axis) % len(source) for axis in chosen.reshape(-1)]
    before, after = pads.reshape(2, -1)
    padded = [i for i in range(len(axes)) if before[i] or after[i]]
    if not padded:
        return axes[0], 0, 0
    if len(padded) > 1:
        return None
    return axes[padded[0]], int(before[padded[0]]), int(after[padded[0]])


def _reduction(node: ir.Node) -> str:
    found = node.attributes.get("reduction")
    return "none" if found is None else found.as_string()


def adds_into_zeros(node: ir.Node, facts: Facts) -> bool:
    """Say whether a scatter adds into zeros, or writes into them and names no place twice."""
    if not facts.is_zeros(node.inputs[0]):
        return False
    if _reduction(node) == "add":
        return True
    fixed = facts.constant(node.inputs[1])
    return _reduction(node) == "none" and fixed is not None and len(np.unique(fixed)) == fixed.size


def _scatter_nd(node: ir.Node, steps: tuple[ViewStep, ...], facts: Facts) -> RowTerm | None:
    indices, updates, shape = node.inputs[1], node.inputs[2], static_shape(node.outputs[0])
    if indices is None or updates is None or shape is None or not 1 <= len(shape) <= 2:
        return None
    if indices.shape is None or indices.shape[-1] != 1 or not adds_into_zeros(node, facts):
        return None
    fixed = facts.constant(indices)
    return RowTerm(
        steps,
        "ScatterND",
        indices,
        updates,
        axis=0,
        columns=False,
        shape=shape,
        mask=drop_mask(updates, facts),
        fixed=None if fixed is None else tuple(int(item) for item in fixed.reshape(-1)),
    )


def _scatter_elements(node: ir.Node, steps: tuple[ViewStep, ...], facts: Facts) -> RowTerm | None:
    indices, updates, shape = node.inputs[1], node.inputs[2], static_shape(node.outputs[0])
    if indices is None or updates is None or shape is None or not 1 <= len(shape) <= 2:
        return None
    if _reduction(node) != "add" or not facts.is_zeros(node.inputs[0]):
        return None
    axis = int_attribute(node, "axis", 0) % len(shape)
    if len(shape) == 2:
        column = unexpanded(indices, 1 - axis)
        if column is None:
            return None
        indices = column
    fixed = facts.constant(indices)
    return RowTerm(
        steps,
        "ScatterElements",
        indices,
        updates,
        axis=axis,
        columns=len(shape) == 2,
        shape=shape,
        mask=drop_mask(updates, facts),
        fixed=None if fixed is None else tuple(int(item) for item in fixed.reshape(-1)),
    )


def _one_hot_product(node: ir.Node, steps: tuple[ViewStep, ...], facts: Facts) -> RowTerm | None:
    """Match one_hotᵀ · rows, as any product of the two."""
    found, shape = scattering(node, facts), static_shape(node.outputs[0])
    if found is None or shape is None or len(shape) != 2:
        return None
    size = shape[found.axis]
    wrap = (RowStep("wrap", stop=size),) if found.encoded.wraps else ()
    plain = found.order == tuple(range(len(found.order)))
    return RowTerm(
        steps,
        node.op_type,
        found.encoded.ids,
        found.updates,
        axis=found.axis,
        columns=False,
        shape=shape,
        order=None if plain else found.order,
        before=(*wrap, RowStep("window", start=0, stop=size)),
    )


SCATTERS: Final[dict[str, Callable[[ir.Node, tuple[ViewStep, ...], Facts], RowTerm | None]]] = {
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "MatMul": _one_hot_product,
    "Gemm": _one_hot_product,
    "FusedMatMul": _one_hot_product,
    "Einsum": _one_hot_product,
    "ReduceSum": _one_hot_product,
}
