"""Replaces each `ai.onnx.preview.training::Gradient` by the nodes that compute it.

`Gradient(xs, zs; y)` differentiates y as a function of the values named in xs and zs, which are taken as
independent, at the values that its inputs say. Here the inference graph is differentiated in place; where an
input is another value than the one named, the graph between xs, zs and y is repeated at that value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.autodiff import differentiate
from kfac_onnx.autodiff.backward import captured_values
from kfac_onnx.canonical.lowering.optimizers import TRAINING_DOMAIN
from kfac_onnx.disk.mapped import equal
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.values import dtype_of, static_shape
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.pipeline.log import Log

__all__ = ["ExpandGradients", "expand_gradients", "hold_losses", "is_derivative", "is_gradient"]

TAKEN: Final = "kfac.gradient"
"""Marks a value that already bears the name of a Gradient node's output."""


@dataclass(frozen=True)
class _Wanted:
    """One Gradient node taken out of the graph: `results` stand for its outputs, None where unused."""

    xs: tuple[str, ...]
    zs: tuple[str, ...]
    y: str
    inputs: tuple[str | None, ...]
    results: tuple[ir.Value | None, ...]
    name: str


@register
@dataclass(frozen=True, kw_only=True)
class ExpandGradients(Pass):
    """Replace every Gradient node of ONNX's training standard by the nodes that compute the derivative.

    The rest of the graph has standard operators already. A node that is evaluated at other values than
    those it names gets a copy of the graph between them and the loss; an inner value among those it names
    is independent of what it is computed from. Nodes may differentiate through each other, one loss in all.

    Writes  `kfac.loss`.
    Source  onnx.ai/onnx/operators, ai.onnx.preview.training, Gradient, version 1.
    """

    name: ClassVar[str] = "expand-gradients"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError if a node names what is not there, differentiates a tensor that is no scalar, or
        cannot be differentiated, or if the nodes differentiate different losses.
        """
        count = sum(is_gradient(node) for node in model.graph)
        if not count:
            return NO_CHANGES
        census = Census(model)
        loss = expand_gradients(model)
        metadata.write(model, "loss", metadata.Loss(loss))
        what = "1 Gradient node" if count == 1 else f"{count} Gradient nodes"
        log.note(f"{what} of training_info replaced by derivatives of {loss}")
        log.count("nodes", count)
        return census.changes()


def expand_gradients(model: ir.Model, place: str | None = None) -> str:
    """Replace every Gradient node; return the name of the loss that they differentiate.

    Raises:
        UserError: if a node names what is not there, differentiates a tensor that is no scalar, or cannot
            be differentiated, or if the nodes differentiate different losses.

    """
    wanted = [_take_out(model, node, place) for node in list(model.graph) if is_gradient(node)]
    loss = _one_loss(model, wanted, place)
    pending = list(wanted)
    while pending:
        known = _values(model)
        placeholders = {result for item in pending for result in item.results if result is not None}
        ready = [item for item in pending if not _depends(_named(known, item.y, place), placeholders)]
        if not ready:
            raise UserError("the Gradient nodes of training_info depend on each other", place=place)
        for item in ready:
            _differentiate(model, item, place)
        pending = [item for item in pending if item not in ready]
    model.graph.sort()
    _rename_nodes(model)
    return loss


def _rename_nodes(model: ir.Model) -> None:
    """Give nodes of the same name new ones: each derivative names its nodes by itself."""
    taken: set[str] = set()
    for node in model.graph:
        name, number = node.name, 1
        while node.name and node.name in taken:
            number += 1
            node.name = f"{name}_{number}"
        taken.add(node.name or "")


def is_derivative(value: ir.Value) -> bool:
    """Say whether a value is the result of a Gradient node that was replaced."""
    return TAKEN in value.meta


def is_gradient(node: ir.Node) -> bool:
    """Say whether a node is the standard's Gradient."""
    return node.domain == TRAINING_DOMAIN and node.op_type == "Gradient"


def hold_losses(model: ir.Model) -> None:
    """Make outputs of what Gradient nodes differentiate, so that nothing takes it for unused."""
    wanted = {_loss_of(node) for node in model.graph if is_gradient(node)}
    for node in model.graph:
        for value in node.outputs:
            if value.name in wanted and not value.is_graph_output():
                model.graph.outputs.append(value)


def _loss_of(node: ir.Node) -> str:
    found = node.attributes.get("y")
    return "" if found is None else found.as_string()


