"""A padding row that the exporter lost, given back by the user (`--padding-idx PARAM=ROW`).

Lookups of that row count in no factor and their rows are zero: keep = 0 where ids = ROW. The table's whole
gradient loses them too, so that whatever reads it (a drop-in graph, the projection of a tied table) agrees:
what the lookups scattered into that row is taken out again, and what a projection put there stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.graph.emit import Emitter
    from kfac_onnx.metadata import Site
    from kfac_onnx.tables.matching import SiteMatch

__all__ = ["check_padding", "drop_padding", "padding_rows"]

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def padding_rows(words: Sequence[str]) -> dict[str, int]:
    """Return `PARAM=ROW` words as a mapping; raises UserError for one that is not of that form."""
    rows: dict[str, int] = {}
    for word in words:
        parameter, _, row = word.rpartition("=")
        try:
            number = int(row)
        except ValueError as e:
            raise UserError(f"padding wants PARAM=ROW, not '{word}'") from e
        if not parameter:
            raise UserError(f"padding wants PARAM=ROW, not '{word}'")
        if rows.setdefault(parameter, number) != number:
            raise UserError(f"padding names two rows of '{parameter}': {rows[parameter]} and {number}")
    return rows


def check_padding(rows: Mapping[str, int], sites: Sequence[SiteMatch]) -> dict[str, int]:
    """Return each table's padding row, counted from 0.

    Raises UserError for a parameter that is no table, a row that it does not have, or another one than the
    graph itself drops.
    """
    known = {str(site.weight.name): site for site in sites}
    found: dict[str, int] = {}
    for name, given in rows.items():
        site = known.get(name)
        if site is None:
            raise UserError(
                f"padding names '{name}', which is no embedding table{did_you_mean(name, known)}",
                help="`scan MODEL` lists the tables",
            )
        size = site.pulled.vocab_size
        if not -size <= given < size:
            raise UserError(f"padding names row {given} of '{name}', which has {size} rows")
        found[name] = given % size
        own = site.describe().padding_idx
        if own is not None and own != found[name]:
            raise UserError(
                f"padding names row {found[name]} of '{name}', but the graph drops row {own}",
                help="leave it out: the graph's own padding row is respected",
            )
    return found


def drop_padding(
    site: SiteMatch, marked: Site, row: int, values: Mapping[str, ir.Value], emitter: Emitter
) -> Site:
    """Emit keep, rows and gradient without the lookups of `row`; return the site with their names.

    `marked` names the site's ids, rows and keep among `values`.
    """
    emit = emitter
    ids, rows = values[str(marked.ids)], values[str(marked.rows)]
    nothing = emit.constant(np.float32(0.0), "nothing")
    padding = emit.constant(np.asarray(row, np.int64), "padding_idx")
    last = emit.constant(np.asarray([1], np.int64), "last_axis")
    padded = emit.node("Equal", [ids, padding], name="padded", dtype=BOOL, shape=[None])
    kept = emit.node("Not", [padded], name="kept", dtype=BOOL, shape=[None])
    keep = emit.node("Cast", [kept], attributes={"to": FLOAT}, name="keep", dtype=FLOAT, shape=[None])
    if marked.keep is not None:
        keep = emit.node("Mul", [values[marked.keep], keep], name="keep", dtype=FLOAT, shape=[None])
    wide = emit.node("Unsqueeze", [padded, last], name="padded_rows", dtype=BOOL, shape=[None, 1])
    left = emit.node("Where", [wide, nothing, rows], name="rows", dtype=FLOAT, shape=rows.shape)
    dropped = emit.node("Where", [wide, rows, nothing], name="dropped", dtype=FLOAT, shape=rows.shape)
    _correct(site, row, dropped, emit)
    return replace(marked, rows=left.name, keep=keep.name, padding_idx=row)


def _correct(site: SiteMatch, row: int, dropped: ir.Value, emit: Emitter) -> None:
    """Give the gradient's name to the gradient without what the dropped rows put into `row`."""
    old, D = site.gradient, site.pulled.embedding_dim
    places, axis, shape = _places(site, row)
    index = emit.constant(places, "padding_places")
    if site.dense_terms:
        first = emit.constant(np.asarray([0], np.int64), "first_axis")
        total = emit.node(
            "ReduceSum", [dropped, first], attributes={"keepdims": 0}, name="dropped", dtype=FLOAT, shape=[D]
        )
        change = emit.node("Neg", [total], name="dropped", dtype=FLOAT, shape=[D])
        reduction = "add"
    else:  # nothing else is in that row, so that it becomes zero to the last bit
        change, reduction = emit.constant(np.zeros(D, np.float32), "nothing_left"), "none"
    target = emit.constant(np.asarray(shape, np.int64), "padding_shape")
    change = emit.node("Reshape", [change, target], name="correction", dtype=FLOAT, shape=shape)
    gradient = old
    if old.dtype not in (None, FLOAT):
        gradient = emit.node("Cast", [old], attributes={"to": FLOAT}, name="gradient", dtype=FLOAT)
    new = emit.node(
        "ScatterElements",
        [gradient, index, change],
        attributes={"axis": axis, "reduction": reduction},
        name="gradient",
        dtype=FLOAT,
        shape=old.shape,
    )
    if old.dtype is not None and old.dtype != FLOAT:
        new = emit.node(
            "Cast", [new], attributes={"to": old.dtype}, name="gradient", dtype=old.dtype, shape=old.shape
        )
    name = str(old.name)
    old.name = emit.unique_name(f"{name}.with_padding")
    new.name = name
    outputs = emit.model.graph.outputs
    for position, value in enumerate(outputs):
        if value is old:
            outputs[position] = new
    emit.count(edited=1)


def _places(site: SiteMatch, row: int) -> tuple[np.ndarray, int, list[int]]:
    """Return where one table row lies in the parameter: indices, the axis they count along, their shape."""
    D = site.pulled.embedding_dim
    match site.pulled.layout:
        case "rows":
            return np.full((1, D), row, np.int64), 0, [1, D]
        case "columns":
            return np.full((D, 1), row, np.int64), 1, [D, 1]
        case "flat":
            return np.arange(row * D, (row + 1) * D, dtype=np.int64), 0, [D]
