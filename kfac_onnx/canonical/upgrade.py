"""Bringing a graph to opset 18 or newer: functions inlined, nodes sorted, old operator forms rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.graph.emit import Names
from kfac_onnx.graph.operators import REDUCTIONS
from kfac_onnx.graph.values import all_graphs

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OLDEST", "TARGET", "clean_imports", "flatten", "upgrade"]

OLDEST: Final = 13
"""Oldest opset whose operators differ from opset 18 only in the forms that `CHANGES` rewrites."""
TARGET: Final = 18
IR_VERSION: Final = 10
"""Written models say IR version 10: node metadata is new there, and older runtimes still read it."""


def flatten(model: ir.Model, place: str | None) -> None:
    """Inline all functions and sort nodes topologically, in every graph.

    Raises:
        UserError: if functions call each other in a circle, or the nodes cannot be ordered.

    """
    try:
        if model.functions:
            RemoveUnusedFunctionsPass()(model)
            _name_nodes(model)
            InlinePass()(model)
        for graph in all_graphs(model.graph):
            graph.sort()
    except (ValueError, ir.passes.PreconditionError, ir.passes.PassError) as error:
        raise UserError(f"the ONNX model is malformed: {first_line(error)}", place=place) from error


def _name_nodes(model: ir.Model) -> None:
    """Name the nodes of functions: inlining makes names unique, which takes n² tries for n equal ones."""
    for function in model.functions.values():
        for index, node in enumerate(function.all_nodes()):
            node.name = node.name or f"{function.name}/{index}"


def _axes_to_input(names: Names, node: ir.Node) -> None:
    """Opset 18: the axes of a reduction are an input."""
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        node.resize_inputs(2)
        node.replace_input_with(1, names.constant(np.array(axes.as_ints(), np.int64)))


def _split_count(_: Names, node: ir.Node) -> None:
    """Opset 18: a Split without lengths says how many parts it makes."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _roi_align_mode(_: Names, node: ir.Node) -> None:
    """Opset 16 changed the default of coordinate_transformation_mode."""
    if "coordinate_transformation_mode" not in node.attributes:
        value = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
        node.attributes["coordinate_transformation_mode"] = value


def _batch_norm_training(_: Names, node: ir.Node) -> None:
    """Opset 14: an attribute says that the batch's own statistics are used; before, further outputs did."""
    if not any(value.name for value in node.outputs[1:]):
        return
    node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
    if not any(value.uses() or value.is_graph_output() for value in node.outputs[3:]):
        node.resize_outputs(min(len(node.outputs), 3))  # the saved statistics are gone


MOVED = REDUCTIONS - {"ReduceSum"}  # whose axes are an input since opset 13
CHANGES: Final[dict[str, tuple[int, Callable[[Names, ir.Node], None]]]] = {
    **dict.fromkeys(MOVED, (18, _axes_to_input)),
    "Split": (18, _split_count),
    "RoiAlign": (16, _roi_align_mode),
    "BatchNormalization": (14, _batch_norm_training),
}
"""Operator -> (opset that changed it, rewrite of the older form). All other operators between opsets 13 and
18 gained types, attributes with the old behaviour as default, or nothing."""


def upgrade(model: ir.Model, place: str | None) -> str | None:
    """Rewrite a graph of opset 13 to 17 to opset 18; newer ones stay. Returns what was done.

    Raises:
        UserError: if the graph's opset is older than 13.

    """
    imports = model.opset_imports
    if "ai.onnx" in imports:
        imports[""] = max(imports.pop("ai.onnx"), imports.get("", 0))
    version = imports.get("", 1)
    model.ir_version = IR_VERSION
    if version >= TARGET:
        return None
    if version < OLDEST:
        raise UserError(
            f"the graph uses opset {version}, and {OLDEST} is the oldest that can be read",
            place=place,
            help="export it again with opset 17 or newer",
        )
    names = Names(model)
    for graph in all_graphs(model.graph):
        for node in graph:
            since, change = CHANGES.get(node.op_type, (0, None))
            if change is not None and not node.domain and version < since:
                change(names, node)
            node.version = None
    imports[""] = TARGET
    return f"converted from opset {version} to {TARGET}"


def clean_imports(model: ir.Model) -> None:
    """Import exactly the operator domains that the nodes use."""
    used = {node.domain for graph in all_graphs(model.graph) for node in graph}
    for domain in [name for name in model.opset_imports if name and name not in used]:
        del model.opset_imports[domain]
    for domain in sorted(used):
        model.opset_imports.setdefault(domain, 1)
