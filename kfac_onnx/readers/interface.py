"""How each kind of exported training graph says which value is whose gradient: one reader per kind.

A reader looks at a model's inputs, outputs and the operators at its border, and returns an `Interface`, or
says why the model is not of its kind. Names of the interface count, names of inner values never do.
To support another exporter, add a reader to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import onnx_ir as ir

from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import VIEWS
from kfac_onnx.graph.values import is_float
from kfac_onnx.readers.load import Exported
from kfac_onnx.readers.row_gradients import following_row_gradients, named_row_gradients

if TYPE_CHECKING:
    from kfac_onnx.metadata import HostUpdate, OptimizerState, RowGradient

__all__ = ["READERS", "Interface", "Reader"]

GRADIENT_SUFFIX: Final = "_grad"
BUFFER_SUFFIX: Final = ".accumulation.buffer"


@dataclass(frozen=True)
class Interface:
    """What a reader found.

    `gradients` maps a parameter's name to the name of the value that is its gradient; `orphans` does so
    for parameters that are no longer in the graph. `boundary` maps what the graph hands out to the input
    that takes its gradient (None: it has none) where the loss lies outside the graph,
    `by_position` says that gradients must be paired by position if no name does it.
    """

    frontend: str
    gradients: dict[str, str]
    orphans: dict[str, str] = field(default_factory=dict[str, str])
    boundary: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    by_position: bool = False
    rows: tuple[RowGradient, ...] = ()
    """Gradients that the graph gives as rows and ids; `gradients` does not name them."""
    notes: tuple[str, ...] = ()
    loss: str | None = None
    """The loss, where the file says which value it is."""
    unsure: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    """Parameters whose gradient was found in an update and may be off by a constant factor, with the constant
    that was taken for a learning rate (None: there is no doubt)."""
    updates: tuple[HostUpdate, ...] = ()
    states: tuple[OptimizerState, ...] = ()
    """Of a graph that contains its optimizer, where that is kept."""
    decayed: frozenset[str] = frozenset()
    """Those to which a part of the parameter is added: weight decay, or the derivative of a penalty."""


Reader: TypeAlias = Callable[[Exported], Interface | Miss]


def _known(model: ir.Model, name: str) -> bool:
    return name in model.graph.initializers or any(value.name == name for value in model.graph.inputs)


def _owner(value: ir.Value) -> str | None:
    """Return the parameter that a value's name says it is the gradient of."""
    name = value.name or ""
    return name.removesuffix(GRADIENT_SUFFIX) if name.endswith(GRADIENT_SUFFIX) else None


