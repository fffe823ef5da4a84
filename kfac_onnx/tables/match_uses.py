"""Which rows of a table's gradient belong to which lookup: those scattered by the lookup's own ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kfac_onnx.graph.operators import ORDERED_VIEWS
from kfac_onnx.graph.values import static_shape
from kfac_onnx.tables.lookups import RESHAPES, Lookup, ids_chain, keeps_every_id
from kfac_onnx.tables.pull_back import Miss, Pulled, pull, pull_whole
from kfac_onnx.tables.terms import DenseTerm, RowStep, RowTerm

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.masks import DropMask

__all__ = ["MatchedUse", "claim", "output_gradient", "whole_ids", "with_clamping", "with_shared"]


@dataclass(frozen=True)
class MatchedUse:
    """A lookup with the rows of the gradient that belong to it, in the parameter's coordinates."""

    lookup: Lookup
    term: RowTerm | DenseTerm
    pulled: Pulled
    output_gradient: ir.Value
    also: tuple[tuple[RowTerm, Pulled], ...] = ()
    """Further row terms of the same lookup, whose output the exporter shares between two consumers."""
    clamps: bool = False
    """The lookup reads another row for an id that is none; only ids that the scatter takes can be valid."""

    @property
    def negatives(self) -> Literal["wrap", "reject"]:
        """What the exporter's backward makes of an id in [−V, −1]."""
        term = self.term
        if isinstance(term, RowTerm) and term.op.startswith("Scatter") and not self.clamps:
            if term.mask is not None and (term.mask.drops_negatives or not term.mask.exact):
                return "reject"
            return "wrap"
        return "reject"

    @property
    def padding_idx(self) -> int | None:
        """The row that the graph never updates, if its mask says one."""
        mask = self.term.mask if isinstance(self.term, RowTerm) else None
        return None if mask is None else mask.padding_idx


def claim(
    lookup: Lookup,
    terms: list[RowTerm | DenseTerm],
    shape: tuple[int, ...],
    facts: Facts,
    misses: list[str],
) -> MatchedUse | None:
    """Return a lookup with the one of the terms that holds its rows; say in `misses` why others do not."""
    chain = ids_chain(lookup.ids, facts)
    scattered = [(term, _common_id(chain, term, facts)) for term in terms if isinstance(term, RowTerm)]
    scattered.sort(
        key=lambda item: (
            not _same_rows(item[0].updates, lookup.output),
            len(chain) if item[1] is None else item[1],
        )
    )
    for term, common in scattered:
        if lookup.constant_ids is not None and term.fixed is not None:
            agrees = _window_ids(term.fixed, lookup) == lookup.constant_ids
        else:
            agrees = common is not None
        if not agrees:
            misses.append(f"{term.op} of '{term.updates.name}' takes other ids than '{lookup.output.name}'")
            continue
        pulled = pull(term, shape)
        if isinstance(pulled, Miss):
            misses.append(pulled.reason)
            continue
        return MatchedUse(
            lookup, term, pulled, output_gradient(term.updates, lookup.output, facts, term.mask)
        )
    if lookup.constant_ids is None:
        return None
    for term in terms:
        if not isinstance(term, DenseTerm) or not facts.varies(term.value):
            continue  # rows, or a penalty: what lookups get sums over the batch
        pulled = pull_whole(term, shape)
        if isinstance(pulled, Miss):
            misses.append(pulled.reason)
            continue
        if whole_ids(term, pulled) == lookup.constant_ids:
            return MatchedUse(lookup, term, pulled, output_gradient(term.value, lookup.output, facts))
        misses.append(f"'{term.value.name}' is not the rows of '{lookup.output.name}' in order")
    return None


def _common_id(chain: list[ir.Value], term: RowTerm, facts: Facts) -> int | None:
    """Return the first place in a lookup's chain of ids whose value the ids of a scatter come from too."""
    numbers = {facts.numbering.number(value) for value in ids_chain(term.indices, facts)}
    found = (place for place, value in enumerate(chain) if facts.numbering.number(value) in numbers)
    return next(found, None)


