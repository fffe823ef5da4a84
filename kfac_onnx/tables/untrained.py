"""Tables of a graph without gradients: what `scan` lists with `"trainable": false`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.graph.values import int_attribute, static_shape
from kfac_onnx.metadata import Site
from kfac_onnx.tables.facts import Facts
from kfac_onnx.tables.lookups import RESHAPES, SCALINGS, TABLE_VIEWS, forward_uses
from kfac_onnx.tables.matching import describe_lookup

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.lookups import Lookup
    from kfac_onnx.tables.pull_back import Layout

__all__ = ["forward_tables"]


def forward_tables(model: ir.Model) -> list[Site]:
    """Return every float initializer or input of static shape whose rows, or a view's, are looked up."""
    held = dict.fromkeys([*model.graph.initializers.values(), *model.graph.inputs])
    tables = [
        value
        for value in held
        if value.dtype is not None and value.dtype.is_floating_point() and static_shape(value)
    ]
    facts = Facts(model, tables, None)
    facts.follow(model.graph.outputs)
    sites: list[Site] = []
    for table in tables:
        uses = forward_uses(table, facts)
        lookups, others = uses.lookups, uses.dense
        if not lookups or (lookups[0].constant_ids is not None and lookups[0].op != "Gather"):
            continue
        found = _dimensions(table, lookups[0])
        if found is None or table.dtype is None:
            continue
        vocab_size, embedding_dim, layout = found
        sites.append(
            Site(
                parameter=str(table.name),
                vocab_size=vocab_size,
                embedding_dim=embedding_dim,
                dtype=table.dtype.numpy().name,
                layout=layout,
                padding_idx=None,
                uses=tuple(describe_lookup(lookup, None) for lookup in lookups),
                dense_uses=tuple(use.describe() for use in others),
                dead_ends=tuple(use.describe() for use in uses.dead),
            )
        )
    return sites


def _dimensions(table: ir.Value, lookup: Lookup) -> tuple[int, int, Layout] | None:
    """Return V, D and how the table stores them, from the axis that a lookup reads rows along."""
    shape = static_shape(table) or ()
    for data in lookup.node.inputs:
        seen = static_shape(data)
        if data is None or not seen:
            continue
        if lookup.op in ("Gather", "GatherElements"):
            axis = int_attribute(lookup.node, "axis", 0) % len(seen)
        else:
            axis = 0 if seen[0] == lookup.vocab_size else len(seen) - 1
        stored = _stored_axis(table, data, axis)
        if stored is None:
            continue
        if len(shape) == 2 and stored >= 0:
            return shape[stored], shape[1 - stored], "rows" if stored == 0 else "columns"
        size = int(np.prod(shape))
        return lookup.vocab_size, size // lookup.vocab_size, "flat"
    return None


def _stored_axis(table: ir.Value, value: ir.Value, axis: int) -> int | None:
    """Return the axis of `table` that an axis of its view is; -1 if reshaped, None if it is no view."""
    if value is table:
        return axis
    node = value.producer()
    if node is None or node.op_type not in TABLE_VIEWS | SCALINGS | {"Slice"}:
        return None
    source = node.inputs[0]
    if node.op_type in RESHAPES and static_shape(source) != static_shape(value):
        return None if source is None or _stored_axis(table, source, 0) is None else -1
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        rank = len(static_shape(value) or ())
        axis = (list(range(rank))[::-1] if order is None else list(order.as_ints()))[axis]
    sources = node.inputs if node.op_type in SCALINGS | {"Concat"} else (source,)
    found = (None if item is None else _stored_axis(table, item, axis) for item in sources)
    return next((stored for stored in found if stored is not None), None)
