"""Differentiation of operators that ONNX itself defines as functions of others.

Such an operator needs no rule of its own: its body is written out once more beside the node, which stays as
it is, and the body is differentiated.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol, cast

import onnx
import onnx_ir as ir

from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import RANDOM
from kfac_onnx.graph.shapes import infer_shapes
from kfac_onnx.graph.values import constant, dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kfac_onnx.autodiff.backward import Backward, Gradients

__all__ = ["has_body", "through_body"]

SMALL = 64
"""Constants of up to so many entries are known to shape inference of the body."""


class _Definitions(Protocol):
    """The part of an operator's schema that tells its definition; ONNX's own types leave it out."""

    has_function: bool
    has_context_dependent_function: bool
    function_opset_versions: list[int]
    context_dependent_function_opset_versions: list[int]

    def get_function_with_opset_version(self, version: int, /) -> bytes: ...
    def get_context_dependent_function_with_opset_version(
        self, version: int, node: bytes, types: list[bytes], /
    ) -> bytes: ...


@functools.cache
def has_body(op_type: str) -> bool:
    """Say whether ONNX defines an operator as a function of others, in some version."""
    if not onnx.defs.has(op_type):
        return False
    newest = cast("_Definitions", onnx.defs.get_schema(op_type))
    # the body of one that draws, written out once more, would draw other numbers
    return op_type not in RANDOM and (newest.has_function or newest.has_context_dependent_function)


def through_body(back: Backward) -> Gradients:
    """Differentiate a node through the operators that ONNX defines it by."""
    written = _written_out(back)
    if isinstance(written, Miss):
        return written
    nodes, results = written
    seeds = {
        results[index]: gradient
        for index, gradient in enumerate(back.gradients)
        if gradient is not None and index in results
    }
    if len(seeds) < sum(gradient is not None for gradient in back.gradients):
        return Miss("an output that the loss depends on is not in its definition")
    wrt = {value: index for index, value in reversed(list(enumerate(back.node.inputs))) if back.needs(index)}
    wanted = {value: index for value, index in wrt.items() if value is not None}
    missing: list[str] = []
    found, added = back.propagate(back.names, nodes, seeds, wanted, missing)
    if missing:
        for node in (*nodes, *added):
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        return Miss("; ".join(dict.fromkeys(line.partition(": ")[2] for line in missing)))
    back.emit.nodes.extend([*nodes, *added])
    gradients: list[ir.Value | None] = [None] * len(back.node.inputs)
    for value, gradient in found.items():  # an input given twice: its whole gradient stands at the first
        gradients[wanted[value]] = gradient
    return gradients


def _written_out(back: Backward) -> tuple[list[ir.Node], dict[int, ir.Value]] | Miss:
    """Return the nodes of the body on the node's own inputs, typed, and the values of its outputs."""
    node = back.node
    given = {f"input_{index}": value for index, value in enumerate(node.inputs) if value is not None}
    types = [_type_of(value) for value in node.inputs]
    if any(
        value is not None and not kind.HasField("tensor_type")
        for value, kind in zip(node.inputs, types, strict=True)
    ):
        return Miss("the type of one of its inputs is unknown")
    proto = onnx.NodeProto()
    proto.CopyFrom(ir.to_proto(node))
    del proto.input[:], proto.output[:]
    proto.input.extend("" if value is None else f"input_{index}" for index, value in enumerate(node.inputs))
    proto.output.extend(f"output_{index}" if value.name else "" for index, value in enumerate(node.outputs))
    function = _definition(proto, types, back.names.model.opset_imports.get("", 0))
    if function is None:
        return Miss("ONNX does not define it in this opset")
    arrays = {name: array for name, value in given.items() if (array := constant(value)) is not None}
    known = {name: array for name, array in arrays.items() if array.size <= SMALL}
    inputs = {name: types[index] for index, name in enumerate(proto.input) if name and name not in known}
    graph = onnx.helper.make_graph(
        _nodes(function, proto),
        "body",
        [onnx.helper.make_value_info(name, kind) for name, kind in inputs.items()],
        [],
        [onnx.numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    body = ir.from_proto(onnx.helper.make_model(graph, opset_imports=list(function.opset_import)))
    written = {value.name: value for item in body.graph for value in item.outputs}
    results = {
        index: value for index, name in enumerate(proto.output) if (value := written.get(name)) is not None
    }
    body.graph.outputs.extend(value for value in results.values())
    infer_shapes(body)
    body.graph.outputs.clear()
    _adopt(back, body, given)
    nodes = list(body.graph)
    body.graph.remove(nodes)
    return nodes, results


def _adopt(back: Backward, body: ir.Model, given: Mapping[str, ir.Value]) -> None:
    """Give the body's nodes the node's inputs, and names of their own."""
    for value in [*body.graph.inputs, *body.graph.initializers.values()]:
        actual = given.get(value.name or "")
        if actual is not None:
            value.replace_all_uses_with(actual)
    label = next((value.name for value in back.node.outputs if value.name), back.node.op_type)
    for item in body.graph:
        item.metadata_props["kfac.lowered"] = back.node.op_type
        for value in item.outputs:
            if value.name:
                value.name = back.names.fresh(f"grad/{label}/{value.name}")
        item.name = item.outputs[0].name
        item.version = None


def _type_of(value: ir.Value | None) -> onnx.TypeProto:
    dtype = dtype_of(value)
    if value is None or dtype is None:
        return onnx.TypeProto()
    dims = (
        None if value.shape is None else [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    )
    return onnx.helper.make_tensor_type_proto(int(dtype), dims)


def _definition(node: onnx.NodeProto, types: list[onnx.TypeProto], opset: int) -> onnx.FunctionProto | None:
    """Return the newest definition of a node's operator that its opset allows."""
    schema = cast("_Definitions", onnx.defs.get_schema(node.op_type, opset, ""))
    function = onnx.FunctionProto()
    if schema.has_function:
        versions = [version for version in schema.function_opset_versions if version <= opset]
        if versions:
            function.ParseFromString(schema.get_function_with_opset_version(max(versions)))
            return function
    if schema.has_context_dependent_function:
        versions = [
            version for version in schema.context_dependent_function_opset_versions if version <= opset
        ]
        if versions:
            found = schema.get_context_dependent_function_with_opset_version(
                max(versions), node.SerializeToString(), [kind.SerializeToString() for kind in types]
            )
            function.ParseFromString(found)
            return function
    return None


def _nodes(function: onnx.FunctionProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the function's nodes on the node's inputs, outputs and attributes instead of the formal ones."""
    schema = onnx.defs.get_schema(node.op_type)
    attributes = {attribute.name: attribute for attribute in node.attribute}
    names = dict.fromkeys(function.input, "")
    names.update(zip(function.input, node.input, strict=False))
    names.update((formal, own) for formal, own in zip(function.output, node.output, strict=False) if own)
    copies: list[onnx.NodeProto] = []
    for item in function.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(item)
        for field in (copy.input, copy.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)
        del copy.attribute[:]
        for attribute in item.attribute:
            if not attribute.ref_attr_name:
                copy.attribute.append(attribute)
                continue
            value = attributes.get(attribute.ref_attr_name)
            default = schema.attributes[attribute.ref_attr_name].default_value
            value = value if value is not None or default.type == 0 else default
            if value is not None:
                resolved = copy.attribute.add()
                resolved.CopyFrom(value)
                resolved.name = attribute.name
        copies.append(copy)
    return copies
