"""What is known of a value without running the graph: dtype, static shape, constant contents."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.operators import BODIES, NO_GRADIENT, VIEWS, Keeps, Trait, having, keeping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = [
    "ONNX_DOMAINS",
    "all_graphs",
    "ancestors",
    "bodies_of",
    "carrying",
    "constant",
    "contents_of",
    "descendants",
    "dtype_of",
    "graphs_of",
    "int_attribute",
    "is_filled",
    "is_float",
    "label",
    "operators_in",
    "rank_of",
    "static_shape",
    "unchanged",
]

ONNX_DOMAINS = ("", "ai.onnx")
"""Two spellings of the standard operator domain."""

REMEMBERED = "kfac.dtype"
INT64_RESULTS = having(Trait.INT64)
BOOL_RESULTS = having(Trait.BOOLEAN)
SPREADS = VIEWS | keeping(Keeps.REPEATS)
LIKE_INPUT = {
    "Where": 1,
    "CastLike": 1,
    "OneHot": 2,
    "DequantizeLinear": 1,
    "QuantizeLinear": 2,
    "GatherGrad": 2,
    "GatherNDGrad": 2,
    "SoftmaxCrossEntropyLossGrad": 1,
    "SoftmaxCrossEntropyLossInternalGrad": 1,
}
"""Operators whose first result has the element type of another input than the first."""
SECOND_RESULTS = {
    "Dropout": ir.DataType.BOOL,
    "ConcatTraining": ir.DataType.INT64,
    "TopK": ir.DataType.INT64,
    "MaxPool": ir.DataType.INT64,
    "Unique": ir.DataType.INT64,
    "LayerNormalization": ir.DataType.FLOAT,
}
"""Element type of the results after the first, where it differs from the first input's."""


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a value if every dimension is a number, otherwise None."""
    if value is None:
        return None
    if value.const_value is not None:
        return tuple(int(dim) for dim in value.const_value.shape.numpy())
    if value.shape is None:
        return None
    dims = [dim for dim in value.shape if isinstance(dim, int)]
    return tuple(dims) if len(dims) == len(value.shape) else None


def rank_of(value: ir.Value | None) -> int | None:
    """Return the number of dimensions of a value, or None where the graph does not say."""
    if value is None:
        return None
    if value.const_value is not None:
        return len(value.const_value.shape)
    return None if value.shape is None else len(value.shape)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer that is no graph input, or of a Constant node, otherwise None.

    Identity and casts are looked through, and Unsqueeze and Squeeze of a single entry.
    """
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is not None and node.op_type == "Identity":
        return constant(node.inputs[0])
    if node is not None and node.op_type in ("Unsqueeze", "Squeeze"):
        source = constant(node.inputs[0])
        if source is None or source.size != 1:
            return None
        return source.reshape((1,) * (source.ndim + 1) if node.op_type == "Unsqueeze" else ())
    if node is not None and node.op_type in ("Cast", "CastLike") and value.dtype is not None:
        source = constant(node.inputs[0])
        return None if source is None else source.astype(value.dtype.numpy())
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def contents_of(tensor: ir.TensorProtocol) -> bytes:
    """Return bytes that are equal for two tensors of one dtype and shape just if their entries are."""
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    return tensor.tobytes()


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node, or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """Return the element type of a value: what the graph says, else what its producer implies.

    An answer found through the producer is remembered, but not written into the model: ONNX has no place
    for a type without a shape. None means that it cannot be told.
    """
    chain: list[ir.Value] = []
    found: ir.DataType | None = None
    while value is not None:
        known = value.dtype or _remembered(value)
        if known is not None:
            found = known
            break
        if value.const_value is not None:
            found = value.const_value.dtype
            break
        chain.append(value)
        answer = _from_producer(value)
        if isinstance(answer, ir.Value):
            value = answer
            continue
        found = answer
        break
    if found is not None:
        for item in chain:
            item.meta[REMEMBERED] = found
    return found


def _remembered(value: ir.Value) -> ir.DataType | None:
    store = cast("Mapping[str, ir.DataType]", value.meta)
    return store.get(REMEMBERED)


def _from_producer(value: ir.Value) -> ir.DataType | ir.Value | None:
    """Return the element type, or the value that has the same one."""
    node = value.producer()
    if node is None:
        return None
    if value is not node.outputs[0] and node.op_type in SECOND_RESULTS:
        return SECOND_RESULTS[node.op_type]
    if node.op_type in INT64_RESULTS:
        return ir.DataType.INT64
    if node.op_type in BOOL_RESULTS:
        return ir.DataType.BOOL
    if node.op_type == "Cast":
        to = node.attributes.get("to")  # another domain's Cast may have none
        return None if to is None else ir.DataType(to.as_int())
    if node.op_type in ("Constant", "ConstantOfShape"):
        return _constant_type(node)
    index = LIKE_INPUT.get(node.op_type)
    if index is None and node.domain not in ONNX_DOMAINS:
        found = _by_schema(node, value)
        if found is not None:
            return found.value
    index = index or 0
    return node.inputs[index] if index < len(node.inputs) else None


class _Answer(NamedTuple):
    """What the installed onnxruntime says of a result's element type: a value of the same one, or nothing."""

    value: ir.DataType | ir.Value | None


def _by_schema(node: ir.Node, value: ir.Value) -> _Answer | None:
    """Return the element type that onnxruntime's own schema tells; None where it has none."""
    from kfac_onnx.device.kernels import typed_like

    like = typed_like(node.domain, node.op_type)
    if like is None:
        return None
    if node.op_type == "MurmurHash3":
        return _Answer(ir.DataType.UINT32 if int_attribute(node, "positive", 1) else ir.DataType.INT32)
    place = node.outputs.index(value)
    source = like[place] if place < len(like) else None
    return _Answer(None if source is None or source >= len(node.inputs) else node.inputs[source])


