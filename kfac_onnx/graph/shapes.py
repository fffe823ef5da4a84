"""Shapes and types of values, as far as ONNX's own inference can tell them."""

from __future__ import annotations

import logging
import re
from typing import Final

import onnx
import onnx_ir as ir

from kfac_onnx.errors import first_line
from kfac_onnx.graph.inference import inferred
from kfac_onnx.graph.operators import Trait, having
from kfac_onnx.graph.values import REMEMBERED, all_graphs, bodies_of, dtype_of

__all__ = ["infer_shapes", "lacks_shapes", "shape_problem"]

LOG: Final = logging.getLogger(__name__)

SEQUENCES: Final = having(Trait.SEQUENCE)
"""Operators whose result is a sequence of tensors."""

_REFUSED: Final = re.compile(
    r"\(op_type: ?(?P<operator>\w+)(?:, node name: (?P<name>[^)]*))?\): (?:\[\w+\] )?(?P<why>[^\n]*)"
)
"""How ONNX's inference names the node that it refuses."""

TRAINING: Final = "ai.onnx.preview.training"

LARGE: Final = 1000
"""Bytes above which only the shape of an initializer is given to ONNX's inference."""


def infer_shapes(model: ir.Model) -> onnx.ModelProto | None:
    """Fill in missing shapes and types; a graph that ONNX cannot infer stays as it is.

    Returns the model with what ONNX inferred, large initializers as inputs; None where it cannot.

    A file cannot say a type without a shape or a shape without a type: of such values `dtype_of` keeps the
    type, and what it finds for the others is filled in. Of a `Gradient` node ONNX tells nothing: its results
    are as the inputs that they are derivatives with respect to.
    """
    found = _infer(model)
    if TRAINING in model.opset_imports:
        told = [_declare_gradients(node) for node in model.graph]
        if any(told):
            found = _infer(model)
    for graph in all_graphs(model.graph):
        for node in graph:
            for value in node.outputs:
                if node.op_type in SEQUENCES:  # a sequence's type is not that of its tensors
                    value.type, value.shape = None, None
                    continue
                dtype = dtype_of(value)
                if value.is_graph_output():
                    continue
                if value.shape is None or dtype is None:
                    value.meta[REMEMBERED], value.type, value.shape = dtype, None, None
                elif value.type is None:
                    value.type = ir.TensorType(dtype)
    return found


def _infer(model: ir.Model) -> onnx.ModelProto | None:
    try:
        found = inferred(_without_large_tensors(model))
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:  # ONNX gives it up
        LOG.debug("shapes are not inferred: %s", first_line(error))
        return None
    _merge(model.graph, found.graph)
    return found


def _declare_gradients(node: ir.Node) -> bool:
    """Declare the results of a Gradient node; say whether any was not."""
    if node.domain != TRAINING or node.op_type != "Gradient":
        return False
    told = False
    for source, result in zip(node.inputs, node.outputs, strict=False):
        if source is not None and source.shape is not None and result.shape is None:
            result.type, result.shape, told = source.type, source.shape, True
    return told


def lacks_shapes(model: ir.Model) -> bool:
    """Say whether any value that a node makes lacks its shape or its type."""
    return any(
        value.shape is None or value.dtype is None
        for graph in all_graphs(model.graph)
        for node in graph
        for value in node.outputs
    )


def shape_problem(
    model: ir.Model, inferred_model: onnx.ModelProto | None = None
) -> tuple[str, str, str] | None:
    """Return the first node that ONNX's strict inference refuses: operator, name and what is wrong with it.

    `inferred_model` is what `infer_shapes` returned of the model, if nothing has changed since.

    Such as axis 1 of a scalar. ONNX's checker and its lenient inference accept these graphs; no runtime does.
    """
    try:
        proto = _without_large_tensors(model) if inferred_model is None else inferred_model
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        match = _REFUSED.search(str(error))
        return None if match is None else (match["operator"], match["name"] or "?", match["why"].strip())
    return None


def _without_large_tensors(model: ir.Model) -> onnx.ModelProto:
    """Return the model as ONNX's inference reads it: large initializers are inputs. The model stays."""
    graph = model.graph
    held = list(graph.initializers.values())
    inputs = list(graph.inputs)
    for value in held:
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= LARGE:
            continue
        if value.shape is None:
            value.shape = ir.Shape(tensor.shape.numpy())
        if value.type is None:
            value.type = ir.TensorType(tensor.dtype)
        if not value.is_graph_input():
            graph.inputs.append(value)
        del graph.initializers[str(value.name)]
    try:
        return ir.to_proto(model)
    finally:
        graph.initializers.clear()
        for value in held:
            graph.initializers.add(value)
        graph.inputs.clear()
        graph.inputs.extend(inputs)


def _merge(graph: ir.Graph, found: onnx.GraphProto) -> None:
    """Take over shapes and types, also of the graphs inside: both have the same nodes in the same order."""
    known = {info.name: info.type for info in (*found.input, *found.value_info, *found.output)}
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.name in known:
            _take(value, known[value.name])
    for node, proto in zip(graph, found.node, strict=True):
        bodies = bodies_of(node)
        if not bodies:
            continue
        single = onnx.AttributeProto.GRAPH
        inner = [g for item in proto.attribute for g in ([item.g] if item.type == single else item.graphs)]
        for body, inside in zip(bodies, inner, strict=True):
            _merge(body, inside)


def _take(value: ir.Value, found: onnx.TypeProto) -> None:
    """Give a value the tensor type and shape that were inferred; other types are left alone."""
    if not found.HasField("tensor_type"):
        return
    tensor = found.tensor_type
    if tensor.elem_type and (value.dtype is None or value.dtype != tensor.elem_type):
        value.type = ir.TensorType(ir.DataType(tensor.elem_type))
    if tensor.HasField("shape"):
        dims = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim
        ]
        if value.shape is None or list(value.shape) != dims:
            value.shape = ir.Shape(dims)
