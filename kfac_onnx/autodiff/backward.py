"""What a rule is given: one forward node, the gradients of its outputs, and the means to emit nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter, Miss
from kfac_onnx.graph.values import all_graphs, bodies_of, dtype_of, static_shape

__all__ = [
    "Backward",
    "Gradients",
    "Propagate",
    "Rule",
    "captured_values",
    "dimensions",
    "gradient_emitter",
    "no_gradient",
]

Gradients: TypeAlias = Sequence[ir.Value | None] | Miss
"""One gradient per input of the node (None: zero, or not wanted; a shorter list is filled up), or why not."""

Propagate: TypeAlias = Callable[
    [Context, Sequence[ir.Node], Mapping[ir.Value, ir.Value], Iterable[ir.Value], list[str]],
    tuple[dict[ir.Value, ir.Value], list[ir.Node]],
]
"""The engine, `engine.propagate`: rules are handed it, so that it can import them."""


def gradient_emitter(context: Context, node: ir.Node) -> Emitter:
    """Return what emits the backward of a forward node, named `gradient/<its first output>/<operator>`."""
    return Emitter.in_place_of(context, node, "gradient", prefix="gradient")


@dataclass(frozen=True)
class Backward:
    """One forward node to be differentiated. A rule reads it, emits through `emit`, and edits nothing.

    `gradients` has one entry per output of `node`: dloss/doutput, of the output's shape and type, or None
    where the loss does not depend on that output. At least one entry is not None.
    """

    node: ir.Node
    emit: Emitter
    gradients: tuple[ir.Value | None, ...]
    wanted: Callable[[ir.Value], bool]
    """Says whether the gradient of a value of the forward graph is wanted."""
    propagate: Propagate
    """Differentiates other nodes: the body of a loop, or what an operator is defined by."""
    extra: list[tuple[ir.Value, ir.Value]] = field(default_factory=list[tuple[ir.Value, ir.Value]])

    @property
    def names(self) -> Context:
        """Fresh names and constants of the model."""
        return self.emit.context

    def grad(self, index: int = 0) -> ir.Value | None:
        """Return the gradient of an output, or None if the loss does not depend on it."""
        return self.gradients[index] if index < len(self.gradients) else None

    @property
    def dy(self) -> ir.Value:
        """The gradient of the first output, for rules of operators that have one output.

        Raises ValueError where the loss depends on another output only.
        """
        found = self.grad()
        if found is None:
            raise ValueError(f"the loss does not depend on the first output of {self.node.op_type}")
        return found

    def input(self, index: int) -> ir.Value | None:
        """Return an input of the node, or None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def x(self, index: int = 0) -> ir.Value:
        """Return an input that the operator requires.

        Raises ValueError where it is left out.
        """
        found = self.input(index)
        if found is None:
            raise ValueError(f"input {index} of {self.node.op_type} is missing")
        return found

    def y(self, index: int = 0) -> ir.Value:
        """Return an output of the forward node."""
        return self.node.outputs[index]

    def needs(self, index: int) -> bool:
        """Say whether the gradient of an input is wanted."""
        value = self.input(index)
        return value is not None and self.wanted(value)

    def dtype(self, value: ir.Value | None) -> ir.DataType:
        """Return a value's element type; where the graph does not tell, that of the gradients."""
        found = dtype_of(value)
        if found is None:
            found = next((dtype_of(item) for item in self.gradients if item is not None), None)
        return found or ir.DataType.FLOAT

    def number(self, number: float, like: ir.Value | None = None) -> ir.Value:
        """Return a constant of rank 0 of the element type of `like` (the gradients' if None)."""
        return self.emit.scalar(number, self.dtype(like))

    def captured(self) -> list[ir.Value]:
        """Return the outer values that the node's nested graphs read and whose gradient is wanted."""
        return [value for value in captured_values(self.node) if self.wanted(value)]

    def add(self, value: ir.Value, gradient: ir.Value) -> None:
        """Add to the gradient of a value that is no input of the node: one that a nested graph reads."""
        self.extra.append((value, gradient))

    def reduce_to(self, value: ir.Value, like: ir.Value, shaped_as: ir.Value | None = None) -> ir.Value:
        """Undo broadcasting: sum `value` over the axes along which `like` was repeated.

        `value` has its own known shape, else that of `shaped_as` (the node's first output if None).
        Decided now where dimensions are known or have the same name, otherwise when the graph runs.
        """
        target = dimensions(like)
        source = dimensions(value if value.shape is not None else shaped_as or self.node.outputs[0])
        axes = None if target is None or source is None else summed_axes(source, target)
        emit = self.emit
        if axes is None or target is None or source is None:
            return self.reduce_at_run_time(value, like)
        if not axes:
            return value
        leading = len(source) - len(target)
        if axes == list(range(leading)):
            return emit.op("ReduceSum", value, emit.ints(*axes), keepdims=0)
        total = emit.op("ReduceSum", value, emit.ints(*axes), keepdims=1)
        return emit.op("Squeeze", total, emit.ints(*range(leading))) if leading else total

    def reduce_at_run_time(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Undo broadcasting as `reduce_to`, comparing shapes when the graph runs."""
        emit = self.emit
        own, full = emit.shape(like), emit.op("Shape", value)
        missing = emit.op("Sub", emit.op("Shape", full), emit.op("Shape", own))
        padded = emit.concat(emit.op("Expand", emit.ints(1), missing), own)
        repeated = emit.op("Not", emit.op("Equal", padded, full))
        axes = emit.op("Reshape", emit.op("NonZero", repeated), emit.ints(-1))
        total = emit.op("ReduceSum", value, axes, keepdims=1, noop_with_empty_axes=1)
        return emit.op("Reshape", total, own)


Rule: TypeAlias = Callable[[Backward], Gradients]
"""Returns the gradients of a node's inputs, emitting what computes them."""


def no_gradient(back: Backward) -> Gradients:
    """Differentiate an operator whose derivative is zero wherever it exists, or that reads only shapes."""
    return [None] * len(back.node.inputs)


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Return the values of enclosing graphs that a node's own graphs read, each once, in order."""
    found: dict[ir.Value, None] = {}
    for top in bodies_of(node):
        inner: set[ir.Value] = set()
        used: list[ir.Value] = []
        for graph in all_graphs(top):
            inner.update(graph.inputs)
            inner.update(graph.initializers.values())
            for item in graph:
                inner.update(item.outputs)
                used.extend(value for value in item.inputs if value is not None)
            used.extend(graph.outputs)
        found.update(dict.fromkeys(value for value in used if value not in inner))
    return list(found)


def dimensions(value: ir.Value) -> list[int | str | None] | None:
    """Return a value's dimensions: a number, a name, or None where nothing is known; None without a rank."""
    known = static_shape(value)
    if known is not None:
        return list(known)
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def summed_axes(source: Sequence[int | str | None], target: Sequence[int | str | None]) -> list[int] | None:
    """Return the axes of `source` over which a value of shape `target` was repeated, None if unknown."""
    leading = len(source) - len(target)
    if leading < 0:
        return None
    axes = list(range(leading))
    for axis, (full, own) in enumerate(zip(source[leading:], target, strict=True), leading):
        if own == 1:
            if full != 1:
                axes.append(axis)
        elif not isinstance(own, int) and full != 1 and (own is None or own != full):
            return None
    return axes
