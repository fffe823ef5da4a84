"""Removing what nothing uses."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import onnx
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from kfac_onnx.graph.values import all_graphs, bodies_of
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

    An initializer that is also a graph input is the default of that input and stays with it. Optional
    outputs at the end of a node that nobody reads go, and inputs at its end that are missing. Functions that
    only a removed node called go too.
    """

    name: ClassVar[str] = "dce"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each node, initializer and function that goes, or node cut, is a change."""
        nodes = initializers = edited = 0
        for graph in reversed(list(all_graphs(model.graph))):
            dead: list[ir.Node] = []
            for node in reversed(graph):
                if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                    nodes += 1 + _release(node)
                    dead.append(node)
                else:
                    edited += _trim(node, model.opset_imports.get("", 1))
            graph.remove(dead)
        for graph in all_graphs(model.graph):
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]
                    initializers += 1
        functions = len(model.functions)
        if functions:
            RemoveUnusedFunctionsPass()(model)
            functions -= len(model.functions)
        log.count("nodes removed", nodes)
        log.count("initializers removed", initializers)
        log.count("functions removed", functions)
        return Changes(removed=nodes + initializers + functions, edited=edited)


def _release(node: ir.Node) -> int:
    """Take a dead node, and the nodes in its sub-graphs, off what they use; return how many are in those."""
    within = [inner for graph in bodies_of(node) for inner in graph.all_nodes()]
    for inner in (node, *within):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)
    return len(within)


def _trim(node: ir.Node, opset: int) -> bool:
    """Drop what is at the end of a node and serves nobody; say whether anything was."""
    inputs, outputs = list(node.inputs), list(node.outputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    while len(outputs) > 1 and _is_spare(node, len(outputs) - 1, opset):
        outputs.pop()
    if len(inputs) == len(node.inputs) and len(outputs) == len(node.outputs):
        return False
    node.resize_inputs(len(inputs))
    node.resize_outputs(len(outputs))
    return True


def _is_spare(node: ir.Node, index: int, opset: int) -> bool:
    value = node.outputs[index]
    if value.uses() or value.is_graph_output():
        return False
    return not value.name or (not node.domain and index >= _needed_outputs(node.op_type, opset))


@cache
def _needed_outputs(op_type: str, opset: int) -> int:
    """Return how many outputs a standard operator always has; all of those that come in any number."""
    kind = onnx.defs.OpSchema.FormalParameterOption
    try:
        outputs = onnx.defs.get_schema(op_type, opset, "").outputs
    except onnx.defs.SchemaError:
        return sys.maxsize
    if op_type == "BatchNormalization" or any(output.option == kind.Variadic for output in outputs):
        return sys.maxsize  # before opset 14, the number of a BatchNormalization's outputs says what it does
    return sum(output.option != kind.Optional for output in outputs)
