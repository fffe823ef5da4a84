"""Sequences of known parts as tensors: PyTorch's unoptimized exports split through a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.graph.emit import Emit, Names, replace_node
from kfac_onnx.graph.values import all_graphs, constant, int_attribute

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["split_without_sequences"]


def split_without_sequences(model: ir.Model) -> int:
    """Make a Split of every SplitToSequence that is read by SequenceAt alone; return how many.

    Lengths and positions must be constants; other sequences stay.
    """
    names = Names(model)
    count = 0
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            if node.op_type == "SplitToSequence" and not node.domain and _split(names, node):
                count += 1
    return count


def _split(names: Names, node: ir.Node) -> bool:
    lengths = _lengths(node)
    readers = [reader for reader, _ in node.outputs[0].uses()]
    places = [constant(reader.inputs[1]) for reader in readers if reader.op_type == "SequenceAt"]
    known = [int(place.reshape(())) for place in places if place is not None and place.size == 1]
    if lengths is None or not readers or len(known) < len(readers) or node.outputs[0].is_graph_output():
        return False
    if any(reader.graph is not node.graph for reader in readers):
        return False
    emit = Emit(names, node, "split")
    axis = int_attribute(node, "axis", 0)
    parts = emit.many("Split", [node.inputs[0], emit.ints(*lengths)], len(lengths), {"axis": axis})
    graph = node.graph
    if graph is None:
        return False
    graph.insert_before(node, emit.nodes)
    for reader, place in zip(readers, known, strict=True):
        replace_node(reader, Emit(names, reader, "split"), [parts[place]])
    graph.remove(node, safe=True)
    return True


def _lengths(node: ir.Node) -> tuple[int, ...] | None:
    """Return the lengths of the parts along the axis, where the graph says them."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    split = constant(given)
    if split is None:
        return None
    if split.ndim == 1:
        return tuple(int(length) for length in split)
    whole, axis = node.inputs[0], int_attribute(node, "axis", 0)
    size = None if whole is None or whole.shape is None else whole.shape[axis]
    if not isinstance(size, int):  # the batch may be of any size: only the axis that is split counts
        return None
    step = int(split.reshape(()))
    return tuple(int(min(step, size - start)) for start in np.arange(0, size, step))
