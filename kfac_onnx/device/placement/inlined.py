"""A model without its own functions: their bodies in place, each node knowing whose body it was in.

onnxruntime does the same before it places nodes. (onnx's own inliner does not say where a node came from.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx

from kfac_onnx.device.placement.records import is_inserted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Origin", "inline"]


@dataclass(frozen=True)
class Origin:
    """Whether a node is this package's, and the `ai.kfac` operator and node whose body it was in."""

    inserted: bool
    operator: str | None = None


def inline(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Origin]]:
    """Return the model with its functions in place, every node named, and the nodes' origins by name."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    functions = {(function.domain, function.name): function for function in model.functions}
    inliner = _Inliner(functions)
    nodes = inliner.run(model.graph.node, None)
    del made.graph.node[:], made.functions[:]
    made.graph.node.extend(nodes)
    return made, inliner.origins


class _Inliner:
    def __init__(self, functions: Mapping[tuple[str, str], onnx.FunctionProto]) -> None:
        self._functions = functions
        self.origins: dict[str, Origin] = {}
        self._calls = 0

    def run(self, nodes: Iterable[onnx.NodeProto], parent: Origin | None) -> list[onnx.NodeProto]:
        done: list[onnx.NodeProto] = []
        for node in nodes:
            origin = parent or _origin(node)
            function = self._functions.get((node.domain, node.op_type))
            if function is not None:
                done += self.run(self._body(function, node), origin)
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = self._name(copy)
            self.origins[copy.name] = origin
            for attribute in copy.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    inner = self.run(attribute.g.node, None if parent is None else parent)
                    del attribute.g.node[:]
                    attribute.g.node.extend(inner)
            done.append(copy)
        return done

    def _name(self, node: onnx.NodeProto) -> str:
        name = base = node.name or next((output for output in node.output if output), node.op_type)
        number = 1
        while name in self.origins:
            number += 1
            name = f"{base}_{number}"
        return name

    def _body(self, function: onnx.FunctionProto, call: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes of one call, values and attributes as the caller gives them."""
        self._calls += 1
        names = {
            **dict(zip(function.input, [*call.input, *[""] * len(function.input)], strict=False)),
            **dict(zip(function.output, call.output, strict=False)),
        }
        given = {attribute.name: attribute for attribute in call.attribute}
        prefix = f"{call.name or call.op_type}#{self._calls}"
        return [_instance(node, names, given, prefix) for node in function.node]


def _origin(node: onnx.NodeProto) -> Origin:
    tags = {entry.key for entry in node.metadata_props}
    inserted = "kfac.pass" in tags or is_inserted(node.name) or node.domain == "ai.kfac"
    return Origin(inserted, node.op_type if node.domain == "ai.kfac" else None)


def _instance(
    node: onnx.NodeProto,
    names: dict[str, str],
    given: Mapping[str, onnx.AttributeProto],
    prefix: str,
) -> onnx.NodeProto:
    """Return a body's node in its caller; what it makes gets a name of its own, added to `names`."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name = f"{prefix}/{node.name or node.output[0]}"
    made.input[:] = [names.get(name, name) for name in node.input]
    made.output[:] = [names.setdefault(name, f"{prefix}/{name}") if name else "" for name in node.output]
    del made.attribute[:]
    for attribute in node.attribute:
        value = given.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if value is None:
            continue
        copy = made.attribute.add()
        copy.CopyFrom(value)
        copy.name = attribute.name
        if copy.type == onnx.AttributeProto.GRAPH:
            inner = dict(names)
            nodes = [_instance(child, inner, given, prefix) for child in attribute.g.node]
            del copy.g.node[:]
            copy.g.node.extend(nodes)
            for output in copy.g.output:
                output.name = inner.get(output.name, output.name)
    return made
