"""Rows that a loop adds to a tensor that it carries are added at once, after the loop.

A state that every iteration only scatters rows into, acc' = Scatter(acc, ids, g, add), or adds such a scatter
to, acc' = acc + Scatter(zeros, ids, g, add), and that nothing else reads, is a sum over all rows of all
iterations. The rows become a result of the loop, and one scatter after it adds them. The ids of all
iterations are computed outside where that is possible, else they are a result as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import Fixed, Stacked
from kfac_onnx.canonical.loops.recurrence import State, prune
from kfac_onnx.canonical.loops.results import prune_emitted
from kfac_onnx.canonical.loops.rules import RULES
from kfac_onnx.canonical.loops.vectorizer import Vectorizer
from kfac_onnx.graph.emit import Emitter, Miss
from kfac_onnx.graph.operators import SCATTERS, VIEWS, Keeps, Trait, having, keeping
from kfac_onnx.graph.values import ONNX_DOMAINS, dtype_of, int_attribute, is_float, rank_of, unchanged

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.recurrence import Recurrence
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = ["scatter_after"]

VARYING_SHAPES = having(Trait.VARYING)
"""Operators whose results may have another shape in each iteration: they cannot be stacked."""

# masks are made of ids by a Where, negative gradients by a Neg, ids for every column by an Expand
ROW_STEPS = VIEWS | (keeping(Keeps.REPEATS) - {"Tile"}) | {"Neg", "Where"}
"""Operators on rows that are done outside, so that masks by ids stand next to the scatter."""


@dataclass(frozen=True)
class _Sum:
    """The next value of an accumulator: itself, scatters into it or into zeros, and other terms."""

    scatters: tuple[ir.Node, ...]
    others: tuple[ir.Value, ...]


def scatter_after(loop: Recurrence, names: Context, constants: Constants) -> tuple[Recurrence, int]:
    """Take the scatters out of the accumulators of a loop; return the loop, and how many scatters.

    A loop of a known number of iterations or not: the rows are results of the loop in either case.
    """
    done = 0
    again = True
    while again:
        again = False
        for state in loop.states:
            found = _sum_of(loop, state, constants)
            if found is None or not found.scatters or not is_float(state.first):
                continue
            if any(_varies(value) for node in found.scatters for value in node.inputs[1:3]):
                continue
            taken = _take_out(loop, state, found, names, constants)
            if taken is not None:
                loop, again, done = taken, True, done + len(found.scatters)
                break
    return loop, done


def _sum_of(loop: Recurrence, state: State, constants: Constants) -> _Sum | None:
    """Take apart what an iteration makes of an accumulator; None if it does anything else with it."""
    scatters: list[ir.Node] = []
    others: list[ir.Value] = []
    value, readers = state.next, 0
    while unchanged(value) is not state.inner:
        if not _private(value, readers, loop):
            return None
        value = unchanged(value)
        node = value.producer()
        if node is None or node.graph is not loop.body or node.domain not in ONNX_DOMAINS:
            return None
        if _adds_rows(node):
            scatters.append(node)
            following = node.inputs[0]
        elif node.op_type in having(Trait.ADDS) - {"Sub"}:
            inside = [item for item in node.inputs if item is not None and _depends(item, state.inner)]
            rest = [item for item in node.inputs if item is not None and item not in inside]
            if len(inside) != 1:
                return None
            for item in rest:
                maker = unchanged(item).producer()
                into_zeros = maker is not None and _adds_rows(maker) and constants.is_zeros(maker.inputs[0])
                if into_zeros and maker is not None and _same_size(item, state):
                    scatters.append(maker)
                else:
                    others.append(item)
            following = inside[0]
        else:
            return None
        if following is None:
            return None
        value, readers = following, 1
    return _Sum(tuple(scatters), tuple(others)) if len(state.inner.uses()) <= 1 else None


def _same_size(item: ir.Value, state: State) -> bool:
    """Say whether adding a value to the accumulator broadcasts neither."""
    shape, total = item.shape, state.first.shape
    return (shape is not None and total is not None and list(shape) == list(total)) or (
        shape is None and rank_of(state.first) == 2
    )


def _private(value: ir.Value, readers: int, loop: Recurrence) -> bool:
    """Say whether only the chain of the accumulator reads a value and what passes it on unchanged."""
    outputs = sum(1 for end in loop.body.outputs if end is value)
    if len(value.uses()) + outputs > 1:
        return False
    node = value.producer()
    source = None if node is None or not node.inputs else node.inputs[0]
    if source is None or unchanged(value) is value:
        return True
    return _private(source, readers, loop)


def _adds_rows(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    adds = reduction is not None and reduction.as_string() == "add"
    return adds and node.op_type in SCATTERS and node.domain in ONNX_DOMAINS


def _depends(value: ir.Value, on: ir.Value) -> bool:
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item is on:
            return True
        node = item.producer()
        if item in seen or node is None or node.graph is not on.graph:
            continue
        seen.add(item)
        stack.extend(source for source in node.inputs if source is not None)
    return False


def _varies(value: ir.Value | None) -> bool:
    """Say whether a value of the body may have another shape in each iteration."""
    seen: set[ir.Value] = set()
    stack = [] if value is None else [value]
    while stack:
        item = stack.pop()
        node = item.producer()
        if item in seen or node is None:
            continue
        seen.add(item)
        if node.op_type in VARYING_SHAPES:
            return True
        stack.extend(source for source in node.inputs if source is not None)
    return False


@dataclass(frozen=True)
class _Term:
    """One scatter of all iterations' rows; the ids are outer values in the order of the iterations' rows."""

    node: ir.Node
    ids: ir.Value
    ids_rank: int
    rows: ir.Value
    rows_rank: int
    column: bool
    """The ids are one column [N, 1] that ScatterElements repeats along the rows."""

    def added_to(self, vec: Vectorizer, base: ir.Value) -> ir.Value:
        """Emit the scatter of all rows into `base`."""
        if self.node.op_type == "ScatterND":
            return vec.emit.many("ScatterND", [base, self.ids, self.rows], 1, {"reduction": "add"})[0]
        axis = int_attribute(self.node, "axis", 0) % self.rows_rank
        rows = _joined(vec, self.rows, self.rows_rank, axis)
        ids = _joined(vec, self.ids, self.ids_rank, axis)
        if self.column:
            ids = vec.emit.op("Expand", ids, vec.emit.op("Shape", rows))
        return vec.emit.op("ScatterElements", base, ids, rows, axis=axis, reduction="add")


def _joined(vec: Vectorizer, stack: ir.Value, rank: int, axis: int) -> ir.Value:
    """Join instances of this rank, which are stacked along axis 0, along one of their own axes."""
    emit = vec.emit
    if axis == 0:
        if rank == 1:
            return emit.op("Reshape", stack, emit.ints(-1))
        rest = emit.part(emit.op("Shape", stack), 2, rank + 1)
        known = None if stack.shape is None else list(stack.shape)[2:]
        if known is not None and all(isinstance(dim, int) for dim in known):
            rest = emit.ints(*(int(dim) for dim in known if isinstance(dim, int)))
        return emit.op("Reshape", stack, emit.concat(emit.ints(-1), rest))
    perm = [*range(1, axis + 1), 0, *range(axis + 1, rank + 1)]
    turned = emit.op("Transpose", stack, perm=perm)
    shape = emit.op("Shape", turned)
    sizes = [emit.part(shape, 0, axis), emit.ints(-1)]
    if axis + 1 < rank:
        sizes.append(emit.part(shape, axis + 2, rank + 1))
    return emit.op("Reshape", turned, emit.concat(*sizes))


def _take_out(
    loop: Recurrence, state: State, found: _Sum, names: Context, constants: Constants
) -> Recurrence | None:
    before = list(loop.collected)
    vec = Vectorizer(loop, names, constants, RULES, leaf=ROW_STEPS)
    terms: list[_Term] = []
    for node in found.scatters:
        term = _term(vec, node, state)
        if isinstance(term, Miss):
            prune_emitted(vec.emit)
            loop.collected = before
            return None
        terms.append(term)
    emit = vec.emit
    total: ir.Value | None = None
    if found.others:
        total = _rest(loop, state, found, names)
    elif not constants.is_zeros(state.first):
        total = state.first
    for index, term in enumerate(terms):
        if index == 0 and total is None:
            total = term.added_to(vec, state.first)
            continue
        part = term.added_to(vec, _zeros_like(vec, state.first))
        total = part if total is None else emit.op("Add", total, part)
    if total is None:
        raise AssertionError("an accumulator has at least one scatter")
    _take_name(state.final, total, names)
    loop.states = [item for item in loop.states if item is not state]
    loop.graph.insert_after(loop.node, emit.nodes)
    written = loop.write(names)
    prune(written.body)
    prune(written.graph, emit.nodes)
    return written


def _take_name(old: ir.Value, new: ir.Value, names: Context) -> None:
    """Let the readers of one value read another, which takes its name where it is an output."""
    new.type, new.shape = new.type or old.type, new.shape or old.shape
    if old.is_graph_output():
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = names.fresh(f"kfac/loop/{name}"), name
    else:
        old.replace_all_uses_with(new)


def _zeros_like(vec: Vectorizer, value: ir.Value) -> ir.Value:
    dtype = dtype_of(value)
    if dtype is None:
        raise AssertionError("an accumulator is of a known type")
    return vec.emit.zeros(vec.emit.shape(value), dtype)


def _rest(loop: Recurrence, state: State, found: _Sum, names: Context) -> ir.Value:
    """Keep an accumulator of the terms that are no scatters; return its final value."""
    emit = Emitter.in_place_of(names, loop.node, "loop/body")
    total = state.inner
    for value in found.others:
        total = emit.op("Add", total, value)
    loop.body.extend(emit.nodes)
    final = ir.Value(name=names.fresh(f"kfac/loop/{state.final.name}/rest"))
    final.type, final.shape = state.final.type, state.final.shape
    loop.states.append(State(state.first, state.inner, total, final))
    return final


def _term(vec: Vectorizer, node: ir.Node, state: State) -> _Term | Miss:
    """Return the ids and rows of all iterations for one scatter of the body."""
    ids, rows = node.inputs[1], node.inputs[2]
    if ids is None or rows is None:
        return Miss("a scatter lacks its ids or its rows")
    column = False
    rank = rank_of(state.first)
    if node.op_type == "ScatterElements" and rank is not None:
        vec.hint(rows, rank)
        single = _unexpanded(ids, 1 - int_attribute(node, "axis", 0) % rank) if rank == 2 else None
        ids, column = (ids, False) if single is None else (single, True)
    elif rank is not None and (index_rank := rank_of(ids)) is not None and ids.shape is not None:
        depth = ids.shape[-1]
        if isinstance(depth, int):
            vec.hint(rows, index_rank - 1 + rank - depth)
    places, parts = vec.lane(ids), vec.lane(rows)
    places = vec.everywhere(places) if isinstance(places, Fixed) else places
    parts = vec.everywhere(parts) if isinstance(parts, Fixed) else parts
    if not isinstance(places, Stacked) or not isinstance(parts, Stacked):
        return next(
            (item for item in (places, parts) if isinstance(item, Miss)), Miss("rows of different numbers")
        )
    moved = vec.in_order(parts, places.order)
    return _Term(node, places.value, places.rank, moved, parts.rank, column)


def _unexpanded(ids: ir.Value, columns: int) -> ir.Value | None:
    """Return the column of ids [N, 1] (or row [1, N]) that an Expand repeats along the rows."""
    value: ir.Value | None = ids
    while value is not None:
        shape = value.shape
        if shape is not None and len(shape) == 2 and shape[columns] == 1:
            return value
        node = value.producer()
        if node is None or node.op_type not in keeping(Keeps.PLACES) | {"Expand"}:
            return None
        value = node.inputs[0]
    return None