def _constant_type(node: ir.Node) -> ir.DataType | None:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        found = node.attributes.get(name)
        if found is None:
            continue
        if name == "value":
            return found.as_tensor().dtype
        return ir.DataType.FLOAT if "float" in name else ir.DataType.INT64
    return ir.DataType.FLOAT if node.op_type == "ConstantOfShape" else None


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yield a graph and every graph nested in it; those are found before the first is yielded."""
    found = [graph]
    for outer in found:  # which grows while it is walked
        for node in outer:
            if node.op_type in BODIES or node.domain not in ONNX_DOMAINS:
                found.extend(bodies_of(node))
    yield from found


def operators_in(model: ir.Model) -> set[str]:
    """Return the operators of all nodes of a model, also of those in nested graphs, without their domains."""
    return {node.op_type for graph in all_graphs(model.graph) for node in graph}


def ancestors(values: Iterable[ir.Value]) -> set[ir.Value]:
    """Return the values and everything that they are computed from, the insides of nested graphs included."""
    seen: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            continue
        stack.extend(item for item in node.inputs if item is not None)
        for body in bodies_of(node):
            for graph in all_graphs(body):
                stack.extend(item for inner in graph for item in inner.inputs if item is not None)
                stack.extend(graph.outputs)
    return seen


def descendants(
    graph: ir.Graph, values: Iterable[ir.Value], through: Callable[[ir.Value], bool] | None = None
) -> set[ir.Value]:
    """Return the values and all that a sorted graph computes from them, by way of values `through`."""
    reached = set(values)
    for node in graph:
        inner = (item for body in bodies_of(node) for each in all_graphs(body) for item in each)
        read = (value for each in (node, *inner) for value in each.inputs)
        outer = (value for body in bodies_of(node) for value in body.outputs)
        if any(value in reached for value in (*read, *outer)):
            reached.update(value for value in node.outputs if through is None or through(value))
    return reached


def carrying(ends: Iterable[ir.Value]) -> set[ir.Value]:
    """Return the values through which a gradient of `ends` passes: float, and behind no operator without one.

    Of quantization a graph that trains takes the identity for the derivative: integers between QuantizeLinear
    and DequantizeLinear pass one on.
    Inside of graphs that a node holds, and in what they read from around them, no value is left out.
    """
    passed: set[ir.Value] = set()
    stack = [value for value in ends if _may_be_float(value)]
    while stack:
        value = stack.pop()
        if value in passed:
            continue
        node = value.producer()
        if node is not None and node.op_type in NO_GRADIENT and node.domain in ONNX_DOMAINS:
            continue
        if node is None:
            if _may_be_float(value):
                passed.add(value)
            continue
        passed.add(value)
        inner = ancestors(value for body in bodies_of(node) for value in body.outputs)
        read = [item for item in (*node.inputs, *inner) if item is not None]
        if not _may_be_float(value) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            stack.extend(item for item in read if dtype_of(item) == dtype_of(value))  # moved while quantized
            continue
        stack.extend(item for item in read if _may_be_float(item))
        if node.op_type == "DequantizeLinear":
            stack.append(read[0])
    return passed


def _may_be_float(value: ir.Value) -> bool:
    dtype = dtype_of(value)
    return dtype is None or dtype.is_floating_point()


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs that a node holds: the bodies of an `If`, a `Loop` or a `Scan`."""
    if node.op_type not in BODIES and node.domain in ONNX_DOMAINS:
        return []
    return [graph for attribute in node.attributes.values() for graph in graphs_of(attribute)]


def graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    """Return the graphs that an attribute holds."""
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def is_filled(value: ir.Value | None, number: int) -> bool:
    """Say whether every entry of a value is this number; a tensor of any size, without building it."""
    array = constant(value)
    if array is not None:
        return bool(np.all(array == number))
    node = None if value is None else value.producer()
    if node is None or node.domain not in ONNX_DOMAINS:
        return False
    if node.op_type in SPREADS - {"Cast", "CastLike"}:  # a cast may make another number of it
        return is_filled(node.inputs[0], number)
    if node.op_type != "ConstantOfShape":
        return False
    fill = node.attributes.get("value")
    return number == 0 if fill is None else bool(np.all(fill.as_tensor().numpy() == number))


def is_float(value: ir.Value) -> bool:
    """Say whether a value is a tensor of floating-point numbers."""
    dtype = dtype_of(value)
    return dtype is not None and dtype.is_floating_point()


def unchanged(value: ir.Value) -> ir.Value:
    """Return the value that Identity, a Cast to its own type, or an Expand to its own shape passes on."""
    while (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        if source is None or node.domain not in ONNX_DOMAINS:
            return value
        if node.op_type == "Cast":
            dtype = dtype_of(source)
            if dtype is None or int(dtype) != node.attributes["to"].as_int():
                return value
        elif node.op_type == "Expand":
            if static_shape(source) is None or static_shape(source) != static_shape(value):
                return value
        elif node.op_type != "Identity":
            return value
        value = source
    return value


def label(node: ir.Node) -> str:
    """Return how sentences name a node: its operator and its first output."""
    output = next((value.name for value in node.outputs if value.name), node.name)
    domain = "" if node.domain in ONNX_DOMAINS else f"{node.domain}::"
    return f"{domain}{node.op_type} '{output}'"
