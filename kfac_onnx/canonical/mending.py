"""Slips of exporters that have one meaning only, and that no runtime accepts as they are.

- A constant of one entry whose stored type is not the one that the graph declares for it: jax2onnx stores the
  NaN that fills in for invalid ids as float32, also for a float16 table. The declared type is the one that
  its readers need; the entry is converted.
- A constant that is declared with other dimensions than its data has, numbers or names: the data is right.
- A Gemm with `beta = 0` whose third input, all zeros, has another type than its operands: it adds nothing
  and is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, constant, dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["mend"]


def mend(model: ir.Model) -> list[str]:
    """Correct such slips in place; return a note for each kind, with how many there were."""
    for graph in all_graphs(model.graph):
        for value in _constants(graph):
            _reshape(value)
    retyped = sum(_retype(value) for graph in all_graphs(model.graph) for value in _constants(graph))
    dropped = sum(_drop_bias(node) for graph in all_graphs(model.graph) for node in graph)
    notes = [f"constants stored in their declared type: {retyped}"] if retyped else []
    return notes + ([f"biases that a Gemm multiplies by zero left out: {dropped}"] if dropped else [])


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in list(graph.initializers.values()):
        if not value.is_graph_input():
            yield value


def _retype(value: ir.Value) -> bool:
    tensor, declared = value.const_value, value.dtype
    if tensor is None or declared is None or tensor.dtype == declared or tensor.size != 1:
        return False
    if not (declared.is_floating_point() and tensor.dtype.is_floating_point()):
        return False
    value.const_value = ir.tensor(tensor.numpy().astype(declared.numpy()), name=value.name)
    return True


def _reshape(value: ir.Value) -> None:
    """Declare the shape that a constant has; exporters leave the sizes of another batch or names behind."""
    if value.const_value is not None and value.shape is not None:
        held = [int(dim) for dim in value.const_value.shape.numpy()]
        if list(value.shape) != held:
            value.shape = ir.Shape(held)


def _drop_bias(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.domain not in ONNX_DOMAINS or len(node.inputs) < 3:
        return False
    scale, bias = node.attributes.get("beta"), node.inputs[2]
    if scale is None or scale.as_float() != 0.0 or bias is None:
        return False
    zeros = constant(bias)
    if zeros is None or np.any(zeros) or dtype_of(bias) == dtype_of(node.inputs[0]):
        return False
    node.replace_input_with(2, None)
    return True
