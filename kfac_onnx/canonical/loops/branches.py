"""An If whose condition is always the same is the branch that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.loops.recurrence import prune
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs

if TYPE_CHECKING:
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = ["take_known_branches"]


def take_known_branches(model: ir.Model, names: Context, constants: Constants) -> int:
    """Put the nodes of the branch taken in the place of every If with a constant condition; count them."""
    taken = 0
    again = True
    while again:
        again = False
        for graph in list(all_graphs(model.graph)):
            for node in list(graph):
                if node.op_type != "If" or node.domain not in ONNX_DOMAINS or node.graph is not graph:
                    continue
                condition = constants.constant(node.inputs[0])
                if condition is None or condition.size != 1:
                    continue
                _take(graph, node, names, chosen=bool(condition.reshape(())))
                taken += 1
                again = True
    return taken


def _take(graph: ir.Graph, node: ir.Node, names: Context, *, chosen: bool) -> None:
    branch = node.attributes["then_branch" if chosen else "else_branch"].as_graph()
    other = node.attributes["else_branch" if chosen else "then_branch"].as_graph()
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        graph.register_initializer(value)
    nodes = list(branch)
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    other.outputs.clear()
    prune(other)
    for old, new in zip(node.outputs, results, strict=True):
        result = new
        name = old.name
        if old.is_graph_output():  # the output keeps its name
            copy = ir.Node("", "Identity", [new], num_outputs=1)
            graph.insert_before(node, copy)
            result = copy.outputs[0]
            result.type, result.shape = old.type, old.shape
        elif new.shape is None and old.shape is not None:
            new.shape, new.type = old.shape, new.type or old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        if result is not new:
            old.name = names.fresh(f"kfac/loop/{name}")
            result.name = name
    graph.remove(node, safe=True)
