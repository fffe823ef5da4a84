"""What was tried at each node between a parameter, its uses and its gradient: the text of `why`.

It walks as `lookups.forward_uses` and `scatters.gradient_terms` do, by the same rules, and says for each node
what it is taken for. A line is indented under the value that it came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.operators import SIZES
from kfac_onnx.graph.values import label, static_shape
from kfac_onnx.tables.explaining import why_no_lookup, why_no_scatter
from kfac_onnx.tables.lookups import READERS, RESHAPES, SCALINGS, Lookup, is_view
from kfac_onnx.tables.scatters import SCATTERS, other_operand, placed_rows, view_step
from kfac_onnx.tables.terms import RowTerm

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.matching import SiteMatch

__all__ = ["trace_backward", "trace_forward", "trace_site"]

INDENT: Final = "  "


def trace_forward(weight: ir.Value, facts: Facts) -> Iterator[str]:
    """Yield what each operator that the parameter reaches was taken for, view by view."""
    yield f"forward from '{weight.name}':"
    lines = list(_forward(weight, weight, facts, set(), 1))
    yield from lines or [f"{INDENT}the loss does not depend on it"]


def _forward(
    value: ir.Value, weight: ir.Value, facts: Facts, seen: set[ir.Value], depth: int
) -> Iterator[str]:
    if value in seen:
        return
    seen.add(value)
    pad = INDENT * depth
    for node, index in value.uses():
        if not facts.is_forward(node) or node.op_type in SIZES:
            continue
        if facts.is_dead_end(node):
            yield f"{pad}{label(node)} is a dead end: no gradient passes through it"
            continue
        rule = READERS.get(node.op_type)
        lookup = rule(node, index, facts) if rule is not None else None
        if lookup is not None:
            yield f"{pad}{label(node)} reads rows {_lookup(lookup)}"
        elif is_view(node, index, value, facts) and node.graph is weight.graph:
            yield f"{pad}{label(node)} is a view of it{_factor(node, index)}"
            for output in node.outputs:
                yield from _forward(output, weight, facts, seen, depth + 1)
        else:
            yield f"{pad}{label(node)} uses the whole table: {why_no_lookup(node, index, facts)}"


def _factor(node: ir.Node, index: int) -> str:
    if node.op_type not in SCALINGS:
        return ""
    other = node.inputs[1 - index]
    return "" if other is None else f", scaled by '{other.name}'"


def _lookup(lookup: Lookup) -> str:
    rows = f"of a table of {lookup.vocab_size} by "
    if lookup.constant_ids is not None:
        ids = lookup.constant_ids
        whole = ids == tuple(range(lookup.vocab_size))
        return f"{rows}constant ids ({'every row, in order' if whole else f'{len(ids)} rows'})"
    return f"{rows}the ids '{'' if lookup.ids is None else lookup.ids.name}'"


def trace_backward(gradient: ir.Value, facts: Facts) -> Iterator[str]:
    """Yield what each operator that makes the gradient was taken for, from its end backward."""
    yield f"backward from '{gradient.name}':"
    yield from _backward(gradient, facts, 1)


def _backward(value: ir.Value, facts: Facts, depth: int) -> Iterator[str]:
    pad = INDENT * depth
    node = value.producer()
    while node is not None and not facts.is_forward(node):
        if node.op_type in ("Add", "Sum") and _same_shapes(node, value):
            yield f"{pad}{node.op_type} '{value.name}' adds {len(node.inputs)} terms"
            for item in node.inputs:
                if item is not None:
                    yield from _backward(item, facts, depth + 1)
            return
        placed = placed_rows(node, facts)
        rule = SCATTERS.get(node.op_type) if placed is None else None
        term = rule(node, (), facts) if rule is not None else None
        if term is not None:
            yield f"{pad}{node.op_type} '{value.name}' scatters the rows {_term(term)}"
            return
        view = placed if placed is not None else view_step(node, value, facts)
        if view is None:
            yield f"{pad}{node.op_type} '{value.name}' is dense in the table: {why_no_scatter(node, facts)}"
            return
        if placed is not None:
            yield f"{pad}{node.op_type} '{value.name}' puts rows at constant places"
            source = node.inputs[2]
        else:
            scaled = "" if view.operand is None else f", scaled by '{view.operand.name}'"
            yield f"{pad}{node.op_type} '{value.name}' is a view of the gradient{scaled}"
            source = node.inputs[0] if view.operand is None else other_operand(node, view.operand)
        if source is None:
            return
        value, node = source, source.producer()
    made = "is an input" if node is None else f"is made by {node.op_type} in the forward part"
    yield f"{pad}'{value.name}' is dense in the table: it {made}"


def _same_shapes(node: ir.Node, value: ir.Value) -> bool:
    shape = static_shape(value)
    return all(static_shape(item) == shape for item in node.inputs)


def _term(term: RowTerm) -> str:
    text = f"'{_own(term.updates).name}'"
    if term.fixed is not None:
        text += f" by constant ids ({len(term.fixed)} rows)"
    elif term.indices is not None:
        text += f" by the ids '{_own(term.indices).name}'"
    mask = term.mask
    if mask is None:
        return text
    if mask.padding_idx is not None:
        return f"{text}, without those of padding row {mask.padding_idx}"
    return f"{text}, without those that '{_own(mask.condition).name}' drops"


def trace_site(site: SiteMatch) -> Iterator[str]:
    """Yield which scattered rows belong to which lookup of an accepted table."""
    yield "paired:"
    for use in site.uses:
        rows = use.term.updates if isinstance(use.term, RowTerm) else use.term.value
        more = "".join(f" and '{_own(term.updates).name}'" for term, _ in use.also)
        yield (
            f"{INDENT}{use.lookup.op} '{use.lookup.output.name}' gets the rows '{_own(rows).name}'{more}: "
            f"dL/d(rows) is '{use.output_gradient.name}'"
        )
    for dense in site.dense_uses:
        yield f"{INDENT}{dense.node.op_type} '{dense.output.name}' gets a dense part: the table is tied"


def _own(value: ir.Value) -> ir.Value:
    """Return the exporter's value that one of ours only reshapes or casts."""
    found = value
    while str(found.name).startswith("kfac/"):
        node = found.producer()
        if node is None or node.op_type not in RESHAPES or node.inputs[0] is None:
            return value
        found = node.inputs[0]
    return found