def _one_loss(model: ir.Model, wanted: Sequence[_Wanted], place: str | None) -> str:
    """Return the loss; consecutive steps may each compute it, by the same operators from the same values.

    A Gradient node that another one's y depends on (a penalty on a gradient) has no say.
    """
    known = _values(model)
    losses = {item.y: _named(known, item.y, place) for item in wanted}
    helping = {
        item.y
        for item in wanted
        if any(
            _depends(value, {result for result in item.results if result is not None})
            for value in losses.values()
        )
    }
    chosen = [name for name in losses if name not in helping] or list(losses)
    for name in chosen[1:]:
        if not _same(losses[chosen[0]], losses[name], {}):
            raise UserError(
                f"training_info differentiates two losses: {chosen[0]} and {name}",
                place=place,
                help="a training step has one loss: add them in the algorithm, or keep one training_info",
            )
    return chosen[0]


def _same(one: ir.Value | None, other: ir.Value | None, known: dict[tuple[int, int], bool]) -> bool:
    """Say whether two values are computed by the same operators from the same values."""
    if one is other:
        return True
    if one is None or other is None:
        return False
    key = (id(one), id(other))
    if key not in known:
        known[key] = False
        known[key] = _same_nodes(one, other, known)
    return known[key]


def _same_nodes(one: ir.Value, other: ir.Value, known: dict[tuple[int, int], bool]) -> bool:
    first, second = one.producer(), other.producer()
    if first is None or second is None:
        held, also = one.const_value, other.const_value
        if held is None or also is None or one.is_graph_input() or other.is_graph_input():
            return False
        return held.dtype == also.dtype and equal(held.numpy(), also.numpy())
    if (first.domain, first.op_type) != (second.domain, second.op_type) or one.index() != other.index():
        return False
    if len(first.inputs) != len(second.inputs) or str(first.attributes) != str(second.attributes):
        return False
    return all(_same(a, b, known) for a, b in zip(first.inputs, second.inputs, strict=True))


def _take_out(model: ir.Model, node: ir.Node, place: str | None) -> _Wanted:
    """Remove a Gradient node; graph inputs take the place of its outputs for the time being."""
    xs = _strings(node, "xs")
    zs = _strings(node, "zs")
    y = _loss_of(node)
    label = node.name or next((value.name for value in node.outputs if value.name), "") or "Gradient"
    given = (*node.inputs, *[None] * (len(xs) + len(zs) - len(node.inputs)))
    if not xs or not y or len(given) != len(xs) + len(zs) or any(value is None for value in given[: len(xs)]):
        raise UserError(
            f"the Gradient node '{label}' lacks xs, y or its inputs",
            place=place,
            help="it takes one input per name in xs and zs, in that order",
        )
    results: list[ir.Value | None] = []
    for index in range(len(xs)):
        output = node.outputs[index] if index < len(node.outputs) else None
        if output is None or not (output.uses() or output.is_graph_output()):
            results.append(None)
            continue
        source = given[index]
        stand_in = ir.Value(name=output.name)
        if source is not None:
            stand_in.type, stand_in.shape = source.type, source.shape
        output.replace_all_uses_with(stand_in, replace_graph_outputs=True)
        model.graph.inputs.append(stand_in)
        results.append(stand_in)
    held = tuple(None if value is None else value.name for value in given)
    model.graph.remove(node, safe=True)
    return _Wanted(xs, zs, y, held, tuple(results), label)


def _strings(node: ir.Node, name: str) -> tuple[str, ...]:
    found = node.attributes.get(name)
    return () if found is None else tuple(found.as_strings())


def _values(model: ir.Model) -> dict[str, ir.Value]:
    known = {str(value.name): value for node in model.graph for value in node.outputs}
    known.update((str(value.name), value) for value in model.graph.inputs)
    known.update(model.graph.initializers)
    return known


def _named(known: Mapping[str, ir.Value], name: str, place: str | None) -> ir.Value:
    if name not in known:
        raise UserError(
            f"a Gradient node of training_info names '{name}', which the graph does not have"
            f"{did_you_mean(name, known)}",
            place=place,
        )
    return known[name]


def _depends(value: ir.Value, on: set[ir.Value]) -> bool:
    stack, seen = [value], set[ir.Value]()
    while stack:
        item = stack.pop()
        if item in on:
            return True
        node = item.producer()
        if item in seen or node is None:
            continue
        seen.add(item)
        stack.extend(part for part in (*node.inputs, *captured_values(node)) if part is not None)
    return False


