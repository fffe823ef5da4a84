"""Graph surgery on protos for `partition`: free names, renaming, functions and small models.

Everything here works on names. A value of the whole-step model keeps its name in every sub-model,
so what crosses from one sub-model to the next is simply a name that both know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

__all__ = ["FunctionTable", "Item", "Source", "build_model", "free_names", "read_source", "rename"]

FunctionTable = dict[tuple[str, str], onnx.FunctionProto]

FROZEN_BYTES: Final = 64 * 1024 * 1024
"""Initializers above this many bytes are bound once as inputs rather than copied into each sub-model."""


@dataclass(frozen=True)
class Item:
    """One node with everything it reads (captured outer values too), what it makes, and its phase tag."""

    node: onnx.NodeProto
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    phase: str


@dataclass(frozen=True)
class Source:
    """A model taken apart: nodes in order, types by name, small initializers, large ones, functions."""

    items: tuple[Item, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: Mapping[str, onnx.ValueInfoProto]
    initializers: Mapping[str, ir.TensorProtocol]
    functions: FunctionTable
    opsets: tuple[tuple[str, int], ...]
    ir_version: int


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def free_names(node: onnx.NodeProto) -> tuple[str, ...]:
    """Return the names a node reads: its inputs and what its sub-graphs capture, each once, in order."""
    names = dict.fromkeys(name for name in node.input if name)
    for graph in _subgraphs(node):
        inner = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for child in graph.node:
            names.update(dict.fromkeys(name for name in free_names(child) if name not in inner))
            inner.update(child.output)
        names.update(dict.fromkeys(value.name for value in graph.output if value.name not in inner))
    return tuple(names)


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Rename, in place, every reading and making of the given names, inside sub-graphs too."""
    for field in (node.input, node.output):
        for index, name in enumerate(field):
            if name in names:
                field[index] = names[name]
    for graph in _subgraphs(node):
        for child in graph.node:
            rename(child, names)
        for value in [*graph.input, *graph.output, *graph.initializer]:
            value.name = names.get(value.name, value.name)


def _used_functions(nodes: Iterable[onnx.NodeProto], table: FunctionTable) -> FunctionTable:
    used: FunctionTable = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        key = (node.domain, node.op_type)
        if key in table and key not in used:
            used[key] = table[key]
            pending.extend(table[key].node)
        for graph in _subgraphs(node):
            pending.extend(graph.node)
    return used


def read_source(model: ir.Model) -> Source:
    """Take a model apart; tensors are not copied."""
    graph = model.graph
    items: list[Item] = []
    types: dict[str, onnx.ValueInfoProto] = {}

    def note(value: ir.Value) -> None:
        if value.name and value.type is not None:
            types[value.name] = ir.serde.serialize_value(value)

    for value in (*graph.inputs, *graph.initializers.values()):
        note(value)
        tensor = value.const_value
        if value.name and value.name not in types and tensor is not None:
            types[value.name] = onnx.helper.make_tensor_value_info(
                value.name, int(tensor.dtype), [int(size) for size in tensor.shape.numpy()]
            )
    for node in graph:
        proto = ir.serde.serialize_node(node)
        phase = node.metadata_props.get("kfac.phase", "gradients")
        for output in node.outputs:
            note(output)
        items.append(Item(proto, free_names(proto), tuple(name for name in proto.output if name), phase))
    functions = {
        (function.domain, function.name): ir.serde.serialize_function(function)
        for function in model.functions.values()
    }
    initializers = {
        name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None
    }
    return Source(
        items=tuple(items),
        inputs=tuple(value.name for value in graph.inputs if value.name),
        outputs=tuple(value.name for value in graph.outputs if value.name),
        types=types,
        initializers=initializers,
        functions=functions,
        opsets=tuple(model.opset_imports.items()),
        ir_version=model.ir_version,
    )


def with_functions(source: Source, functions: Mapping[str, ir.Function]) -> Source:
    """Return the source with the bodies of the `ai.kfac` functions it has exchanged for these."""
    table = dict(source.functions)
    for function in functions.values():
        if (function.domain, function.name) in table:
            table[function.domain, function.name] = ir.serde.serialize_function(function)
    return dataclasses.replace(source, functions=table)


def _info(source: Source, name: str, inputs: frozenset[str]) -> onnx.ValueInfoProto:
    """Return what is known of a value, with names of dimensions for the whole model's own `inputs` only.

    Between stages equal names would promise ONNX Runtime equal sizes.
    """
    known = source.types.get(name)
    if known is None:
        return onnx.ValueInfoProto(name=name)
    info = onnx.ValueInfoProto()
    info.CopyFrom(known)
    if name not in inputs:
        for dim in info.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    return info


def build_model(
    source: Source,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    *,
    name: str,
    as_inputs: Collection[str] = (),
    extra: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Make a model of these nodes that leaves these outputs.

    What the nodes read and do not make becomes an initializer where the source has a small one, and
    an input otherwise or where `as_inputs` says so. A value of unknown type gets no type; whoever loads the
    model fills in the input's from the session that makes the value.
    """
    made = {made for node in nodes for made in node.output}
    given = {tensor.name for tensor in extra}
    inputs = frozenset(source.inputs)
    needed = dict.fromkeys(read for node in nodes for read in free_names(node))
    needed.update(dict.fromkeys(outputs))
    graph = onnx.GraphProto(name=name)
    graph.node.extend(nodes)
    graph.initializer.extend(extra)
    for read in needed:
        if read in made or read in given:
            continue
        tensor = source.initializers.get(read)
        if tensor is not None and read not in as_inputs and tensor.nbytes <= FROZEN_BYTES:
            copied = ir.serde.serialize_tensor(tensor)
            copied.name = read
            graph.initializer.append(copied)
        else:
            graph.input.append(_info(source, read, inputs))
    graph.output.extend(_info(source, output, inputs) for output in outputs)
    functions = _used_functions(nodes, source.functions)
    model = onnx.ModelProto(ir_version=source.ir_version, producer_name="kfac-onnx", graph=graph)
    model.functions.extend(functions.values())
    domains = dict(source.opsets)
    for function in functions.values():
        domains.setdefault(function.domain, 1)
        for opset in function.opset_import:
            domains.setdefault(opset.domain, opset.version)
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()
    )
    return model
