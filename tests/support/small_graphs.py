"""Small canonical training graphs for tests of the passes, written as ONNX text.

The graph of `training_graph` looks rows up in `W`, and its gradient comes from whatever the test writes.
`loss` depends on the lookup; g is dL/d(rows).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from kfac_onnx import metadata
from kfac_onnx.metadata import Loss, Parameter

__all__ = ["HEADER", "model_of", "training_graph"]

HEADER = '<ir_version: 9, opset_import: ["" : 18]>'


def model_of(text: str, parameters: dict[str, str | None], loss: str | None = "loss") -> ir.Model:
    """Return a canonical model of ONNX text; `parameters` maps each trained one to its gradient."""
    model = ir.from_proto(onnx.parser.parse_model(f"{HEADER}\n{text}"))
    ShapeInferencePass()(model)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    entries = []
    for name, gradient in parameters.items():
        shape = tuple(int(dim) for dim in values[name].shape)
        entries.append(Parameter(name, shape, "float32", gradient))
    metadata.write(model, "parameters", entries)
    metadata.write(model, "loss", Loss(loss, "sum"))
    return model


def training_graph(
    forward: str = "h = Gather<axis: int = 0>(W, ids)",
    backward: str = "",
    *,
    weight: str = "float[5, 3] W",
    inputs: str = "int64[N, 2] ids, float[N, 2, 3] g",
    outputs: str = "float loss, float[5, 3] W_grad",
    constants: str = "",
    loss: str = "loss = ReduceSum<keepdims: int = 0>(hg)",
) -> ir.Model:
    """Return a graph whose loss is Σ h·g, with lines of text for what the exporter wrote."""
    text = f"""
    training ({inputs}, {weight}) => ({outputs})
    <float zero = {{0.0}}, int64[1] last = {{-1}}, int64[2] size = {{5, 3}}{constants}>
    {{
        {forward}
        hg = Mul(h, g)
        {loss}
        zeros = ConstantOfShape(size)
        {backward or SCATTER_ND}
    }}
    """
    return model_of(text, {"W": "W_grad"})


SCATTER_ND = """
        index = Unsqueeze(ids, last)
        W_grad = ScatterND<reduction: string = "add">(zeros, index, g)
"""
