"""ONNX's shape inference, with its data propagation kept away from long vectors.

Where operators compute shapes (`Shape`, `Gather`, `Concat`, `Reshape`), ONNX propagates the numbers in them.
It does so for every vector whose length it knows, also for ids, biases and flat gradients, and makes a list
of that many entries: four million take half a second and 550 MB, and a vector that is declared to have 2^31
takes all memory. No shape has that many dimensions.

So nodes that could make such a list are hidden from the propagation: for that run they belong to a domain
that ONNX does not know, and what is known of their outputs stays as it is. What they do to shapes is inferred
in a run without propagation. Either run may tell the other one more, so they take turns while that helps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import ChainMap
from typing import TYPE_CHECKING, Final

import onnx

from kfac_onnx.graph.operators import BODIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["LONGEST", "inferred"]

LONGEST: Final = 4096
"""Entries that the vectors a node reads may have together for ONNX to propagate what is in them."""
_TURNS: Final = 50
"""No exporter computes shapes of shapes so often; what is left unknown then stays unknown."""


def inferred(proto: onnx.ModelProto, *, strict: bool = False) -> onnx.ModelProto:
    """Return a copy of the model with the types and shapes that ONNX infers; `strict` wants all of them.

    Raises what `onnx.shape_inference.infer_shapes` raises.
    """
    names = {dim.dim_param for _, _, dims in _declared(proto) for dim in dims if dim.dim_param}
    found, before = proto, None
    for _ in range(_TURNS):
        told, long = found, _long_nodes(found)
        if long:
            found = _with_sizes_of_data(proto) if before is None else found
            _forget_names(found, names)
            found = _run(found, strict=strict, propagate=False)
            long = _long_nodes(found)
        news = found is not told and _facts(found, names) != _facts(told, names)
        if before is not None and not news and not long < before:
            break
        if found is not proto:
            _forget_names(found, names)
        domains = _hide(found, long)
        found = _run(found, strict=strict, propagate=True)
        _show(found, domains)
        before = long
    return found


def _facts(proto: onnx.ModelProto, names: set[str]) -> set[tuple[int, str, tuple[int | str, ...]]]:
    """Return the shapes that are declared, without the names that ONNX gave to open dimensions."""
    return {
        (
            place,
            name,
            tuple(dim.dim_value or (dim.dim_param if dim.dim_param in names else "") for dim in dims),
        )
        for place, name, dims in _declared(proto)
    }


def _forget_names(proto: onnx.ModelProto, names: set[str]) -> None:
    """Leave the dimensions open that ONNX gave other names than these: it would keep them for good."""
    for _, _, dims in _declared(proto):
        for dim in dims:
            if dim.HasField("dim_param") and dim.dim_param not in names:
                dim.ClearField("dim_param")


def _declared(proto: onnx.ModelProto) -> Iterable[tuple[int, str, Sequence[onnx.TensorShapeProto.Dimension]]]:
    """Yield the values whose shape is declared: the number of their graph, their name, their dimensions."""
    for number, (graph, _, _) in enumerate(_graphs(proto.graph)):
        for item in (*graph.input, *graph.value_info, *graph.output):
            if item.type.tensor_type.HasField("shape"):
                yield number, item.name, item.type.tensor_type.shape.dim


def _with_sizes_of_data(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which constants are declared as their data is: ONNX believes declarations more."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for graph, _, _ in _graphs(found.graph):
        held = {tensor.name: tensor.dims for tensor in graph.initializer}
        for item in graph.value_info:
            dims = item.type.tensor_type.shape.dim
            if item.name in held and len(dims) == len(held[item.name]):
                for dim, size in zip(dims, held[item.name], strict=True):
                    dim.dim_value = size
    return found


def _graphs(
    graph: onnx.GraphProto, around: int = -1, within: str = "", start: int = 0
) -> list[tuple[onnx.GraphProto, int, str]]:
    """Return a graph and those in it, each with the number of the one around it and the operator it is in."""
    found = [(graph, around, within)]
    for node in graph.node:
        if node.op_type in BODIES:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found += _graphs(attribute.g, start, node.op_type, start + len(found))
    return found


def _run(proto: onnx.ModelProto, *, strict: bool, propagate: bool) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(
        proto, check_type=strict, strict_mode=strict, data_prop=propagate
    )


def _long_nodes(proto: onnx.ModelProto) -> frozenset[int]:
    """Return the numbers of the nodes that may read a long vector, as `_nodes` counts them.

    A vector whose length is unknown may be long, but an input that declares none will not get one: ONNX
    leaves those of the model as they are, and says of those of a Loop only what the body declares. Calls of
    functions always count, for what is inside them.
    """
    version = max((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), default=1)
    functions = {(item.domain, item.name) for item in proto.functions}
    found: set[int] = set()
    known: list[Mapping[str, float]] = []
    first = 0
    for graph, around, within in _graphs(proto.graph):
        own = _lengths(graph, 0 if within in ("", "Loop") else math.inf)
        known.append(ChainMap(own, dict(known[around])) if around >= 0 else own)
        for number, node in enumerate(graph.node, first):
            if (node.domain, node.op_type) in functions:
                found.add(number)
            elif node.domain in ("", "ai.onnx") and _propagates(node.op_type, version):
                lengths = (known[-1].get(name, math.inf) for name in node.input if name)
                found.update([number] if sum(lengths) > LONGEST else [])
        first += len(graph.node)
    return frozenset(found)


def _lengths(graph: onnx.GraphProto, unknown: float) -> dict[str, float]:
    """Return the lengths of vectors by name: infinite where one may turn out, 0 for what is no vector.

    Of inputs that declare none it is `unknown`; what is declared twice has the longer one.
    """
    lengths: dict[str, float] = {}
    otherwise: dict[str, float] = {item.name: unknown for item in graph.input}
    for tensor in graph.initializer:
        otherwise[tensor.name] = lengths[tensor.name] = tensor.dims[0] if len(tensor.dims) == 1 else 0
    for item in (*graph.input, *graph.value_info, *graph.output):
        name = item.name
        length = _length(item.type, otherwise.get(name, math.inf))
        lengths[name] = max(length, lengths.get(name, 0))
    return lengths


def _nodes(proto: onnx.ModelProto, numbers: Iterable[int]) -> list[onnx.NodeProto]:
    """Return the nodes with these numbers: those of the graph, then those of each graph in it."""
    every: list[onnx.NodeProto] = []
    for graph, _, _ in _graphs(proto.graph):
        every += graph.node
    return [every[number] for number in numbers]


def _hide(proto: onnx.ModelProto, numbers: Iterable[int]) -> dict[int, str]:
    """Give nodes a domain that hides them; return the domains that they had."""
    taken = {item.domain for item in (*proto.functions, *proto.opset_import)}
    hidden = next(name for count in itertools.count() if (name := f"hidden.{count}") not in taken)
    nodes = dict(zip(numbers, _nodes(proto, numbers), strict=True))
    domains = {number: node.domain for number, node in nodes.items()}
    for node in nodes.values():
        node.domain = hidden
    if domains:
        proto.opset_import.add(domain=hidden, version=1)
    return domains


def _show(proto: onnx.ModelProto, domains: dict[int, str]) -> None:
    """Undo `_hide`."""
    for node, domain in zip(_nodes(proto, domains), domains.values(), strict=True):
        node.domain = domain
    if domains:
        del proto.opset_import[-1]


def _length(kind: onnx.TypeProto, unknown: float) -> float:
    """Return the length of a vector of this type, 0 for what is none, `unknown` where it does not say."""
    if not kind.WhichOneof("value"):
        return unknown
    if not kind.HasField("tensor_type"):
        return 0
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return unknown
    if len(tensor.shape.dim) != 1:
        return 0
    return tensor.shape.dim[0].dim_value if tensor.shape.dim[0].HasField("dim_value") else unknown


@functools.cache
def _propagates(operator: str, version: int) -> bool:
    """Return whether ONNX computes what is in this operator's outputs from what is in its inputs."""
    if operator == "Shape" or not 1 <= version < 1 << 31:  # a shape does not ask what is in the vector
        return False
    try:
        return onnx.defs.get_schema(operator, version, "").has_data_propagation_function
    except onnx.defs.SchemaError:
        return False
