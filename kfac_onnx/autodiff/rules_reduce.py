"""Gradients of reductions, cumulative sums and sorting.

X is the input, Y the output, dY its gradient; "spread" repeats a value of Y's shape along the reduced axes,
so that it has X's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.autodiff.backward import no_gradient
from kfac_onnx.autodiff.working import Working
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import constant, int_attribute, static_shape

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

    Formula: TypeAlias = Callable[["Reduction"], ir.Value]

__all__ = ["RULES"]


class Reduction:
    """One reduction node: its values in the working type, and how to undo that axes are gone."""

    def __init__(self, back: Backward) -> None:
        self.back, self.emit = back, back.emit
        self.work = Working.of(back, back.x())
        given = back.input(1)
        self.axes = constant(given)
        """The reduced axes where they are constant; None also where there are none."""
        self.at_run_time = given if given is not None and self.axes is None else None
        self.keep = bool(int_attribute(back.node, "keepdims", 1))
        empty = given is None or (self.axes is not None and self.axes.size == 0)
        self.nothing = empty and bool(int_attribute(back.node, "noop_with_empty_axes", 0))
        """The node does not reduce."""
        self.everything = empty and not self.nothing

    @property
    def x(self) -> ir.Value:
        """X in the working type."""
        return self.work.up(self.back.x())

    @property
    def y(self) -> ir.Value:
        """Y in the working type, with axes of length 1 where X has been reduced."""
        return self.kept(self.work.up(self.back.y()))

    @property
    def dy(self) -> ir.Value:
        """As `y`, the gradient of Y."""
        return self.kept(self.work.up(self.back.dy))

    def kept(self, value: ir.Value) -> ir.Value:
        """Return a value of Y's shape with axes of length 1 where X has been reduced: it broadcasts to X."""
        if self.keep or self.nothing or self.everything:  # a value of rank 0 broadcasts as it is
            return value
        if self.axes is not None:
            return self.emit.op("Unsqueeze", value, self.emit.ints(*(int(axis) for axis in self.axes)))
        return self.emit.op("Reshape", value, self.emit.op("Shape", self.again("ReduceSum")))

    def again(self, op_type: str, value: ir.Value | None = None) -> ir.Value:
        """Reduce X, or `value` of its shape, by an operator over the same axes, which stay with length 1."""
        source = self.x if value is None else value
        if self.nothing:
            return source
        axes = self.at_run_time
        if self.axes is not None and self.axes.size:
            axes = self.emit.ints(*(int(axis) for axis in self.axes))
        noop = 0 if axes is None else int_attribute(self.back.node, "noop_with_empty_axes", 0)
        return self.emit.op(op_type, source, axes, keepdims=1, noop_with_empty_axes=noop)

    def spread(self, value: ir.Value) -> ir.Value:
        """Return a value that broadcasts to X in X's shape."""
        return value if self.nothing else self.emit.op("Expand", value, self.emit.shape(self.back.x()))

    def count(self) -> ir.Value:
        """Return how many entries of X one entry of Y is made of, rank 0."""
        shape = static_shape(self.back.x())
        if shape is not None and self.at_run_time is None:
            axes = range(len(shape)) if self.everything else [int(axis) for axis in self.axes_or_none()]
            return self.work.number(float(np.prod([shape[axis] for axis in axes])))
        sizes = [self.emit.op("Size", value) for value in (self.back.x(), self.back.y())]
        return self.emit.cast(self.emit.op("Div", *sizes), self.work.work)

    def axes_or_none(self) -> np.ndarray:
        """Return the constant axes, none if the node has none."""
        return np.zeros(0, np.int64) if self.axes is None else self.axes.reshape(-1)


def reduction(formula: Formula, *, elementwise: bool = False) -> Rule:
    """Make a rule of `formula(reduction)`, which gives dX in the working type.

    Operators that do something to each entry (`elementwise`) differ between implementations where there
    are no axes and noop_with_empty_axes is set, and are refused there.
    """

    def rule(back: Backward) -> Gradients:
        found = Reduction(back)
        if found.nothing and elementwise:
            return Miss("noop_with_empty_axes without axes is not supported")
        return [found.work.down(formula(found))]

    rule.__doc__ = formula.__doc__
    return rule


def reduce_sum(r: Reduction) -> ir.Value:
    """ReduceSum: dY."""
    return r.spread(r.dy)


def reduce_mean(r: Reduction) -> ir.Value:
    """ReduceMean: dY / (entries that one entry of Y is made of)."""
    return r.spread(r.emit.op("Div", r.dy, r.count()))


