"""Rows that the iterations of a loop look up in a table are looked up at once, before the loop.

Where the ids of an iteration depend on scan inputs, its number and outer values alone, the ids of all
iterations are computed outside; each iteration then reads its rows by its number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import Ragged, Stacked
from kfac_onnx.canonical.loops.recurrence import Read, prune
from kfac_onnx.canonical.loops.results import prune_emitted
from kfac_onnx.canonical.loops.rules import RULES
from kfac_onnx.canonical.loops.vectorizer import Vectorizer, is_table
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.operators import LOOKUPS
from kfac_onnx.graph.values import ONNX_DOMAINS

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.recurrence import Recurrence
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = ["look_up_before", "lookups_in"]


def lookups_in(loop: Recurrence, vec: Vectorizer) -> list[ir.Node]:
    """Return the nodes of a body that look up rows of a table from outside."""
    return [
        node
        for node in loop.body
        if node.op_type in LOOKUPS and node.domain in ONNX_DOMAINS and is_table(node.inputs[0], vec)
    ]


def look_up_before(loop: Recurrence, names: Context, constants: Constants) -> tuple[Recurrence, int]:
    """Hoist the lookups of a body that can be; return the loop as it then is, and how many there were."""
    vec = Vectorizer(loop, names, constants, RULES)
    found: list[tuple[ir.Node, Stacked | Ragged]] = []
    for node in lookups_in(loop, vec):
        if node.inputs[1] is loop.number:
            continue  # entry t in iteration t is a slice, as a Scan reads it
        lane = vec.lane(node.outputs[0])
        if isinstance(lane, Stacked | Ragged):
            found.append((node, lane))
    if not found:
        prune_emitted(vec.emit)
        return loop, 0
    for node, lane in found:
        read = lane if isinstance(lane, Ragged) else vec.aligned(lane)
        rows, nodes = _instance(loop, vec, read, names)
        rows.type, rows.shape = node.outputs[0].type, node.outputs[0].shape
        loop.body.insert_before(node, nodes)
        loop.substitute(node.outputs[0], rows)
    loop.graph.insert_before(loop.node, vec.emit.nodes)
    written = loop.write(names)
    prune(written.body)
    prune(written.graph, vec.emit.nodes)
    return written, len(found)


def _instance(
    loop: Recurrence, vec: Vectorizer, lane: Stacked | Ragged, names: Context
) -> tuple[ir.Value, list[ir.Node]]:
    """Return the value of the body that is an iteration's own instance, and the nodes that read it."""
    if isinstance(lane, Stacked) and loop.is_scan:
        inner = ir.Value(name=names.fresh("kfac/loop/rows"))
        loop.read.append(Read(lane.value, inner))
        return inner, []
    emit = Emitter.in_place_of(names, loop.node, "loop/body")
    number = iteration_number(loop, vec, names)
    if isinstance(lane, Stacked):
        rows = emit.op("Gather", lane.value, number, axis=0)
    else:
        place = emit.op("Reshape", number, emit.ints(1))
        start = emit.op("Gather", lane.segments.first, place, axis=0)
        end = emit.op("Add", start, emit.op("Gather", lane.segments.lengths, place, axis=0))
        rows = emit.op("Slice", lane.value, start, end, emit.ints(0))
    return rows, emit.nodes


def iteration_number(loop: Recurrence, vec: Vectorizer, names: Context) -> ir.Value:
    """Return the number of the iteration as a value of the body, int64 of rank 0."""
    if loop.number is not None:
        return loop.number
    inner = ir.Value(
        name=names.fresh("kfac/loop/number"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(())
    )
    loop.read.append(Read(vec.numbers(), inner))
    return inner
