"""Bringing a graph to opset 18 or newer: functions inlined, nodes sorted, old operator forms rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.operators import REDUCTIONS
from kfac_onnx.graph.values import all_graphs, bodies_of
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.pipeline.log import Log

__all__ = [
    "OLDEST",
    "TARGET",
    "CleanImports",
    "InlineFunctions",
    "SortNodes",
    "UpgradeOpset",
    "clean_imports",
    "inline_functions",
    "sort_nodes",
    "upgrade",
]

OLDEST: Final = 13
"""Oldest opset whose operators differ from opset 18 only in the forms that `CHANGES` rewrites."""
TARGET: Final = 18
IR_VERSION: Final = 10
"""Written models say IR version 10: node metadata is new there, and older runtimes still read it."""


def inline_functions(model: ir.Model) -> None:
    """Inline all functions.

    Raises:
        UserError: if functions call each other in a circle.

    """
    try:
        RemoveUnusedFunctionsPass()(model)
        _name_nodes(model)
        InlinePass()(model)
    except (ValueError, ir.passes.PreconditionError, ir.passes.PassError) as error:
        raise UserError(f"the ONNX model is malformed: {first_line(error)}") from error


def sort_nodes(model: ir.Model) -> int:
    """Sort nodes topologically, in every graph; return how many have another place.

    Raises:
        UserError: if the nodes cannot be ordered.

    """
    moved = 0
    for graph in all_graphs(model.graph):
        if _is_sorted(graph):
            continue
        before = list(graph)
        try:
            graph.sort()
        except ValueError as error:
            raise UserError(f"the ONNX model is malformed: {first_line(error)}") from error
        moved += sum(one is not other for one, other in zip(before, graph, strict=True))
    return moved


def _is_sorted(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        inner = (step for body in bodies_of(node) for each in all_graphs(body) for step in each)
        for reader in (node, *inner):
            for value in reader.inputs:
                source = None if value is None else value.producer()
                if source is not None and source.graph is graph and source not in seen:
                    return False
        seen.add(node)
    return True


def _name_nodes(model: ir.Model) -> None:
    """Name the nodes of functions: inlining makes names unique, which takes n² tries for n equal ones."""
    for function in model.functions.values():
        for index, node in enumerate(function.all_nodes()):
            node.name = node.name or f"{function.name}/{index}"


def _axes_to_input(names: Context, node: ir.Node) -> None:
    """Opset 18: the axes of a reduction are an input."""
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        node.resize_inputs(2)
        node.replace_input_with(1, names.constant(np.array(axes.as_ints(), np.int64)))


def _split_count(_: Context, node: ir.Node) -> None:
    """Opset 18: a Split without lengths says how many parts it makes."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _roi_align_mode(_: Context, node: ir.Node) -> None:
    """Opset 16 changed the default of coordinate_transformation_mode."""
    if "coordinate_transformation_mode" not in node.attributes:
        value = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
        node.attributes["coordinate_transformation_mode"] = value


def _batch_norm_training(_: Context, node: ir.Node) -> None:
    """Opset 14: an attribute says that the batch's own statistics are used; before, further outputs did."""
    if not any(value.name for value in node.outputs[1:]):
        return
    node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
    if not any(value.uses() or value.is_graph_output() for value in node.outputs[3:]):
        node.resize_outputs(min(len(node.outputs), 3))  # the saved statistics are gone


MOVED = REDUCTIONS - {"ReduceSum"}  # whose axes are an input since opset 13
CHANGES: Final[dict[str, tuple[int, Callable[[Context, ir.Node], None]]]] = {
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
    names = Context.of(model)
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


@register
@dataclass(frozen=True, kw_only=True)
class InlineFunctions(Pass):
    """Put the bodies of the model's functions where they are called.

    Functions that nothing calls go; functions that functions call are put in too.
    """

    name: ClassVar[str] = "inline-functions"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError where functions call each other in a circle.
        """
        if not model.functions:
            return NO_CHANGES
        census, count = Census(model), len(model.functions)
        inline_functions(model)
        log.count("functions", count)
        return census.changes()


@register
@dataclass(frozen=True, kw_only=True)
class SortNodes(Pass):
    """Put every node behind those that make what it reads, in every graph.

    Graphs that are in such an order stay as they are.
    """

    name: ClassVar[str] = "sort-nodes"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each node that has another place is one change.

        Raises UserError where nodes depend on each other in a circle.
        """
        return Changes(edited=sort_nodes(model))


@register
@dataclass(frozen=True, kw_only=True)
class UpgradeOpset(Pass):
    """Rewrite a graph of opset 13 to 17 to opset 18; newer ones stay.

    Axes of reductions become inputs, a Split without lengths says how many parts it makes, RoiAlign keeps
    the mode that was its default, BatchNormalization says whether it uses the batch's own statistics. The
    model then says IR version 10.
    """

    name: ClassVar[str] = "upgrade-opset"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError for an opset older than 13.
        """
        imports = model.opset_imports
        if model.ir_version == IR_VERSION and "ai.onnx" not in imports and imports.get("", 1) >= TARGET:
            return NO_CHANGES
        census = Census(model)
        note = upgrade(model, None)
        if note is not None:
            log.note(note)
        return census.changes()


@register
@dataclass(frozen=True, kw_only=True)
class CleanImports(Pass):
    """Import exactly the operator domains that the nodes use.

    Domains that no node uses go; a domain that is used and not imported is imported in version 1.
    """

    name: ClassVar[str] = "clean-imports"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each domain is one change."""
        before = set(model.opset_imports)
        clean_imports(model)
        after = set(model.opset_imports)
        return Changes(added=len(after - before), removed=len(before - after))