def with_clamping(use: MatchedUse, facts: Facts) -> MatchedUse:
    """Note that a lookup clamps its ids; a mask alone tells then which of them are no rows, and is kept."""
    term = use.term
    if not isinstance(term, RowTerm) or term.fixed is not None:
        return use
    chain = ids_chain(use.lookup.ids, facts)
    common = _common_id(chain, term, facts)
    if common is None or keeps_every_id(chain[: common + 1]):
        return use
    if term.mask is not None:
        term = replace(term, mask=replace(term.mask, exact=False))
    return replace(use, term=term, clamps=True)


def with_shared(
    use: MatchedUse, terms: list[RowTerm | DenseTerm], shape: tuple[int, ...], facts: Facts
) -> MatchedUse:
    """Add what is left of row terms by the very ids of a claimed one: parts of the same dL/d(rows)."""
    claimed = use.term
    if not isinstance(claimed, RowTerm):
        return use
    own = _in_order(claimed.indices, facts)
    for term in list(terms):
        if not isinstance(term, RowTerm) or term.fixed != claimed.fixed or term.before != claimed.before:
            continue
        pulled = pull(term, shape)
        same_ids = claimed.fixed is not None or bool(own & _in_order(term.indices, facts))
        same = same_ids and _same_mask(term, claimed, facts)
        if same and isinstance(pulled, Pulled) and pulled.steps == use.pulled.steps == ():
            terms.remove(term)
            use = replace(use, also=(*use.also, (term, pulled)))
    return use


def _in_order(ids: ir.Value | None, facts: Facts) -> set[int]:
    """Return the numbers of the values that hold the same ids in the same order."""
    found: set[int] = set()
    value = ids
    while value is not None:
        found.add(facts.numbering.number(value))
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in ORDERED_VIEWS else None
    return found


def _same_mask(one: RowTerm, other: RowTerm, facts: Facts) -> bool:
    if one.mask is None or other.mask is None:
        return one.mask is other.mask
    conditions = _in_order(one.mask.condition, facts) & _in_order(other.mask.condition, facts)
    return bool(conditions) and one.mask.drops_where == other.mask.drops_where


def _window_ids(fixed: tuple[int, ...], lookup: Lookup) -> tuple[int, ...]:
    return tuple(item % lookup.vocab_size for item in fixed)


def whole_ids(term: DenseTerm, pulled: Pulled) -> tuple[int, ...]:
    """Return the table rows that the rows of a whole-table term belong to."""
    rows = static_shape(term.value) or (0, 0)
    ids = range(rows[-2])
    for step in pulled.steps:
        ids = _shifted(ids, step)
    return tuple(ids)


def _shifted(ids: range, step: RowStep) -> range:
    match step.kind:
        case "shift":
            return range(ids.start + step.start, ids.stop + step.start)
        case "window":
            return range(max(ids.start - step.start, 0), max(min(ids.stop, step.stop) - step.start, 0))
        case _:
            return ids


def _same_rows(updates: ir.Value, rows: ir.Value) -> bool:
    return updates.shape is not None and rows.shape is not None and list(updates.shape) == list(rows.shape)


def output_gradient(
    updates: ir.Value, rows: ir.Value, facts: Facts, mask: DropMask | None = None
) -> ir.Value:
    """Return the value that is dL/d(rows): `updates` before the mask, and before reshapes of our own.

    Values that the reader of the file added (`kfac/...`) are stepped over, and reshapes as far as to the
    value that has the looked-up rows' own shape.
    """
    found, value = updates, updates
    condition = None if mask is None else mask.condition
    while (node := value.producer()) is not None:
        masked = node.op_type == "Where" and len(node.inputs) == 3
        if masked:
            source = node.inputs[2] if facts.is_zeros(node.inputs[1]) else node.inputs[1]
            masked = node.inputs[0] is condition or facts.constant(node.inputs[0]) is not None
        else:
            source = node.inputs[0] if node.op_type in RESHAPES or node.op_type == "Transpose" else None
        if source is None or source.dtype is None or not source.dtype.is_floating_point():
            break
        if node.op_type == "Where" and not masked:
            break
        ours = str(found.name).startswith("kfac/")
        closer = _same_rows(source, rows) and not _same_rows(found, rows)
        if masked or ours or closer:
            found = source
        elif node.op_type == "Transpose":
            break
        value = source
    return found
