"""Which operators the installed onnxruntime runs on the CPU, found out by opening one-node sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
import onnx_ir as ir

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.graph.emit import HALF_TYPES
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnxruntime as ort

__all__ = ["missing_kernels"]

MISSING: Final = (
    "NOT_IMPLEMENTED",
    "is not a registered function/op",
    "No Op registered for",
)
"""What onnxruntime says of an operator without a kernel; all its other complaints are about our stand-in."""


def missing_kernels(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Return the nodes without a kernel, by operator and element type; nodes with bodies are not tried.

    Each kind of node (operator, element types, reduction) is tried once, in a session of one node.
    """
    answers: dict[tuple[object, ...], bool] = {}
    missing: dict[str, list[ir.Node]] = {}
    for node in _plain_nodes(model):
        types = tuple(
            None if value is None else dtype_of(value) or ir.DataType.FLOAT for value in node.inputs
        )
        reduction = node.attributes.get("reduction")
        kind = None if reduction is None else str(reduction.value)
        key = (node.domain, node.op_type, types, len(node.outputs), kind)
        if key not in answers:
            answers[key] = _runs(node, types, model)
        if not answers[key]:
            missing.setdefault(_name(node, types), []).append(node)
    return missing


def _plain_nodes(model: ir.Model) -> Iterator[ir.Node]:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    for graph in all_graphs(model.graph):
        for node in graph:
            if not any(item.type in graphs for item in node.attributes.values()):
                yield node


def _name(node: ir.Node, types: tuple[ir.DataType | None, ...]) -> str:
    name = f"{node.domain}::{node.op_type}" if node.domain not in ONNX_DOMAINS else node.op_type
    special = next((dtype for dtype in types if dtype in (*HALF_TYPES, ir.DataType.DOUBLE)), None)
    adds = "reduction" in node.attributes and node.op_type.startswith("Scatter")
    name += f" ({node.attributes['reduction'].as_string()})" if adds else ""
    return name if special is None or node.domain not in ONNX_DOMAINS else f"{name} of {special.numpy().name}"


def _runs(node: ir.Node, types: tuple[ir.DataType | None, ...], model: ir.Model) -> bool:
    import onnxruntime as ort

    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend("" if dtype is None else f"i{index}" for index, dtype in enumerate(types))
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    helper = onnx.helper
    inputs = [
        helper.make_value_info(f"i{index}", helper.make_tensor_type_proto(int(dtype), None))
        for index, dtype in enumerate(types)
        if dtype is not None
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output]
    graph = helper.make_graph([proto], "one", inputs, outputs)
    imports = {domain: version for domain, version in model.opset_imports.items() if domain}
    imports.setdefault(node.domain or "", 1)
    imports[""] = max(model.opset_imports.get("", 1), model.opset_imports.get("ai.onnx", 1))
    opsets = [
        helper.make_opsetid(domain, version) for domain, version in imports.items() if domain != "ai.onnx"
    ]
    alone = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if not from_onnxruntime(error):
            raise
        return not any(text in str(error) for text in MISSING)
    return _reduces(session, node, types)


def _reduces(session: ort.InferenceSession, node: ir.Node, types: tuple[ir.DataType | None, ...]) -> bool:
    """Run a reducing scatter: half-precision ones have a kernel that refuses when it runs."""
    from onnxruntime import OrtValue

    reduction = node.attributes.get("reduction")
    dtype = types[0] if types else None
    if not node.op_type.startswith("Scatter") or reduction is None or reduction.as_string() == "none":
        return True
    if dtype is None or dtype not in HALF_TYPES:
        return True
    bits = np.zeros((1, 1), np.uint16)
    tensor = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(dtype))
    indices = OrtValue.ortvalue_from_numpy(np.zeros((1, 1), np.int64))
    try:
        session.run_with_ort_values(  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]  not in its stubs
            ["o0"], {"i0": tensor, "i1": indices, "i2": tensor}
        )
    except Exception as error:
        if not from_onnxruntime(error):
            raise
        return not any(text in str(error) for text in ("not supported", "NOT_IMPLEMENTED"))
    return True
