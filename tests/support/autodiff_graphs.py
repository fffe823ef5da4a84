"""Models of autodiff cases: Σ w·output, differentiated by us, run on plain onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from kfac_onnx.autodiff import propagate
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autodiff_cases import Case

__all__ = ["append_gradients", "case_model", "run_gradients"]

DOMAINS = ("com.microsoft",)
UNCHECKED = ("SimplifiedLayerNormalization",)
"""Operators of onnxruntime in ONNX's own domain, which ONNX does not know."""


def declared(name: str, array: np.ndarray, *, symbolic: bool) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    shape = [f"{name}_{axis}" if symbolic else dim for axis, dim in enumerate(array.shape)]
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def case_model(
    case: Case,
    *,
    symbolic: bool,
    differentiated: bool = True,
    weights: Mapping[str, np.ndarray] | None = None,
) -> tuple[ir.Model, dict[str, str]]:
    """Return the model of a case, with inputs `w_<output>`, and the outputs that are gradients by input.

    `weights` are these inputs' values, for outputs whose shape the graph does not tell.
    """
    arrays = case.arrays()
    imports = "".join(f', "{domain}" : 1' for domain in DOMAINS if domain in case.nodes)
    text = f'<ir_version: 10, opset_import: ["" : {case.opset}{imports}]>\ng () => () {{ {case.nodes} }}'
    proto = onnx.parser.parse_model(text)
    graph = proto.graph
    graph.input.extend(
        declared(name, array, symbolic=symbolic and name not in case.static) for name, array in arrays.items()
    )
    graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in case.constants.items()
    )
    model = ir.from_proto(proto)
    values = {value.name: value for node in model.graph for value in node.outputs}
    infer_shapes(model)
    outputs = [values[name] for name in case.outputs]
    for value in outputs:
        if value.shape is None and weights is not None:  # ONNX infers none outside the standard
            given = weights[str(value.name)].shape
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([None] * len(given) if symbolic else given)
    model.graph.outputs.extend(outputs)
    if not differentiated:
        return model, {}
    wrt = [
        value
        for value in model.graph.inputs
        if np.issubdtype(arrays[value.name].dtype, np.floating) and value.name not in case.frozen
    ]
    seeds: dict[ir.Value, ir.Value] = {}
    for value in outputs:
        if value.dtype is not None and not value.dtype.is_floating_point():
            continue
        weight = ir.Value(name=f"w_{value.name}", type=value.type, shape=value.shape)
        weight.type = weight.type or ir.TensorType(ir.DataType.FLOAT)
        model.graph.inputs.append(weight)
        seeds[value] = weight
    for value in outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return model, append_gradients(model, seeds, wrt)


def append_gradients(
    model: ir.Model, seeds: Mapping[ir.Value, ir.Value], wrt: list[ir.Value]
) -> dict[str, str]:
    """Differentiate Σ seed·value, and make the gradients outputs; return their names by value."""
    names, missing = Context.of(model), list[str]()
    found, nodes = propagate(names, list(model.graph), seeds, wrt, missing)
    assert not missing, missing
    model.graph.extend(nodes)
    outputs: dict[str, str] = {}
    for value in wrt:
        source = found.get(value)
        if source is None:
            zero = ir.node("Sub", [value, value])
            model.graph.append(zero)
            source = zero.outputs[0]
            source.name = names.fresh(f"zeros for {value.name}")
        node = ir.node("Identity", [source])
        output = node.outputs[0]
        output.name, output.type = f"gradient of {value.name}", ir.TensorType(value.dtype)
        output.shape = value.shape
        model.graph.append(node)
        model.graph.outputs.append(output)
        outputs[str(value.name)] = str(output.name)
    return outputs


def run_gradients(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Check a model and all that it says of shapes, run it on plain onnxruntime, return its outputs by name."""
    proto = ir.to_proto(model)
    if not any(node.op_type in UNCHECKED for node in model.graph):
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    inputs = {item.name: np.asarray(feeds[item.name]) for item in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))
