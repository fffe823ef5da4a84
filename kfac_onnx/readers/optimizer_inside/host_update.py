"""What a drop-in graph needs to know of the optimizer that stays in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.operators import ORDERED_VIEWS, Trait, having
from kfac_onnx.graph.values import dtype_of, static_shape
from kfac_onnx.metadata import HostUpdate, OptimizerState
from kfac_onnx.readers.optimizer_inside.added_terms import linear_sources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from kfac_onnx.readers.load import Exported
    from kfac_onnx.readers.optimizer_inside.find_updates import Part, Update
    from kfac_onnx.readers.optimizer_inside.flow import Flow

__all__ = ["OURS", "kept"]

OURS: Final = "kfac.gradient"
"""Marks nodes that compute a gradient from what an update holds; they are no part of the update."""
SCALINGS: Final = having(Trait.SCALES) | {"Neg", "Cast"}


def kept(
    news: Mapping[ir.Value, ir.Value], updates: Sequence[Update], exported: Exported, flow: Flow
) -> tuple[tuple[HostUpdate, ...], tuple[OptimizerState, ...]]:
    """Return how each parameter is updated, and the optimizer's states with their new values."""
    found = {item.parameter: item for item in updates}
    held: list[HostUpdate] = []
    for parameter, new in news.items():
        name, output = str(parameter.name), str(new.name)
        if name in exported.chosen:
            held.append(HostUpdate(name, output, exported.chosen[name]))
        elif parameter in found:
            held.append(_described(found[parameter], flow))
    return tuple(held), tuple(_states(news, exported, flow))


def _described(update: Update, flow: Flow) -> HostUpdate:
    part = update.parts[0]
    problem = None
    steps: tuple[str, ...] = ()
    if len(update.parts) > 1:
        problem = "it adds several parts of the gradient one by one"
    elif part.scatter is not None:
        between = _between(part, flow)
        steps = tuple(str(node.outputs[0].name) for node in between or ())
        if between is None or part.views or update.states or update.decayed or update.clipped:
            problem = "it scatters rows that it makes of the gradient by more than a learning rate"
        elif part.scatter.inputs[0] is not update.parameter or part.scatter.outputs[0] is not update.new:
            problem = "it scatters the rows into something else than the parameter"
    elif not _invertible(part.views):
        problem = "it takes the gradient in another layout"
    return HostUpdate(
        parameter=str(update.parameter.name),
        output=str(update.new.name),
        source=str(part.value.name),
        negative=part.negative,
        views=tuple(view.op_type for view in part.views),
        rows=part.scatter is not None,
        steps=steps,
        problem=problem,
    )


def _invertible(views: Sequence[ir.Node]) -> bool:
    kinds = {view.op_type for view in views}
    if kinds == {"Transpose"} and len(views) == 1:
        return len(views[0].outputs[0].shape or ()) == 2
    return kinds <= ORDERED_VIEWS - {"Cast", "CastLike"}


def _between(part: Part, flow: Flow) -> list[ir.Node] | None:
    """Return the scalings between rows and what is scattered, nearest the rows first; None for more."""
    value = None if part.scatter is None else part.scatter.inputs[2]
    nodes: list[ir.Node] = []
    while value is not None and value is not part.value:
        node = value.producer()
        if node is None or node.op_type not in SCALINGS | ORDERED_VIEWS or node.domain:
            return None
        if (
            node.op_type in SCALINGS
        ):  # every entry is scaled alike, so it does not matter how they are laid out
            nodes.append(node)
        followed = [item for item in node.inputs if item in flow.batch and not flow.is_number(item)]
        value = followed[0] if len(followed) == 1 else None
    return nodes[::-1] if value is part.value else None


def _states(news: Mapping[ir.Value, ir.Value], exported: Exported, flow: Flow) -> list[OptimizerState]:
    """Pair the optimizer's states with outputs: as the file binds them, else by data flow and shape."""
    model = exported.model
    if exported.updates:
        owners = {str(value.name) for value in news}
        return [OptimizerState(key, new) for key, new in exported.updates.items() if key not in owners]
    taken = set(news.values())
    claims: dict[ir.Value, list[ir.Value]] = {}
    for value in dict.fromkeys(model.graph.outputs):
        if value in taken or value in flow.forward or value.producer() is None:
            continue
        sources = [
            item.value
            for item in linear_sources(value, flow)
            if item.added
            and item.value in flow.states
            and static_shape(item.value) == static_shape(value)
            and dtype_of(item.value) == dtype_of(value)
        ]
        if len(sources) == 1:
            claims.setdefault(sources[0], []).append(value)
    return [
        OptimizerState(str(state.name), str(found[0].name))
        for state, found in claims.items()
        if len(found) == 1
    ]
