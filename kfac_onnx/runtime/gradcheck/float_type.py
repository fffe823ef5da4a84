"""A graph in one float type: the same operators with every float widened, for checks that need digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["narrowest", "only_for", "widened"]

_NARROW: Final = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES: Final = {
    "Cast": "to",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
}


def only_for(model: onnx.ModelProto, outputs: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of the model with these outputs alone, and only the nodes that they need."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    needed = set(outputs)
    known = {value.name: value for value in (*graph.output, *graph.value_info, *graph.input)}
    chosen = [known.get(name, onnx.ValueInfoProto(name=name)) for name in outputs]
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.output[:]
    graph.output.extend(chosen)
    inputs = [value for value in graph.input if value.name in needed]
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(inputs)
    graph.initializer.extend(initializers)
    return copy


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, its sub-graphs' included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            names.update(value.name for value in graph.output)
            for inner in graph.node:
                names |= _reads(inner)
    return names


def widened(model: onnx.ModelProto, dtype: type[np.float64] | type[np.float32]) -> onnx.ModelProto:
    """Return a copy in which every float tensor is float64, or every narrower one float32.

    Operators that ONNX Runtime has in narrower types only make a float64 copy fail to load there.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _widen_graph(copy.graph, _Target(dtype))
    return copy


class _Target:
    """The wanted type, as NumPy and ONNX name it, and the ONNX types that become it."""

    def __init__(self, dtype: type[np.float64] | type[np.float32]) -> None:
        self.dtype = dtype
        self.element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.narrow = [element for element in _NARROW if element != self.element]


def _widen_graph(graph: onnx.GraphProto, to: _Target) -> None:
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in to.narrow:
            value.type.tensor_type.elem_type = to.element
    for tensor in graph.initializer:
        _widen_tensor(tensor, to)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t, to)
            if attribute.HasField("g"):
                _widen_graph(attribute.g, to)
            for inner in attribute.graphs:
                _widen_graph(inner, to)
            if attribute.name == _TYPE_ATTRIBUTES.get(node.op_type) and attribute.i in to.narrow:
                attribute.i = to.element
        if node.op_type == "LayerNormalization" and all(item.name != "stash_type" for item in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("stash_type", to.element))
        if node.op_type == "Constant":
            _widen_constant(node, to)


def _widen_constant(node: onnx.NodeProto, to: _Target) -> None:
    """Turn a `Constant` of Python floats, which is float32, into one of a tensor of the wanted type."""
    (attribute,) = node.attribute
    if attribute.name in ("value_float", "value_floats"):
        found = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        tensor = numpy_helper.from_array(np.asarray(found, to.dtype))
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("value", tensor))


def _widen_tensor(tensor: onnx.TensorProto, to: _Target) -> None:
    if tensor.data_type in to.narrow:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(to.dtype), name))


def narrowest(model: onnx.ModelProto) -> str:
    """Return the float type with the fewest digits that the graph computes in: `FLOAT`, `FLOAT16`, ..."""
    found = {tensor.data_type for tensor in model.graph.initializer}
    found |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)}
    found |= {
        attribute.i for node in model.graph.node if node.op_type == "Cast" for attribute in node.attribute
    }
    order = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT)
    element = next((element for element in order if element in found), onnx.TensorProto.DOUBLE)
    return onnx.TensorProto.DataType.Name(element)
