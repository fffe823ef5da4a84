"""Forward: from a trained table through views to every operator that uses it.

A *lookup* reads rows: `Gather`, `GatherND`, `GatherElements`, one-hot · MatMul, or a `Slice` whose rows are
added to activations (a position table). Every other use is a *dense use*, for example the output
projection of tied weights. One rule per operator; a rule looks and never edits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kfac_onnx.canonical.loops.orders import permutation
from kfac_onnx.graph.operators import ORDERED_VIEWS, SIZES, VIEWS, Keeps, Trait, having, keeping
from kfac_onnx.graph.values import int_attribute, static_shape
from kfac_onnx.metadata import Use
from kfac_onnx.tables.one_hot import reading

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = [
    "READERS",
    "RESHAPES",
    "SCALINGS",
    "TABLE_VIEWS",
    "DenseUse",
    "Lookup",
    "Uses",
    "adds_to_activations",
    "forward_uses",
    "ids_chain",
    "is_view",
    "is_weight_of_product",
    "keeps_every_id",
]

TABLE_VIEWS: Final = VIEWS | {"Concat"}
"""Operators after which a table is still that table, seen differently, perhaps beside another."""

SCALINGS: Final = having(Trait.SCALES)
"""Views too, where the other operand scales the whole table, its columns or its rows."""

RESHAPES: Final = ORDERED_VIEWS | {"Expand"}


@dataclass(frozen=True)
class Lookup:
    """One operator that reads rows of a table.

    `ids` is the operator's own index input (None for a Slice), `constant_ids` the ids if they are the same
    at every step, `vocab_size` the rows of the table as this operator sees it.
    """

    node: ir.Node
    op: str
    ids: ir.Value | None
    output: ir.Value
    vocab_size: int
    constant_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class DenseUse:
    """A use of the whole table; `output` is what the operator makes of it."""

    node: ir.Node
    output: ir.Value

    def describe(self) -> Use:
        """Return the use as the metadata names it."""
        return Use(self.node.op_type, None, str(self.output.name), None)


@dataclass
class Uses:
    """Every use of a parameter that the loss depends on.

    `dead` are uses through which no gradient passes: they lead only into ids, conditions, sizes or whole
    numbers, so they have no part in how the parameter is trained.
    """

    lookups: list[Lookup] = field(default_factory=list[Lookup])
    dense: list[DenseUse] = field(default_factory=list[DenseUse])
    dead: list[DenseUse] = field(default_factory=list[DenseUse])


def forward_uses(weight: ir.Value, facts: Facts) -> Uses:
    """Return every use of a parameter that the loss depends on."""
    uses = Uses()
    seen: set[ir.Value] = set()
    stack = [weight]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if not facts.is_forward(node) or node.op_type in SIZES:
                continue
            rule = READERS.get(node.op_type)
            lookup = rule(node, index, facts) if rule is not None else None
            if any(use.node is node for use in (*uses.dead, *uses.dense)):
                continue  # it reads the table twice, as a square does
            if facts.is_dead_end(node):
                uses.dead.append(DenseUse(node, node.outputs[0]))
            elif lookup is not None:
                uses.lookups.append(lookup)
            elif is_view(node, index, value, facts) and node.graph is weight.graph:
                stack.extend(output for output in node.outputs if output.uses())
            else:
                uses.dense.append(DenseUse(node, node.outputs[0]))
    return uses


def is_view(node: ir.Node, index: int, value: ir.Value, facts: Facts) -> bool:
    """Say whether what an operator makes of a table (its input `index`) is the table, seen differently."""
    if node.op_type in TABLE_VIEWS:
        return node.op_type == "Concat" or index == 0
    if node.op_type in keeping(Keeps.SOME):
        return index == 0
    if node.op_type in having(Trait.ADDS):  # a table that another one, or a constant, is added to
        same = static_shape(node.outputs[0]) == static_shape(value) is not None
        return same and len(static_shape(value) or ()) == 2 and not facts.depends_on_batch(node.outputs[0])
    if node.op_type in SCALINGS:
        return static_shape(node.outputs[0]) == static_shape(value) and (node.op_type == "Mul" or index == 0)
    return False


def _gather(node: ir.Node, index: int, facts: Facts) -> Lookup | None:
    data = static_shape(node.inputs[0])
    axis = int_attribute(node, "axis", 0)
    if index != 0 or data is None or len(data) not in (1, 2):
        return None
    axis %= len(data)
    ids = node.inputs[1]
    fixed = _fixed_ids(facts, ids)
    if fixed is not None and (axis != 0 or len(data) != 2 or is_weight_of_product(node.outputs[0])):
        return None
    return Lookup(node, "Gather", ids, node.outputs[0], data[axis], fixed)


def _gather_nd(node: ir.Node, index: int, facts: Facts) -> Lookup | None:
    data, indices = static_shape(node.inputs[0]), node.inputs[1]
    if index != 0 or data is None or len(data) not in (1, 2) or int_attribute(node, "batch_dims", 0) != 0:
        return None
    if indices is None or indices.shape is None or indices.shape[-1] != 1:
        return None
    fixed = _fixed_ids(facts, indices)
    return Lookup(node, "GatherND", indices, node.outputs[0], data[0], fixed)


def _gather_elements(node: ir.Node, index: int, facts: Facts) -> Lookup | None:
    data, indices = static_shape(node.inputs[0]), node.inputs[1]
    if index != 0 or data is None or len(data) != 2 or indices is None:
        return None
    axis = int_attribute(node, "axis", 0) % 2
    if unexpanded(indices, 1 - axis) is None:
        return None
    return Lookup(node, "GatherElements", indices, node.outputs[0], data[axis], None)


def _one_hot_product(node: ir.Node, index: int, facts: Facts) -> Lookup | None:
    found = reading(node, index, facts)
    if found is None:
        return None
    encoded, vocab_size = found
    op = "Einsum" if node.op_type == "Einsum" else "MatMul"
    return Lookup(node, op, encoded.ids, node.outputs[0], vocab_size, None)


def _slice(node: ir.Node, index: int, facts: Facts) -> Lookup | None:
    data = static_shape(node.inputs[0])
    if index != 0 or data is None or len(data) != 2 or not adds_to_activations(node.outputs[0]):
        return None
    window = slice_window(node, facts)
    if window is None or window[0] != 0:
        return None
    rows = range(data[0])[slice(*window[1:])]
    return Lookup(node, "Slice", None, node.outputs[0], data[0], tuple(rows))


READERS: Final[dict[str, Callable[[ir.Node, int, Facts], Lookup | None]]] = {
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "MatMul": _one_hot_product,
    "Gemm": _one_hot_product,
    "FusedMatMul": _one_hot_product,
    "Einsum": _one_hot_product,
    "Slice": _slice,
}


def slice_window(node: ir.Node, facts: Facts) -> tuple[int, int, int, int] | None:
    """Return (axis, start, stop, step) of a Slice with constant bounds that cuts one axis, otherwise None."""
    bounds = [facts.constant(item) for item in node.inputs[1:]]
    shape = static_shape(node.inputs[0])
    if shape is None or len(bounds) < 2 or any(item is None for item in bounds):
        return None
    starts, stops, *others = [item.reshape(-1).tolist() for item in bounds if item is not None]
    axes = others[0] if others else range(len(starts))
    steps = others[1] if len(others) > 1 else [1] * len(starts)
    found: list[tuple[int, int, int, int]] = []
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        size = shape[axis]
        first, last, _ = slice(start, stop, step).indices(size)
        if step != 1:
            return None
        if (first, last) != (0, size) or len(starts) == 1:
            found.append((axis % len(shape), first, last, 1))
    if not found:
        return int(axes[0]) % len(shape), 0, shape[axes[0]], 1
    return found[0] if len(found) == 1 else None


def _fixed_ids(facts: Facts, ids: ir.Value | None) -> tuple[int, ...] | None:
    array = facts.constant(ids)
    return None if array is None else tuple(int(item) for item in array.reshape(-1))


def is_weight_of_product(rows: ir.Value) -> bool:
    """Say whether looked-up rows are then a weight matrix."""
    return any(op in having(Trait.WEIGHTED) for op in _real_consumers(rows))


def adds_to_activations(rows: ir.Value) -> bool:
    """Say whether looked-up rows are added to something, as those of a position table are."""
    consumers = _real_consumers(rows)
    return bool(consumers) and all(op in ("Add", "Sum") for op in consumers)


def _real_consumers(rows: ir.Value) -> set[str]:
    found: set[str] = set()
    stack = [rows]
    while stack:
        for node, _ in stack.pop().uses():
            if node.op_type in RESHAPES or node.op_type == "Transpose":
                stack.append(node.outputs[0])
            elif node.op_type not in SIZES:
                found.add(node.op_type)
    return found


def unexpanded(indices: ir.Value, column_axis: int) -> ir.Value | None:
    """Return the ids that an index tensor repeats over the columns, otherwise None.

    They are [N, 1] ([1, N] if the columns are axis 0, where a plain [N] is broadcast alike).
    """
    value: ir.Value | None = indices
    while value is not None:
        if value.shape is not None and len(value.shape) == 2 and value.shape[column_axis] == 1:
            return value
        if value.shape is not None and len(value.shape) == 1 and column_axis == 0:
            return value
        node = value.producer()
        if node is None or node.op_type not in keeping(Keeps.PLACES) | {"Expand"}:
            return None
        value = node.inputs[0]
    return None


ID_STEPS: Final = VIEWS | {"Expand", "Clip"}


def ids_chain(ids: ir.Value | None, facts: Facts) -> list[ir.Value]:
    """Return the values that carry the same ids, from `ids` back to where they come from.

    Steps through reshapes, changes of their order, integer casts, clips, single-input Concat, Max/Min with
    a constant, the wrapping of negative ids `Where(ids < 0, ids + V, ids)`, and a Where that replaces some by
    a constant.
    """
    chain: list[ir.Value] = []
    value = ids
    while value is not None and value not in chain:
        chain.append(value)
        node = value.producer()
        if node is None:
            break
        single = node.op_type == "Concat" and len(node.inputs) == 1
        if node.op_type in ID_STEPS or single or _reads_all(node, facts):
            value = node.inputs[0]
        elif node.op_type in ("Max", "Min") and len(node.inputs) == 2:
            value = next((item for item in node.inputs if not _is_bound(item, facts)), None)
        elif node.op_type == "Where" and (carried := _wrapped(node) or _replaced(node, facts)) is not None:
            value = carried
        else:
            break
    return chain


def _reads_all(node: ir.Node, facts: Facts) -> bool:
    """Say whether a node reads every entry along an axis once, in whatever order."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type not in ("Gather", "Slice") or source is None or source.shape is None:
        return False
    if permutation(node, facts.constant) is not None:
        return True
    index = facts.constant(node.inputs[1]) if node.op_type == "Gather" else None
    length = source.shape[int_attribute(node, "axis", 0)] if index is not None and index.ndim <= 1 else None
    if index is None or not isinstance(length, int) or index.size != length:
        return False
    return sorted(int(item) % length for item in index.reshape(-1)) == list(range(length))