def reduce_extreme(r: Reduction) -> ir.Value:
    """ReduceMax, ReduceMin: dY at the entries that are the extreme, in equal shares."""
    if r.nothing:
        return r.dy
    chosen = r.emit.cast(r.emit.op("Equal", r.x, r.y), r.work.work)
    return r.emit.op("Mul", chosen, r.emit.op("Div", r.dy, r.again("ReduceSum", chosen)))


def reduce_prod(r: Reduction) -> ir.Value:
    """ReduceProd: dY times the product of the other entries.

    With p the product of the entries that are not 0: dY p / X if no entry is 0; if one is, dY p there and
    0 elsewhere; 0 if several are.
    """
    if r.nothing:
        return r.dy
    emit, zero, one = r.emit, r.work.number(0), r.work.number(1)
    x, dy = r.x, r.dy
    is_zero = emit.op("Equal", x, zero)
    rest = emit.op("Where", is_zero, one, x)
    product = emit.op("Mul", dy, r.again("ReduceProd", rest))
    zeros = r.again("ReduceSum", emit.cast(is_zero, r.work.work))
    others = emit.op("Sub", zeros, emit.cast(is_zero, r.work.work))
    return emit.op("Where", emit.op("Equal", others, zero), emit.op("Div", product, rest), zero)


def reduce_l1(r: Reduction) -> ir.Value:
    """ReduceL1 = Σ |X|: dY sign(X)."""
    return r.emit.op("Mul", r.emit.op("Sign", r.x), r.dy)


def reduce_l2(r: Reduction) -> ir.Value:
    """ReduceL2 = √Σ X²: dY X / Y, 0 where Y is 0."""
    emit, y, zero = r.emit, r.y, r.work.number(0)
    share = emit.op("Where", emit.op("Equal", y, zero), zero, emit.op("Div", r.dy, y))
    return emit.op("Mul", r.x, share)


def reduce_sum_square(r: Reduction) -> ir.Value:
    """ReduceSumSquare = Σ X²: 2 dY X."""
    return r.emit.op("Mul", r.x, r.emit.op("Mul", r.dy, r.work.number(2)))


def reduce_log_sum(r: Reduction) -> ir.Value:
    """ReduceLogSum = log Σ X: dY / Σ X."""
    return r.spread(r.emit.op("Div", r.dy, r.again("ReduceSum")))


def reduce_log_sum_exp(r: Reduction) -> ir.Value:
    """ReduceLogSumExp = log Σ exp X: dY exp(X − Y), 0 where Y is −∞."""
    emit, y = r.emit, r.y
    finite = emit.op("Where", emit.op("IsInf", y, detect_positive=0), r.work.number(0), y)
    return emit.op("Mul", r.dy, emit.op("Exp", emit.op("Sub", r.x, finite)))


def cum_sum(back: Backward) -> Gradients:
    """CumSum(X, axis; exclusive, reverse): the cumulative sum of dY from the other end."""
    work = Working.of(back, back.x())
    reverse = int_attribute(back.node, "reverse", 0)
    exclusive = int_attribute(back.node, "exclusive", 0)
    total = back.emit.op("CumSum", work.up(back.dy), back.x(1), reverse=1 - reverse, exclusive=exclusive)
    return [work.down(total)]


def top_k(back: Backward) -> Gradients:
    """TopK(X, k; axis=−1) -> values, indices: dY where the values came from, 0 elsewhere."""
    x = back.x()
    if back.grad(0) is None:
        return [None]
    axis = int_attribute(back.node, "axis", -1)
    indices = back.node.outputs[1] if len(back.node.outputs) > 1 else None
    if indices is None or not indices.name:
        attributes = {name: int_attribute(back.node, name, 1) for name in ("largest", "sorted")}
        inputs = [x, back.x(1)]
        indices = back.emit.many("TopK", inputs, 2, {"axis": axis, **attributes})[1]
    zeros = back.emit.zeros(back.emit.shape(x), back.dtype(x))
    return [back.emit.op("ScatterElements", zeros, indices, back.dy, axis=axis)]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "ArgMax": no_gradient,
    "ArgMin": no_gradient,
    "CumSum": cum_sum,
    "ReduceL1": reduction(reduce_l1, elementwise=True),
    "ReduceL2": reduction(reduce_l2, elementwise=True),
    "ReduceLogSum": reduction(reduce_log_sum, elementwise=True),
    "ReduceLogSumExp": reduction(reduce_log_sum_exp, elementwise=True),
    "ReduceMax": reduction(reduce_extreme),
    "ReduceMean": reduction(reduce_mean),
    "ReduceMin": reduction(reduce_extreme),
    "ReduceProd": reduction(reduce_prod),
    "ReduceSum": reduction(reduce_sum),
    "ReduceSumSquare": reduction(reduce_sum_square, elementwise=True),
    "TopK": top_k,
}
