"""What every model file must satisfy before anything else looks at it.

A parser of protocol buffers accepts a great deal that is no model: functions that call themselves, tensors
whose data does not fill their shape, operators without their inputs. Here each of these is one sentence, so
that the rules behind may rely on it:

1. functions do not call themselves, and inlining them does not multiply the graph;
2. tensors have a known element type, a shape without negative dimensions, and as much data as it says;
3. names are unique in their graph, inputs and initializers have one, and what is read is made somewhere;
4. nodes of known operators have the inputs, outputs and attribute types that their operator wants.

Whether nodes can be ordered, and whether types and shapes fit, is found out later.

Source: the ONNX specification, docs/IR.md; the schemas of `onnx.defs`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import onnx

from kfac_onnx.disk.memory import array_problem
from kfac_onnx.disk.signatures import signature_problems
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from google.protobuf.message import Message

__all__ = ["all_tensors", "byte_size", "require_wellformed", "tensor_problem"]

_MOST_NODES: Final = 200_000
_GROWTH: Final = 100
_MOST_WORK: Final = 20_000_000
"""Inlined functions may make this many nodes, or as many times those of the file, whichever is more;
and so many names may be tried until each has its own (some five seconds)."""

Key: TypeAlias = tuple[str, str]
Body: TypeAlias = "onnx.GraphProto | onnx.FunctionProto"

_FIELDS: Final[dict[int, tuple[str, int]]] = {
    onnx.TensorProto.FLOAT: ("float_data", 1),
    onnx.TensorProto.COMPLEX64: ("float_data", 2),
    onnx.TensorProto.DOUBLE: ("double_data", 1),
    onnx.TensorProto.COMPLEX128: ("double_data", 2),
    onnx.TensorProto.INT64: ("int64_data", 1),
    onnx.TensorProto.UINT32: ("uint64_data", 1),
    onnx.TensorProto.UINT64: ("uint64_data", 1),
    onnx.TensorProto.STRING: ("string_data", 1),
}
"""Element type -> the field that holds it where `raw_data` does not, and entries per element; int32_data for
all others."""
_HALF_BYTES: Final = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1")
    if hasattr(onnx.TensorProto, name)
)
_QUARTER_BYTES: Final = frozenset(
    getattr(onnx.TensorProto, name) for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)
)


def require_wellformed(proto: onnx.ModelProto, place: str | None) -> None:
    """Raise UserError for the first thing in a model that breaks one of the rules above."""
    problem = next(_problems(proto), None)
    if problem is not None:
        raise UserError(
            f"the ONNX model is malformed: {problem}", place=place, help="export it again, or copy it again"
        )


def _problems(proto: onnx.ModelProto) -> Iterator[str]:
    yield from _texts_that_are_none(proto)
    yield from _inputs_without_type(proto.graph)
    version = _standard_version(proto.opset_import) or 1
    yield from _function_problems(proto)
    yield from _graph_problems(proto.graph, _Scope(version))
    for function in proto.functions:
        for problem in _body_problems(function, _Scope(_standard_version(function.opset_import) or version)):
            yield f"function {function.domain}::{function.name}: {problem}"
    forward = _Scope(version, frozenset(_values_of(proto.graph)))  # a training graph reads those of the model
    for training in proto.training_info:
        for graph in (training.initialization, training.algorithm):
            yield from _graph_problems(graph, forward)


def _texts_that_are_none(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield what should be text and is not UTF-8: the parser hands it out as bytes."""
    from google.protobuf.message import Message

    stack: list[Message] = [proto]
    while stack:
        message = stack.pop()
        if isinstance(message, onnx.TensorProto):  # its numbers are many, and its texts are these
            found: list[object] = [message.name, message.doc_string]
            stack.extend(message.external_data)
        else:
            found = []
            for field, value in message.ListFields():
                items: list[Any] = [value] if isinstance(value, (Message, str, bytes)) else value
                if field.cpp_type == field.CPPTYPE_MESSAGE:
                    stack.extend(items)
                elif field.type == field.TYPE_STRING:
                    found.extend(items)
        for text in found:
            if isinstance(text, bytes):
                yield f"{text!r} stands where a text should be"