def _is_bound(value: ir.Value | None, facts: Facts) -> bool:
    """Say whether a value is a constant, perhaps broadcast to a shape that is known at run time alone."""
    while value is not None and facts.constant(value) is None:
        node = value.producer()
        if node is None or node.op_type not in ("ConstantOfShape", "Expand"):
            return False
        if node.op_type == "ConstantOfShape":
            return True
        value = node.inputs[0]
    return value is not None


def keeps_every_id(chain: list[ir.Value]) -> bool:
    """Say whether the first of a chain's values is its last one, at most seen differently or wrapped."""
    nodes = [value.producer() for value in chain[:-1]]
    return not any(
        node is not None
        and (node.op_type in having(Trait.BOUNDS) or (node.op_type == "Where" and _wrapped(node) is None))
        for node in nodes
    )


def _replaced(node: ir.Node, facts: Facts) -> ir.Value | None:
    """Match Where(condition, x, constant), or the other way round, and return x."""
    varying = [item for item in node.inputs[1:3] if facts.constant(item) is None]
    return varying[0] if len(varying) == 1 else None


def _wrapped(node: ir.Node) -> ir.Value | None:
    """Match Where(x < 0, x + V, x) and return x."""
    test, shifted, plain = node.inputs
    less = None if test is None else test.producer()
    add = None if shifted is None else shifted.producer()
    if plain is None or less is None or add is None or less.op_type != "Less" or add.op_type != "Add":
        return None
    return plain if plain in less.inputs and plain in add.inputs else None
