"""Shapes of the values of a loop's body, where the states keep theirs.

ONNX lets the states of a Loop change their shape between iterations, so shape inference says nothing of
them. Here it is assumed that they keep the shape of their first value; what follows for their next value
proves it, or takes the assumption back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from kfac_onnx.canonical.loops.recurrence import captured
from kfac_onnx.graph.inference import inferred
from kfac_onnx.graph.values import dtype_of, static_shape

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.recurrence import Recurrence, State
    from kfac_onnx.graph.constants import Constants

__all__ = ["infer_inside"]

Dims = tuple[int | str | None, ...]
SMALL = 64
"""Entries up to which a constant from outside is taken into the inference, where it may be a shape."""


def infer_inside(loop: Recurrence, constants: Constants) -> int:
    """Fill in the shapes of a body's values; return how many states were found to keep theirs."""
    assumed = [state for state in loop.states if state.first.shape is not None and dtype_of(state.first)]
    while True:
        found = _inferred(loop, assumed, constants)
        if found is None:
            return 0
        wrong = [state for state in assumed if found.get(str(state.next.name)) != _dims(state.first.shape)]
        if not wrong:
            break
        assumed = [state for state in assumed if state not in wrong]
    new = [state for state in assumed if _dims(state.inner.shape) != _dims(state.first.shape)]
    for state in assumed:
        state.inner.shape = ir.Shape(list(state.first.shape or ()))
        state.inner.type = state.inner.type or state.first.type
    for node in loop.body:
        for value in node.outputs:
            dims = found.get(str(value.name))
            dtype = dtype_of(value)
            if dims is not None and dtype is not None and _says_more(dims, _dims(value.shape)):
                value.shape, value.type = ir.Shape(dims), value.type or ir.TensorType(dtype)
    return len(new)


def _dims(shape: ir.Shape | None) -> Dims | None:
    return None if shape is None else tuple(dim if isinstance(dim, int) else dim.value for dim in shape)


def _says_more(new: Dims, old: Dims | None) -> bool:
    if old is None:
        return True
    known = [sum(isinstance(dim, int) for dim in dims) for dims in (new, old)]
    return len(new) == len(old) and known[0] > known[1]


def _inferred(loop: Recurrence, assumed: list[State], constants: Constants) -> dict[str, Dims] | None:
    """Return the shapes that ONNX infers in the body by name; None where it gives up."""
    body = loop.body.clone(allow_outer_scope_values=True)
    shapes: dict[str, ir.Shape | None] = {}
    for state in loop.states:
        shapes[str(state.inner.name)] = state.first.shape if state in assumed else None
    firsts = {str(state.inner.name): state.first for state in loop.states}
    for item in loop.read:
        shape = item.outer.shape
        dims = None if shape is None else [dim for i, dim in enumerate(shape) if i != item.axis % len(shape)]
        shapes[str(item.inner.name)] = None if dims is None else ir.Shape(dims)
        firsts[str(item.inner.name)] = item.outer
    inputs: list[onnx.ValueInfoProto] = []
    for value in body.inputs:
        name = str(value.name)
        source = firsts.get(name, value)
        dtype = dtype_of(source)
        shape = shapes.get(name, value.shape if name not in firsts else None)
        if value is body.inputs[0] and not loop.is_scan:
            dtype, shape = ir.DataType.INT64, ir.Shape([])
        inputs.append(_info(name, dtype, shape))
    known: list[onnx.TensorProto] = []
    for value in captured(loop.body):
        array = constants.constant(value)
        if array is not None and array.size <= SMALL and array.dtype.kind in "iub":
            known.append(onnx.numpy_helper.from_array(array, str(value.name)))
        else:
            held = static_shape(value)
            shape = value.shape if held is None else ir.Shape(held)
            inputs.append(_info(str(value.name), dtype_of(value), shape))
    body.inputs.clear()
    try:
        graph = ir.to_proto(body)
    except (ValueError, RuntimeError):
        return None
    ends = [onnx.helper.make_empty_tensor_value_info(item.name) for item in graph.output]
    initializers = [*graph.initializer, *known]
    graph = onnx.helper.make_graph(list(graph.node), "body", inputs, ends, initializers)
    opset = onnx.helper.make_opsetid("", constants.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset])
    try:
        result = inferred(model)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
        return None
    found: dict[str, Dims] = {}
    for info in (*result.graph.value_info, *result.graph.output):
        kind = info.type.tensor_type
        if info.type.HasField("tensor_type") and kind.HasField("shape"):
            found[info.name] = tuple(_dim(dim) for dim in kind.shape.dim)
    for item in inputs:
        dims = _dims(shapes.get(item.name))
        if dims is not None:
            found[item.name] = dims
    return found


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


def _info(name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> onnx.ValueInfoProto:
    if dtype is None:
        return onnx.helper.make_empty_tensor_value_info(name)
    dims = _dims(shape)
    return onnx.helper.make_tensor_value_info(name, int(dtype), dims)