def _inputs_without_type(graph: onnx.GraphProto) -> Iterator[str]:
    known = onnx.TensorProto.DataType.values()
    for item in graph.input:
        tensor = item.type.tensor_type
        if item.type.HasField("tensor_type") and (tensor.elem_type not in known or not tensor.elem_type):
            yield f"its input '{item.name}' has no known element type ({tensor.elem_type})"
        elif not item.type.WhichOneof("value"):
            yield f"its input '{item.name}' has no type"


def _standard_version(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Return the opset of the standard operators, 0 where it is not said."""
    return max((item.version for item in imports if item.domain in ("", "ai.onnx")), default=0)


def _values_of(graph: onnx.GraphProto) -> Iterator[str]:
    for item in (*graph.input, *graph.initializer):
        yield item.name
    for node in graph.node:
        yield from node.output


# ------------------------------------------------------------------------------------------------ functions


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        if node.attribute:
            for body in _bodies(node):
                yield from _all_nodes(body.node)


def _function_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield a function that reaches itself, and a graph that functions would blow up."""
    if not proto.functions:
        return
    functions = {(item.domain, item.name): list(_all_nodes(item.node)) for item in proto.functions}
    if len(functions) < len(proto.functions):
        yield "it holds two functions of the same name"
        return
    sizes: dict[Key, int] = {}
    open_calls: set[Key] = set()
    for first in functions:
        stack = [first]
        while stack:
            key = stack[-1]
            callees = {(node.domain, node.op_type) for node in functions[key]} & functions.keys()
            left = [callee for callee in callees if callee not in sizes]
            if key in sizes or not left:
                if key not in sizes:
                    sizes[key] = _expanded(functions[key], sizes)
                open_calls.discard(key)
                stack.pop()
                continue
            open_calls.add(key)
            for callee in left:
                if callee in open_calls:
                    yield f"function {callee[0]}::{callee[1]} calls itself"
                    return
            stack.append(left[0])
    own = list(_all_nodes(proto.graph.node))
    written = len(own) + sum(map(len, functions.values()))
    if _expanded(own, sizes) > max(_MOST_NODES, _GROWTH * written):
        yield f"its functions multiply {written} nodes to more than {max(_MOST_NODES, _GROWTH * written)}"
    elif _work_of_naming(own, functions, list(sizes)) > _MOST_WORK:
        yield f"its functions multiply {written} nodes to too many of the same name"


def _expanded(nodes: list[onnx.NodeProto], sizes: dict[Key, int]) -> int:
    """Return how many nodes these are once every call is replaced by the nodes of its function."""
    return sum(sizes.get((node.domain, node.op_type), 1) for node in nodes)


def _work_of_naming(
    own: list[onnx.NodeProto], functions: dict[Key, list[onnx.NodeProto]], callees_first: list[Key]
) -> int:
    """Return how many names are tried when functions are inlined: for n equal ones, n of them n times."""
    times: Counter[Key] = Counter((node.domain, node.op_type) for node in own)
    names: Counter[str] = Counter()
    for key in reversed(callees_first):
        for node in functions[key]:
            times[node.domain, node.op_type] += times[key]
            names[f"node {node.name}" if node.name else f"node {id(node)}"] += times[key]
            names.update(dict.fromkeys(node.output, times[key]))
    return sum(count * count for count in names.values()) // 2


# ------------------------------------------------------------------------------------------------- tensors


def tensor_problem(tensor: onnx.TensorProto) -> str | None:
    """Return what is wrong with a tensor, None if nothing is; data in another file is not looked at."""
    name = f"tensor '{tensor.name}'"
    known = tensor.data_type in onnx.TensorProto.DataType.values()
    if not known or tensor.data_type == onnx.TensorProto.UNDEFINED:
        return f"{name} has no known element type ({tensor.data_type})"
    if any(dim < 0 for dim in tensor.dims):
        return f"{name} has a negative dimension: {list(tensor.dims)}"
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if (problem := array_problem(tuple(tensor.dims), dtype)) is not None:
        return f"{name} is of no shape that an array can have: {problem}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    size = math.prod(tensor.dims)
    if tensor.HasField("raw_data") and tensor.data_type != onnx.TensorProto.STRING:
        held, needed, unit = len(tensor.raw_data), byte_size(tensor), "bytes"
    else:
        field, each = _FIELDS.get(tensor.data_type, ("int32_data", 1))
        held, needed, unit = len(getattr(tensor, field)), size * each, "entries"
        if field == "int32_data" and tensor.data_type in _HALF_BYTES | _QUARTER_BYTES:
            needed = byte_size(tensor)
    if held != needed:
        return f"{name} of shape {list(tensor.dims)} holds {held} {unit} instead of {needed}"
    return None


def byte_size(tensor: onnx.TensorProto) -> int:
    """Return how many bytes the data of a tensor of numbers takes."""
    size = math.prod(tensor.dims)
    if tensor.data_type in _HALF_BYTES:
        return (size + 1) // 2
    if tensor.data_type in _QUARTER_BYTES:
        return (size + 3) // 4
    return size * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers and attributes, of every graph and function."""
    graphs = [proto.graph]
    for training in proto.training_info:
        graphs += [training.initialization, training.algorithm]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for item in graph.sparse_initializer:
                yield from (item.values, item.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


# -------------------------------------------------------------------------------------------- graphs, nodes


@dataclass(frozen=True)
class _Scope:
    """The names that a graph may read, its own and those of the graphs around it; the standard opset."""

    version: int
    names: frozenset[str] = frozenset()
    around: _Scope | None = None

    def knows(self, name: str) -> bool:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return True
            scope = scope.around
        return False


def _graph_problems(graph: onnx.GraphProto, scope: _Scope) -> Iterator[str]:
    for tensor in graph.initializer:
        problem = tensor_problem(tensor)
        if problem is not None:
            yield problem
    if graph.sparse_initializer:
        yield f"graph '{graph.name}' has sparse initializers, which are not supported"
    yield from _body_problems(graph, scope)


def _body_problems(body: Body, scope: _Scope) -> Iterator[str]:
    own: set[str] = set()
    yield from _name_problems(body, own)
    inner = _Scope(scope.version, frozenset(own), scope)
    for node in body.node:
        yield from _node_problems(node, inner)
    for item in body.output:
        name = item if isinstance(item, str) else item.name
        if not inner.knows(name):
            yield f"nothing makes its output '{name}'"


def _name_problems(body: Body, taken: set[str]) -> Iterator[str]:
    """Yield names that are missing or stand twice; fill `taken` with the names of a graph's own values."""
    if isinstance(body, onnx.FunctionProto):
        names: list[str] = list(body.input)
    else:
        names = [item.name for item in body.input]
        inputs = set(names)
        names += [item.name for item in body.initializer if item.name not in inputs]
        held = [item.name for item in body.initializer]
        if len(set(held)) < len(held):
            yield f"two initializers are named '{next(name for name in held if held.count(name) > 1)}'"
    for name in names:
        if not name:
            yield "an input or an initializer has no name"
        elif name in taken:
            yield f"two inputs or initializers are named '{name}'"
        taken.add(name)
    for node in body.node:
        for name in node.output:
            if name and name in taken:
                yield f"the output '{name}' of {_label(node)} has the name of another value"
            taken.add(name)


def _label(node: onnx.NodeProto) -> str:
    domain = f"{node.domain}::" if node.domain else ""
    named = next((name for name in node.output if name), node.name)
    return f"node {domain}{node.op_type} '{named}'"


def _node_problems(node: onnx.NodeProto, scope: _Scope) -> Iterator[str]:
    for name in node.input:
        if name and not scope.knows(name):
            yield f"{_label(node)} reads '{name}', which nothing makes"
    names = [attribute.name for attribute in node.attribute]
    if len(set(names)) < len(names):
        yield f"{_label(node)} has an attribute twice"
    for attribute in node.attribute:
        if attribute.HasField("t"):
            problem = tensor_problem(attribute.t)
            if problem is not None:
                yield f"{_label(node)}: {problem}"
    for problem in signature_problems(node, scope.version):
        yield f"{_label(node)} {problem}"
    for body in _bodies(node):
        yield from _graph_problems(body, scope)
