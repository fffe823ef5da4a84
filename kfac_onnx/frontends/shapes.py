"""Shapes and types of values, as far as ONNX's own inference can tell them."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from kfac_onnx.frontends.values import REMEMBERED, all_graphs, dtype_of

__all__ = ["infer_shapes"]

SEQUENCES = frozenset(
    {
        "SplitToSequence",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceMap",
    }
)
"""Operators whose result is a sequence of tensors."""


def infer_shapes(model: ir.Model) -> None:
    """Fill in missing shapes and types; a graph that ONNX cannot infer stays as it is.

    A file cannot say a type without a shape or a shape without a type: of such values `dtype_of` keeps the
    type, and what it finds for the others is filled in.
    """
    inference = logging.getLogger("onnx_ir.passes.common.shape_inference")
    inference.disabled = True  # it logs a traceback for each graph that it gives up on
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        inference.disabled = False
    for graph in all_graphs(model.graph):
        for node in graph:
            for value in node.outputs:
                if node.op_type in SEQUENCES:  # the pass takes a sequence for one of its tensors
                    value.type, value.shape = None, None
                    continue
                dtype = dtype_of(value)
                if value.is_graph_output():
                    continue
                if value.shape is None or dtype is None:
                    value.meta[REMEMBERED], value.type, value.shape = dtype, None, None
                elif value.type is None:
                    value.type = ir.TensorType(dtype)