def _views_before(value: ir.Value | None) -> list[ir.Node]:
    """Return the views that a value is of something stored, the last one first."""
    views: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in VIEWS:
        views.append(node)
        value = node.inputs[0]
    return views


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return what a value is a view of."""
    views = _views_before(value)
    return views[-1].inputs[0] if views else value


def _views_behind(value: ir.Value) -> list[ir.Node] | None:
    """Return the views of a value and of those, in order; None where something else reads one."""
    views: list[ir.Node] = []
    stack = [value]
    while stack:
        for node, index in stack.pop().uses():
            if node.op_type not in VIEWS or index != 0:
                return None
            views.append(node)
            stack.extend(node.outputs)
    return views


def ort_artifacts(exported: Exported) -> Interface | Miss:
    """Read ONNX Runtime training artifacts: each gradient goes into an InPlaceAccumulatorV2 with its buffer.

    The buffer is the input `<p>_grad.accumulation.buffer`. The accumulators, their buffers, the reset
    flag and the flags that they return belong to the exporter's optimizer and are removed, and so are views
    (a Transpose and its opposite, an Identity) between them.
    """
    model = exported.model
    nodes = [node for node in model.graph if node.op_type == "InPlaceAccumulatorV2"]
    if not nodes:
        return Miss("it has no InPlaceAccumulatorV2 nodes")
    gradients: dict[str, str] = {}
    orphans: dict[str, str] = {}
    views = [
        view
        for node in nodes
        for value in (node.inputs[0], *node.inputs[2:])
        for view in _views_before(value)
    ]
    behind: list[ir.Node] = []
    for node in nodes:
        buffer, gradient = _source(node.inputs[0]), node.inputs[1]
        if buffer is None or gradient is None:
            return Miss("an InPlaceAccumulatorV2 node lacks its buffer or gradient")
        name = (buffer.name or "").removesuffix(BUFFER_SUFFIX).removesuffix(GRADIENT_SUFFIX)
        flags = _views_behind(node.outputs[0])
        if flags is None:
            return Miss("the flag of an InPlaceAccumulatorV2 node is read by another node")
        behind += flags
        (gradients if _known(model, name) else orphans)[name] = str(gradient.name)
    read = [value for node in nodes for value in (node.inputs[0], *node.inputs[2:])]
    state = {source for value in read if (source := _source(value)) is not None}
    results = {value for node in (*nodes, *behind) for value in node.outputs}
    for index in reversed(range(len(model.graph.outputs))):
        if model.graph.outputs[index] in results:
            del model.graph.outputs[index]
    for node in nodes:
        if len(node.outputs) > 1 and node.outputs[1].uses() and node.inputs[1] is not None:
            node.outputs[1].replace_all_uses_with(node.inputs[1])
    model.graph.remove([*reversed(behind), *nodes], safe=True)
    for view in dict.fromkeys(views):  # those nearest to an accumulator first
        if not view.outputs[0].uses() and not view.outputs[0].is_graph_output():
            model.graph.remove(view, safe=True)
    for index in reversed(range(len(model.graph.inputs))):
        value = model.graph.inputs[index]
        if value in state and not value.uses():
            del model.graph.inputs[index]
    return Interface("ort-artifacts", gradients, orphans, notes=("gradient accumulators removed",))


def ort_module(exported: Exported) -> Interface | Miss:
    """Read a graph captured by ORTModule: a YieldOp hands out predictions and takes in dL/dpredictions.

    The predictions become outputs, dL/dpredictions inputs of the same shape; the loss is outside. One
    that is not in `full_shape_outputs` may be smaller where a host broadcasts it; here it is fed whole.
    """
    graph = exported.model.graph
    nodes = [node for node in graph if node.op_type == "YieldOp"]
    if not nodes:
        return Miss("it has no YieldOp")
    boundary: dict[str, str | None] = {}
    for node in nodes:
        without = node.attributes.get("non_differentiable_outputs")
        skipped = set[int]() if without is None else set(without.as_ints())
        sources = [value for index, value in enumerate(node.inputs) if index not in skipped]
        if len(sources) != len(node.outputs):
            return Miss(f"its YieldOp takes {len(node.outputs)} gradients of {len(sources)} predictions")
        handed = [value for value in node.inputs if value is not None and value.producer() is not None]
        boundary.update((str(value.name), None) for value in handed)
        for source, output in zip(sources, node.outputs, strict=True):
            if source is None:
                continue
            kind, shape = source.type or output.type, source.shape or output.shape
            incoming = ir.Value(name=output.name, type=kind, shape=shape)
            output.replace_all_uses_with(incoming, replace_graph_outputs=True)
            graph.inputs.append(incoming)
            if source in handed:
                boundary[str(source.name)] = str(incoming.name)
        for source in node.inputs:
            if source is not None and source.producer() is not None and not source.is_graph_output():
                graph.outputs.append(source)
        graph.remove(node, safe=True)
    named = named_gradients(exported)
    if isinstance(named, Miss):
        return named
    return Interface("ort-module", named.gradients, named.orphans, boundary=boundary, rows=named.rows)


def named_gradients(exported: Exported) -> Interface | Miss:
    """Read a joint graph: the output `<p>_grad` is the gradient of the input or initializer `<p>`."""
    model = exported.model
    gradients: dict[str, str] = {}
    orphans: dict[str, str] = {}
    for value in model.graph.outputs:
        name = _owner(value)
        if name is None or not is_float(value):
            continue
        (gradients if _known(model, name) else orphans)[name] = str(value.name)
    following = following_row_gradients(model)
    for item in following:
        del gradients[item.parameter]
    pairs = following + [item for item in named_row_gradients(model) if item.parameter not in gradients]
    if not gradients and not pairs:
        return Miss("none of its outputs is named <parameter>_grad after one of its parameters")
    if any(node.domain == "com.microsoft" and node.op_type.endswith("Grad") for node in model.graph):
        frontend = "ort-gradient-graph"
    else:
        frontend = "torch-joint" if model.producer_name == "pytorch" else "named-gradients"
    return Interface(frontend, gradients, orphans, rows=tuple(pairs))


def positional(exported: Exported) -> Interface | Miss:
    """Read a joint graph without names: its gradients follow the loss, in the order of the first inputs."""
    outputs = [value for value in exported.model.graph.outputs if is_float(value)]
    if len(outputs) < 2:
        return Miss("it has fewer than two floating-point outputs, a loss and a gradient")
    return Interface("positional", {}, by_position=True)


READERS: Final[tuple[Reader, ...]] = (ort_artifacts, ort_module, named_gradients, positional)
"""Tried in this order; the first that knows the model reads it."""
