"""Removing what nothing uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kfac_onnx.graph.values import bodies_of
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["Dce"]


@register
@dataclass(frozen=True, kw_only=True)
class Dce(Pass):
    """Remove nodes, initializers and functions that no output needs; inputs stay.

    An initializer that is also a graph input is the default of that input and stays with it. Unused
    trailing outputs of nodes that stay are left alone. Functions that only a removed node called go too.
    """

    name: ClassVar[str] = "dce"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each removed node, initializer and function is one change."""
        nodes = initializers = 0
        for graph in reversed(list(model.graphs())):
            dead: list[ir.Node] = []
            for node in reversed(graph):
                if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                    nodes += 1 + _release(node)
                    dead.append(node)
            graph.remove(dead)
        for graph in model.graphs():
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]
                    initializers += 1
        functions = _drop_functions(model)
        log.count("nodes removed", nodes)
        log.count("initializers removed", initializers)
        log.count("functions removed", functions)
        return Changes(removed=nodes + initializers + functions)


def _release(node: ir.Node) -> int:
    """Take a dead node, and the nodes in its sub-graphs, off what they use; return how many are in those."""
    within = [inner for graph in bodies_of(node) for inner in graph.all_nodes()]
    for inner in (node, *within):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)
    return len(within)


def _drop_functions(model: ir.Model) -> int:
    """Remove the functions that no node calls, directly or through another function; return how many."""
    reached: set[ir.OperatorIdentifier] = set()
    waiting = [node.op_identifier() for node in model.graph.all_nodes()]
    while waiting:
        name = waiting.pop()
        if name in model.functions and name not in reached:
            reached.add(name)
            waiting.extend(node.op_identifier() for node in model.functions[name].all_nodes())
    unused = [name for name in model.functions if name not in reached]
    for name in unused:
        del model.functions[name]
    return len(unused)
