"""Tables of a graph without gradients: what `scan` lists with `"trainable": false`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.frontends.values import static_shape
from kfac_onnx.metadata import Site, Use
from kfac_onnx.passes.sites.facts import Facts, ancestors
from kfac_onnx.passes.sites.lookups import forward_uses
from kfac_onnx.passes.sites.matching import describe_lookup

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["forward_tables"]


def forward_tables(model: ir.Model) -> list[Site]:
    """Return every float initializer or input of two static dimensions that rows are looked up in."""
    held = dict.fromkeys([*model.graph.initializers.values(), *model.graph.inputs])
    tables = [
        value
        for value in held
        if value.dtype is not None and value.dtype.is_floating_point() and len(static_shape(value) or ()) == 2
    ]
    facts = Facts(model, tables, None)
    facts.forward = ancestors(model.graph.outputs)
    sites: list[Site] = []
    for table in tables:
        lookups, others = forward_uses(table, facts)
        if not lookups or (lookups[0].constant_ids is not None and lookups[0].op != "Gather"):
            continue
        shape = [int(dim) for dim in (table.shape or ()) if isinstance(dim, int)]
        if len(shape) != 2 or table.dtype is None:
            continue
        by_rows = lookups[0].vocab_size == shape[0]
        sites.append(
            Site(
                parameter=str(table.name),
                vocab_size=shape[0] if by_rows else shape[1],
                embedding_dim=shape[1] if by_rows else shape[0],
                dtype=table.dtype.numpy().name,
                layout="rows" if by_rows else "columns",
                padding_idx=None,
                uses=tuple(describe_lookup(lookup, None) for lookup in lookups),
                dense_uses=tuple(Use(use.node.op_type, None, str(use.output.name), None) for use in others),
            )
        )
    return sites
