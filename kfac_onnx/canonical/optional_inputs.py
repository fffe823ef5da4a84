"""Inputs that may be left out, made inputs that are always there.

A training step reads every input at every step. So an optional tensor is a tensor, `OptionalGetElement` reads
it, `OptionalHasElement` says yes, and a branch for when it is left out is never taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kfac_onnx.pipeline.log import Log

__all__ = ["RequireOptionalInputs", "require_optional_inputs"]


def require_optional_inputs(model: ir.Model) -> list[str]:
    """Make every optional tensor of a graph a tensor, in place; return a note that names the inputs."""
    inputs = [value for value in model.graph.inputs if _is_optional_tensor(value)]
    for value in inputs:
        _unwrap(value)
    nodes = list(_optional_nodes(model))
    if not nodes:
        return _note(inputs)
    names = Context.of(model)
    for node in nodes:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "OptionalHasElement":
            if source is None or _is_optional(source):
                present = _presence(source)
                if present is None:
                    continue
            else:
                present = True
            node.outputs[0].replace_all_uses_with(
                names.constant(np.array(present)), replace_graph_outputs=True
            )
        elif source is not None and not _is_optional(source):  # Optional(x) and OptionalGetElement(x) are x
            _unwrap(node.outputs[0])
            node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=False)
            if node.outputs[0].is_graph_output():
                copy = ir.node("Identity", [source])
                copy.outputs[0].name = node.outputs[0].name
                copy.outputs[0].type, copy.outputs[0].shape = source.type, source.shape
                if node.graph is not None:
                    node.graph.insert_before(node, copy)
                node.outputs[0].replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
        else:
            continue
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    return _note(inputs)


def _note(inputs: list[ir.Value]) -> list[str]:
    if not inputs:
        return []
    listed = ", ".join(str(value.name) for value in inputs)
    return [f"optional inputs must be given at every step: {listed}"]


def _optional_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            if node.domain in ONNX_DOMAINS and node.op_type.startswith("Optional"):
                yield node


def _is_optional(value: ir.Value) -> bool:
    producer = value.producer()
    return isinstance(value.type, ir.OptionalType) or (
        producer is not None and producer.op_type == "Optional"
    )


def _is_optional_tensor(value: ir.Value) -> bool:
    return isinstance(value.type, ir.OptionalType) and isinstance(value.type.elem_type, ir.TensorType)


def _unwrap(value: ir.Value) -> None:
    if isinstance(value.type, ir.OptionalType):
        value.type = value.type.elem_type


def _presence(value: ir.Value | None) -> bool | None:
    """Return whether an optional holds something; None where that is not seen."""
    if value is None:
        return False
    node = value.producer()
    if node is None or node.op_type != "Optional":
        return None
    return bool(node.inputs) and node.inputs[0] is not None


@register
@dataclass(frozen=True, kw_only=True)
class RequireOptionalInputs(Pass):
    """Make inputs that may be left out inputs that are always given.

    An optional tensor becomes a tensor, OptionalGetElement what it reads, OptionalHasElement true. What the
    graph itself makes optional is what is in it.
    """

    name: ClassVar[str] = "require-optional-inputs"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        inputs = any(_is_optional_tensor(value) for value in model.graph.inputs)
        if not inputs and next(_optional_nodes(model), None) is None:
            return NO_CHANGES
        census = Census(model)
        for note in require_optional_inputs(model):
            log.note(note)
        return census.changes()
