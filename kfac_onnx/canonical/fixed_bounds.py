"""Bounds, shapes and axes that are computed from constants: constants themselves.

Exporters spell `x[10:130]` as Slice with `Unsqueeze(10)` or `Reshape(Cast(10), [-1])`. ONNX's shape inference
looks at initializers and Constant nodes alone, so the result would have no shape, and all that follows
from it would be found at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.emit import Names
from kfac_onnx.graph.values import ONNX_DOMAINS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

__all__ = ["fix_bounds"]

MICROSOFT: Final = "com.microsoft"
FIRST: Final = {
    "ConstantOfShape": 0,
    "Expand": 1,
    "Pad": 1,
    "ReduceMean": 1,
    "ReduceSum": 1,
    "Reshape": 1,
    "Slice": 1,
    "Split": 1,
    "Squeeze": 1,
    "Tile": 1,
    "Unsqueeze": 1,
}
"""Operators whose integer inputs decide the shape of their result, from which input on."""
FIRST_TRAINING: Final = {"SliceGrad": 1, "GatherGrad": 0, "SplitTraining": 1}
"""The same for ONNX Runtime's training operators; the ids of GatherGrad are its second input."""
LARGEST: Final = 64
"""Entries that bounds have at most: as many as dimensions, or parts."""


def fix_bounds(model: ir.Model) -> int:
    """Make such inputs initializers; return how many. Shapes have to be inferred again afterwards."""
    names = Names(model)
    constants = Constants(model.graph.inputs, model.opset_imports.get("", 18))
    made: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in model.graph:
        for index, value in _bounds(node):
            if value not in made:
                array = constants.constant(value)
                if array is None or array.size > LARGEST or not np.issubdtype(array.dtype, np.integer):
                    continue
                made[value] = names.constant(array)
            node.replace_input_with(index, made[value])
            count += 1
    return count


def _bounds(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Yield the inputs that are bounds and computed by a node, with their places."""
    table = FIRST if node.domain in ONNX_DOMAINS else FIRST_TRAINING if node.domain == MICROSOFT else {}
    first = table.get(node.op_type)
    if first is None:
        return
    last = 1 if node.op_type == "GatherGrad" else len(node.inputs)
    for index in range(first, last):
        value = node.inputs[index]
        producer = None if value is None else value.producer()
        if value is not None and producer is not None and producer.op_type != "Constant":
            yield index, value
