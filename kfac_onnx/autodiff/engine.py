"""Accumulation of gradients in reverse order of the nodes, linear in their number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.backward import Backward, captured_values, gradient_emitter, no_gradient
from kfac_onnx.autodiff.table import rule_of
from kfac_onnx.errors import UserError
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import REMEMBERED, dtype_of, label, static_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kfac_onnx.graph.emit import Emitter

__all__ = ["append_gradients", "differentiate", "propagate"]

MANY: Final = 3
"""From so many terms on, one Sum adds them; below, Add."""
SUM_TYPES: Final = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def differentiate(
    model: ir.Model, loss: ir.Value, wrt: Sequence[ir.Value], *, place: str | None = None
) -> dict[ir.Value, ir.Value]:
    """Append the backward nodes of `loss` to the main graph; return dloss/dvalue for each value of `wrt`.

    A gradient has its value's shape and type. A loss that is no scalar is summed: its own gradient is ones.
    Where the loss does not depend on a value, or only through operators without a derivative, its gradient
    is zeros. The model is in canonical form (opset 18 or newer, no functions, sorted nodes).

    Raises:
        UserError: for all nodes at once, between `wrt` and `loss`, that have no rule or that their rule
            does not cover; the model is then unchanged.

    """
    found = append_gradients(model, loss, wrt, place=place)
    names = Context.of(model)
    for value in wrt:
        if value not in found:
            emit = gradient_emitter(names, _anchor(value))
            zeros = emit.zeros(emit.shape(value), dtype_of(value) or ir.DataType.FLOAT)
            _describe(zeros, value)
            model.graph.extend(emit.nodes)
            found[value] = zeros
    return {value: found[value] for value in wrt}


def append_gradients(
    model: ir.Model, loss: ir.Value, wrt: Sequence[ir.Value], *, place: str | None = None
) -> dict[ir.Value, ir.Value]:
    """Append the backward nodes as `differentiate`; values that the loss does not depend on are left out.

    Raises:
        UserError: as `differentiate`.

    """
    before = set(model.graph.initializers)
    names = Context.of(model)
    names.invalidate()
    first = gradient_emitter(names, _anchor(loss))
    seed = _ones_like(first, loss)
    missing: list[str] = []
    found, nodes = propagate(names, list(model.graph), {loss: seed}, wrt, missing)
    nodes[:0] = first.nodes
    if not missing:
        model.graph.extend(nodes)
        return found
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    for name in set(model.graph.initializers) - before:
        del model.graph.initializers[name]
    what = "1 node has" if len(missing) == 1 else f"{len(missing)} nodes have"
    raise UserError(
        f"{what} no gradient rule between the parameters and the loss",
        place=place,
        tried=missing,
        help="export the model without these operators, or export its gradients with it",
    )


def propagate(
    names: Context,
    nodes: Sequence[ir.Node],
    seeds: Mapping[ir.Value, ir.Value],
    wrt: Iterable[ir.Value],
    missing: list[str],
) -> tuple[dict[ir.Value, ir.Value], list[ir.Node]]:
    """Return the gradients of `wrt` (those that there are), and the nodes that compute them, in order.

    `nodes` are the forward nodes of one graph, sorted; `seeds` maps values of that graph to their own
    gradients. The nodes are not put into any graph. What has no rule is appended to `missing`, one line
    per node; the gradients are then of no use.
    """
    wanted = list(wrt)
    active, reached = _between(nodes, seeds, wanted)
    sums = _Sums(names)
    for value, gradient in seeds.items():
        sums.add(value, gradient)
    for node in reversed(active):
        gradients = tuple(sums.total(value) for value in node.outputs)
        if all(item is None for item in gradients):
            continue
        emit = gradient_emitter(names, node)
        back = Backward(node, emit, gradients, reached.__contains__, propagate)
        rule = rule_of(node)
        results = (
            Miss(f"no rule for {node.domain or 'ai.onnx'}::{node.op_type}") if rule is None else rule(back)
        )
        if isinstance(results, Miss):
            missing.append(f"{label(node)}: {results.reason}")
            results = [_stand_in(value) if back.needs(i) else None for i, value in enumerate(node.inputs)]
        sums.nodes.extend(emit.nodes)
        for index, result in enumerate(results):
            value = node.inputs[index] if index < len(node.inputs) else None
            if result is not None and value is not None and value in reached:
                sums.add(value, result)
        for value, result in back.extra:
            if value in reached:
                sums.add(value, result)
    found = {value: gradient for value in wanted if (gradient := sums.total(value)) is not None}
    return found, sums.nodes


def _between(
    nodes: Sequence[ir.Node], seeds: Iterable[ir.Value], wrt: Iterable[ir.Value]
) -> tuple[list[ir.Node], set[ir.Value]]:
    """Return the nodes through which `wrt` reaches the seeds, in order, and the values on those ways."""
    reached = set(wrt)
    touched: list[tuple[ir.Node, list[ir.Value]]] = []
    for node in nodes:
        read = [
            value
            for value in (*node.inputs, *captured_values(node))
            if value is not None and value in reached
        ]
        if not read or rule_of(node) is no_gradient:
            continue
        touched.append((node, read))
        reached.update(value for value in node.outputs if _may_have_gradient(value))
    needed = set(seeds)
    active: list[ir.Node] = []
    for node, read in reversed(touched):
        if any(value in needed and value in reached for value in node.outputs):
            active.append(node)
            needed.update(read)
    return active[::-1], reached & needed


def _may_have_gradient(value: ir.Value) -> bool:
    dtype = dtype_of(value)
    return dtype is None or dtype.is_floating_point()


class _Sums:
    """Gradients under construction: the terms of each value, added up when they are asked for."""

    def __init__(self, names: Context) -> None:
        self.names = names
        self.nodes: list[ir.Node] = []
        self._terms: dict[ir.Value, list[ir.Value]] = {}
        self._named: set[ir.Value] = set()

    def add(self, value: ir.Value, gradient: ir.Value) -> None:
        """Add a term to the gradient of a value."""
        self._terms.setdefault(value, []).append(gradient)

    def total(self, value: ir.Value) -> ir.Value | None:
        """Return the gradient of a value, called `<value>_grad`, or None where it has no term."""
        terms = self._terms.get(value)
        if not terms:
            return None
        if len(terms) > 1:
            emit = gradient_emitter(self.names, _anchor(value))
            for term in terms:
                _describe(term, value)
            if len(terms) >= MANY and dtype_of(value) in SUM_TYPES:
                total = emit.op("Sum", *terms)
            else:
                total = terms[0]
                for term in terms[1:]:
                    total = emit.op("Add", total, term)
                    _describe(total, value)
            self.nodes.extend(emit.nodes)
            self._terms[value] = terms = [total]
        (gradient,) = terms
        _describe(gradient, value)
        if gradient not in self._named and gradient.producer() is not None and gradient.graph is None:
            if value.name:
                gradient.name = self.names.fresh(f"{value.name}_grad")
            self._named.add(gradient)
        return gradient


def _describe(gradient: ir.Value, like: ir.Value) -> None:
    """Give a gradient the type and shape of its value where it has none."""
    dtype = gradient.dtype or dtype_of(like)
    shape = gradient.shape
    if shape is None:
        known = static_shape(like)
        shape = (
            ir.Shape(known)
            if known is not None
            else None
            if like.shape is None
            else ir.Shape(list(like.shape))
        )
    if shape is None or dtype is None:  # a file has no place for one without the other
        gradient.meta[REMEMBERED] = dtype
        return
    gradient.shape, gradient.type = shape, gradient.type or ir.TensorType(dtype)


def _stand_in(value: ir.Value | None) -> ir.Value | None:
    """Return a value that takes the place of a gradient which nothing can compute."""
    return None if value is None else ir.Value(name="", type=value.type, shape=value.shape)


def _ones_like(emit: Emitter, value: ir.Value) -> ir.Value:
    dtype = dtype_of(value) or ir.DataType.FLOAT
    known = static_shape(value)
    if known is not None:
        return emit.constant(np.ones(known, dtype.numpy()))
    return emit.op("Expand", emit.scalar(1.0, dtype), emit.shape(value))


def _anchor(value: ir.Value) -> ir.Node:
    """Return a node after which values that belong to `value` are named."""
    producer = value.producer()
    if producer is not None and producer.outputs[0] is value:
        return producer
    return ir.Node("", "Identity", [], outputs=[ir.Value(name=value.name)])
