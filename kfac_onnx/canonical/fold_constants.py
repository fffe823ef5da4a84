"""Bounds, shapes and parts that are computed from constants: constants themselves.

Exporters spell `x[10:130]` as Slice with `Unsqueeze(10)` or `Reshape(Cast(10), [-1])`. ONNX's shape inference
looks at initializers and Constant nodes alone, so the result would have no shape, and all that follows
from it would be found at run time. PyTorch's unoptimized exports split through a sequence of known parts.

onnxscript folds both. What it must not fold: a float initializer may be a parameter, whose first value would
stay in the graph for ever.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.operators import Trait, having
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, dtype_of, static_shape
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Mapping

    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["FoldConstants"]

LARGEST: Final = 64
"""Entries that folded tensors have at most: as many as dimensions, or parts."""
_HIDDEN: Final = "kfac_onnx.hidden"
GRADIENT: Final = ("ai.onnx.preview.training", "Gradient")
SEQUENCES: Final = frozenset({"SequenceAt", "SplitToSequence"})
STAYS: Final = having(Trait.RANDOM) | {
    "ConstantOfShape",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
}
"""Operators that onnxscript folds never."""


@register
@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Make constants of what small constants give, and a Split of a sequence of known parts.

    Float initializers may be parameters, and stay; so does what is computed from them, unless it is a whole
    number of a single one. Values that had names keep them. Where a Gradient node names an inner value,
    which must stay what it is, nothing is folded.

    Source  onnxscript.optimizer.fold_constants.
    """

    name: ClassVar[str] = "fold-constants"
    keeps_meaning: ClassVar[bool] = True
    keep: tuple[str, ...] = opt((), "further initializers that are no constants: states, counters")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        varying = _varying(model, self.keep)
        if _names_inner_values(model) or not any(
            _folds(node, varying) for graph in all_graphs(model.graph) for node in graph
        ):
            return NO_CHANGES
        from onnxscript.optimizer import fold_constants  # pyright: ignore[reportUnknownVariableType]

        census = Census(model)
        before = {value: value.name for graph in all_graphs(model.graph) for value in _values(graph)}

        def should_fold(node: ir.Node) -> bool | None:
            stays = not node.inputs or len(node.outputs) > 1 or node.outputs[0].is_graph_output()
            return False if stays or _reads(node, varying) else None

        with _interface_hidden(model):
            try:
                fold_constants(
                    model,
                    input_size_limit=LARGEST,
                    output_size_limit=LARGEST,
                    onnx_shape_inference=False,
                    should_fold=should_fold,
                )
            except RuntimeError as error:  # an operator that breaks its own rules: shape inference tells
                log.warning(f"constants are left as they are: {error}")
        _restore_names(model, before)
        changes = census.changes()
        log.count("nodes", changes.removed)
        return changes


@contextmanager
def _interface_hidden(model: ir.Model) -> Generator[None]:
    """Let an Identity before an exporter's own operator that makes an output be of no operator inside.

    Folding bypasses it whatever it is told, and a gradient on its way into an accumulator would go by the
    name of what the Identity reads.
    """
    last = [node for value in model.graph.outputs if (node := value.producer()) is not None]
    owners = [node for node in last if node.domain not in ONNX_DOMAINS]
    before = [value.producer() for node in owners for value in node.inputs if value is not None]
    hidden = [node for node in before if node is not None and (node.domain, node.op_type) == ("", "Identity")]
    for node in hidden:
        node.domain = _HIDDEN
    try:
        yield
    finally:
        for node in hidden:
            node.domain = ""


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _varying(model: ir.Model, keep: Collection[str]) -> dict[ir.Value, bool]:
    """Return the initializers that may have other values in another step, and which may be single numbers."""
    return {
        value: name not in keep and value.const_value is not None and value.const_value.size == 1
        for graph in all_graphs(model.graph)
        for name, value in graph.initializers.items()
        if name in keep or not _counts(dtype_of(value))
    }


def _counts(dtype: ir.DataType | None) -> bool:
    return dtype is not None and (dtype.is_integer() or dtype.name == "BOOL")


def _names_inner_values(model: ir.Model) -> bool:
    """Say whether a Gradient node differentiates by a value that a node makes."""
    named: set[str] = set()
    for node in model.graph:
        if (node.domain, node.op_type) == GRADIENT:
            for key in ("xs", "zs"):
                found = node.attributes.get(key)
                named.update(() if found is None else found.as_strings())
    return bool(named) and any(value.name in named for node in model.graph for value in node.outputs)


def _folds(node: ir.Node, varying: Mapping[ir.Value, bool]) -> bool:
    """Say whether there is a reason to fold because of this node."""
    if node.domain not in ONNX_DOMAINS or node.op_type in STAYS:
        return False
    if node.op_type in SEQUENCES:
        return True
    shape = static_shape(node.outputs[0]) if node.outputs else None
    if shape is not None and math.prod(shape) > LARGEST:
        return False
    inputs = [value for value in node.inputs if value is not None]
    return bool(inputs) and all(map(_is_constant, inputs)) and not _reads(node, varying)


def _reads(node: ir.Node, varying: Mapping[ir.Value, bool]) -> bool:
    """Say whether a node makes of varying initializers what may vary.

    No gradient passes into whole numbers, so single float numbers that become such are constants: bounds.
    """
    whole = len(node.outputs) == 1 and _counts(dtype_of(node.outputs[0]))
    return any(
        value in varying and not (whole and varying[value]) for value in node.inputs if value is not None
    )


def _is_constant(value: ir.Value) -> bool:
    if value.is_graph_input():
        return False
    node = value.producer()
    return value.is_initializer() if node is None else node.op_type == "Constant"


def _restore_names(model: ir.Model, before: dict[ir.Value, str | None]) -> None:
    """Give values the names that they had, and new ones names of our own; the graph's outputs keep theirs.

    Where onnxscript let the source of an Identity take the place of an output, that value has the name now.
    """
    values = list(dict.fromkeys(item for graph in all_graphs(model.graph) for item in _values(graph)))
    inner = [item for item in values if item.producer() is not None and not item.is_graph_output()]
    taken = {item.name for item in values if item.producer() is None or item.is_graph_output()}
    free = {item for item in inner if before.get(item) and before[item] not in taken}
    for value in free:
        value.name = before[value]
    names = Context.of(model)
    names.invalidate()  # what was folded has new names
    for value in inner:
        if value not in free:
            value.name = names.fresh(f"kfac/fold-constants/{value.name}")
    for value in values:
        value.metadata_props.pop("pkg.onnxscript.optimizer.folded_from", None)