def _differentiate(model: ir.Model, item: _Wanted, place: str | None) -> None:
    known = _values(model)
    named = [_named(known, name, place) for name in (*item.xs, *item.zs)]
    y = _named(known, item.y, place)
    shape = static_shape(y)
    if shape is not None and any(dim != 1 for dim in shape):
        raise UserError(
            f"the Gradient node '{item.name}' differentiates '{item.y}', which has shape {list(shape)}: "
            "only a loss of one entry has a gradient",
            place=place,
            help="reduce it to a scalar in the algorithm: ReduceSum or ReduceMean",
        )
    model.graph.sort()
    given = [None if name is None else _named(known, name, place) for name in item.inputs]
    moved = {
        own: other for own, other in zip(named, given, strict=True) if other is not None and other is not own
    }
    if moved:
        y, named = _repeated(model, y, named, moved, place)
    # Intermediate values among xs and zs are independent: what they are computed from does not count.
    cut = {value: _like(value) for value in named if value.producer() is not None and value is not y}
    for value, stand_in in cut.items():
        _redirect(value, stand_in)
    model.graph.inputs.extend(cut.values())
    wanted = [
        (cut.get(value, value), result)
        for value, result in zip(named, item.results, strict=False)
        if result is not None
    ]
    try:
        gradients = differentiate(model, y, list(dict.fromkeys(value for value, _ in wanted)), place=place)
    finally:
        for value, stand_in in cut.items():
            _redirect(stand_in, value)
            model.graph.inputs.remove(stand_in)
    known = _values(model)
    for value, result in wanted:
        _put(model, gradients[value], result, known)


def _redirect(value: ir.Value, other: ir.Value) -> None:
    """Let every reader of `value` read `other`; outputs of the graph stay."""
    for usage in list(value.uses()):
        usage.node.replace_input_with(usage.idx, other)


def _like(value: ir.Value) -> ir.Value:
    """Return a new value of the same type and shape, under the same name with a suffix."""
    dtype = dtype_of(value)
    kind = value.type or (None if dtype is None else ir.TensorType(dtype))
    return ir.Value(name=value.name, type=kind, shape=value.shape)


def _put(model: ir.Model, gradient: ir.Value, result: ir.Value, known: Mapping[str, ir.Value]) -> None:
    """Let `gradient` take the readers and the name of a Gradient node's output."""
    model.graph.inputs.remove(result)
    name, result.name = result.name, None
    if gradient.producer() is None or TAKEN in gradient.meta:
        node = ir.Node("", "Identity", [gradient], num_outputs=1)
        model.graph.append(node)
        own = node.outputs[0]
        own.type, own.shape = gradient.type or result.type, gradient.shape or result.shape
        gradient = own
    gradient.meta[TAKEN] = True
    taken = known.get(str(name))
    if taken is not None and taken is not gradient and taken is not result:
        taken.name = Context.of(model).fresh(f"kfac/gradient/{name}")
    gradient.name = name
    result.replace_all_uses_with(gradient, replace_graph_outputs=True)


def _repeated(
    model: ir.Model,
    y: ir.Value,
    named: list[ir.Value],
    moved: dict[ir.Value, ir.Value],
    place: str | None,
) -> tuple[ir.Value, list[ir.Value]]:
    """Repeat the nodes between `moved` and y at the given values; return the new y and values of xs, zs."""
    names = Context.of(model)
    replaced = dict(moved)
    fixed = set(named)
    copies: list[ir.Node] = []
    for node in list(model.graph):
        if not any(value in replaced for value in node.inputs) or set(node.outputs) & fixed:
            continue
        if any(True for attribute in node.attributes.values() if _holds_graph(attribute)):
            raise UserError(
                f"a Gradient node of training_info is evaluated at other values through '{node.op_type}', "
                "whose body cannot be repeated",
                place=place,
                help="give the Gradient node the values that it names in xs and zs",
            )
        inputs = [None if value is None else replaced.get(value, value) for value in node.inputs]
        outputs = [
            ir.Value(name=names.fresh(f"{value.name}.at"), type=value.type, shape=value.shape)
            for value in node.outputs
        ]
        copies.append(
            ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs)
        )
        replaced.update(zip(node.outputs, outputs, strict=True))
    model.graph.extend(copies)
    return replaced.get(y, y), [moved.get(value, value) for value in named]


def _holds_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
