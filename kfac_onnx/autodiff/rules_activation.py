"""Gradients of activations and other elementwise functions of one input, and of Dropout.

X is the input, Y = f(X) the output, dY its gradient: dX = dY f'(X). At a kink the derivative is the one that
PyTorch takes (Relu: 0 at 0).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeAlias

import onnx_ir as ir

from kfac_onnx.autodiff.working import Working, by_lowering, float_attribute
from kfac_onnx.canonical.lowering import activations
from kfac_onnx.canonical.lowering.plumbing import dropout_grad
from kfac_onnx.graph.values import constant

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule
    from kfac_onnx.graph.emit import Emitter

    Formula: TypeAlias = Callable[[Emitter, ir.Node, ir.Value, ir.Value], ir.Value]

__all__ = ["RULES", "of_input", "of_output"]

number = activations.number


def of_input(formula: Formula) -> Rule:
    """Make a rule of `formula(emit, node, dY, X)`, computed in float32 where the type is a half."""

    def rule(back: Backward) -> Gradients:
        work = Working.of(back, back.x())
        return [work.down(formula(back.emit, back.node, work.up(back.dy), work.up(back.x())))]

    rule.__doc__ = formula.__doc__
    return rule


def of_output(formula: Formula) -> Rule:
    """Make a rule of `formula(emit, node, dY, Y)`, computed in float32 where the type is a half."""

    def rule(back: Backward) -> Gradients:
        work = Working.of(back, back.x())
        return [work.down(formula(back.emit, back.node, work.up(back.dy), work.up(back.y())))]

    rule.__doc__ = formula.__doc__
    return rule


def _below(emit: Emitter, x: ir.Value) -> ir.Value:
    """Return min(X, 0), whose exponential cannot overflow."""
    return emit.op("Min", x, number(emit, 0, x))


def _positive(emit: Emitter, x: ir.Value) -> ir.Value:
    return emit.op("Greater", x, number(emit, 0, x))


def elu(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Elu(X; alpha=1): dY where X > 0, else dY alpha exp(X)."""
    slope = emit.op("Exp", _below(emit, x))
    alpha = number(emit, float_attribute(node, "alpha", 1.0), x)
    return emit.op("Where", _positive(emit, x), dy, emit.op("Mul", dy, emit.op("Mul", slope, alpha)))


def selu(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Selu(X; alpha, gamma): dY gamma where X > 0, else dY gamma alpha exp(X)."""
    alpha = float_attribute(node, "alpha", 1.67326319217681884765625)
    gamma = float_attribute(node, "gamma", 1.05070102214813232421875)
    low = emit.op("Mul", emit.op("Exp", _below(emit, x)), number(emit, alpha * gamma, x))
    return emit.op("Mul", dy, emit.op("Where", _positive(emit, x), number(emit, gamma, x), low))


def celu(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Celu(X; alpha=1): dY where X > 0, else dY exp(X / alpha)."""
    alpha = float_attribute(node, "alpha", 1.0)
    slope = emit.op("Exp", emit.op("Div", _below(emit, x), number(emit, alpha, x)))
    return emit.op("Where", _positive(emit, x), dy, emit.op("Mul", dy, slope))


def thresholded_relu(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """ThresholdedRelu(X; alpha=1): dY where X > alpha, else 0."""
    above = emit.op("Greater", x, number(emit, float_attribute(node, "alpha", 1.0), x))
    return emit.op("Where", above, dy, number(emit, 0, x))


def hard_sigmoid(emit: Emitter, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    """HardSigmoid(X; alpha=0.2, beta=0.5): dY alpha where 0 < Y < 1, else 0."""
    alpha = float_attribute(node, "alpha", 0.2)
    inside = emit.op("And", _positive(emit, y), emit.op("Less", y, number(emit, 1, y)))
    return emit.op("Where", inside, emit.op("Mul", dy, number(emit, alpha, y)), number(emit, 0, y))


def hard_swish(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """HardSwish(X): 0 where X <= −3, dY where X >= 3, dY (X/3 + 1/2) between."""
    slope = emit.op("Add", emit.op("Div", x, number(emit, 3, x)), number(emit, 0.5, x))
    below = emit.op("LessOrEqual", x, number(emit, -3, x))
    above = emit.op("GreaterOrEqual", x, number(emit, 3, x))
    slope = emit.op("Where", above, number(emit, 1, x), slope)
    return emit.op("Where", below, number(emit, 0, x), emit.op("Mul", dy, slope))


def softplus(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Softplus(X) = log(1 + exp(X)): dY sigmoid(X)."""
    return emit.op("Mul", dy, emit.op("Sigmoid", x))


def softsign(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Softsign(X) = X / (1 + |X|): dY / (1 + |X|)²."""
    root = emit.op("Add", emit.op("Abs", x), number(emit, 1, x))
    return emit.op("Div", dy, emit.op("Mul", root, root))


def mish(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Mish(X) = X t, t = tanh(softplus(X)): dY (t + X (1 − t²) sigmoid(X))."""
    t = emit.op("Tanh", emit.op("Softplus", x))
    bend = emit.op("Mul", emit.op("Sub", number(emit, 1, x), emit.op("Mul", t, t)), emit.op("Sigmoid", x))
    return emit.op("Mul", dy, emit.op("Add", t, emit.op("Mul", x, bend)))


def quick_gelu(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """com.microsoft QuickGelu(X; alpha=1.702) = X s, s = sigmoid(alpha X): dY s (1 + alpha X (1 − s))."""
    return activations.quick_gelu_grad(emit, node, dy, x)


def gelu(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Gelu(X; approximate): dY (Φ(X) + X φ(X)), or the derivative of the tanh approximation."""
    found = node.attributes.get("approximate")
    exact = found is None or found.as_string() != "tanh"
    return (activations.gelu_grad if exact else activations.fast_gelu_grad)(emit, node, dy, x)


def erf(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Erf(X): dY 2/√π exp(−X²)."""
    bell = emit.op("Exp", emit.op("Neg", emit.op("Mul", x, x)))
    return emit.op("Mul", dy, emit.op("Mul", bell, number(emit, 2 / math.sqrt(math.pi), x)))


def shrink(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Shrink(X; lambd=0.5, bias): dY where |X| > lambd, else 0."""
    far = emit.op("Greater", emit.op("Abs", x), number(emit, float_attribute(node, "lambd", 0.5), x))
    return emit.op("Where", far, dy, number(emit, 0, x))


def _one_plus_square(emit: Emitter, x: ir.Value, sign: int) -> ir.Value:
    """Return 1 + X² or 1 − X²."""
    return emit.op("Add" if sign > 0 else "Sub", number(emit, 1, x), emit.op("Mul", x, x))


def asin(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Asin(X): dY / √(1 − X²)."""
    return emit.op("Div", dy, emit.op("Sqrt", _one_plus_square(emit, x, -1)))


def acos(emit: Emitter, node: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Acos(X): −dY / √(1 − X²)."""
    return emit.op("Neg", asin(emit, node, dy, x))


def atan(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Atan(X): dY / (1 + X²)."""
    return emit.op("Div", dy, _one_plus_square(emit, x, 1))


def sinh(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Sinh(X): dY cosh(X)."""
    return emit.op("Mul", dy, emit.op("Cosh", x))


def cosh(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Cosh(X): dY sinh(X)."""
    return emit.op("Mul", dy, emit.op("Sinh", x))


def asinh(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Asinh(X): dY / √(1 + X²)."""
    return emit.op("Div", dy, emit.op("Sqrt", _one_plus_square(emit, x, 1)))


def acosh(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Acosh(X): dY / √(X² − 1)."""
    return emit.op("Div", dy, emit.op("Sqrt", emit.op("Neg", _one_plus_square(emit, x, -1))))


def atanh(emit: Emitter, _: ir.Node, dy: ir.Value, x: ir.Value) -> ir.Value:
    """Atanh(X): dY / (1 − X²)."""
    return emit.op("Div", dy, _one_plus_square(emit, x, -1))


def prelu(back: Backward) -> Gradients:
    """PRelu(X, slope): dX = dY where X > 0, else dY slope; dslope = Σ dY X where X <= 0."""
    emit, x, slope = back.emit, back.x(0), back.x(1)
    work = Working.of(back, x)
    dy, data = work.up(back.dy), work.up(x)
    positive = _positive(emit, data)
    dx = None
    if back.needs(0):
        dx = work.down(emit.op("Where", positive, dy, emit.op("Mul", dy, work.up(slope))))
    if not back.needs(1):
        return [dx, None]
    part = emit.op("Where", positive, work.number(0), emit.op("Mul", dy, data))
    return [dx, work.down(back.reduce_to(part, slope))]


def biased(formula: Formula) -> Rule:
    """Make a rule of a formula in X for an operator f(X + bias), where the bias may be left out."""
    plain = of_input(formula)

    def rule(back: Backward) -> Gradients:
        bias = back.input(1)
        if bias is None:
            return plain(back)
        work = Working.of(back, back.x())
        x = back.emit.op("Add", work.up(back.x()), work.up(bias))
        dx = work.down(formula(back.emit, back.node, work.up(back.dy), x))
        return [dx, back.reduce_to(dx, bias) if back.needs(1) else None]

    rule.__doc__ = formula.__doc__
    return rule


def dropout(back: Backward) -> Gradients:
    """Dropout(X, ratio=0.5, training_mode=false) -> Y, mask: dY mask / (1 − ratio) in training, else dY.

    The mask is the forward node's own, as another Dropout would draw other numbers: a node that does not
    write it gets that output, which changes none of its results.
    """
    node = back.node
    if back.input(2) is None:
        return [back.dy]
    mode = constant(back.input(2))
    if mode is not None and not bool(mode.reshape(())):
        return [back.dy]
    if len(node.outputs) < 2:
        node.resize_outputs(2)
    mask = node.outputs[1]
    if not mask.name:
        mask.name = back.names.fresh(f"{node.outputs[0].name}_mask")
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), node.outputs[0].shape
    inputs = [back.dy, mask, back.input(1), back.input(2)]
    return by_lowering(back, dropout_grad, "DropoutGrad", inputs, [True])


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Acos": of_input(acos),
    "Acosh": of_input(acosh),
    "Asin": of_input(asin),
    "Asinh": of_input(asinh),
    "Atan": of_input(atan),
    "Atanh": of_input(atanh),
    "Celu": of_input(celu),
    "Cosh": of_input(cosh),
    "Dropout": dropout,
    "Elu": of_input(elu),
    "Erf": of_input(erf),
    "Gelu": of_input(gelu),
    "HardSigmoid": of_output(hard_sigmoid),
    "HardSwish": of_input(hard_swish),
    "LeakyRelu": of_input(activations.leaky_relu_grad),
    "Mish": of_input(mish),
    "PRelu": prelu,
    "Relu": of_output(activations.relu_grad),
    "Selu": of_input(selu),
    "Shrink": of_input(shrink),
    "Sigmoid": of_output(activations.sigmoid_grad),
    "Sinh": of_input(sinh),
    "Softplus": of_input(softplus),
    "Softsign": of_input(softsign),
    "Tanh": of_output(activations.tanh_grad),
    "ThresholdedRelu": of_input(thresholded_relu),
    ("com.microsoft", "BiasGelu"): biased(activations.gelu_grad),
    ("com.microsoft", "FastGelu"): biased(activations.fast_gelu_grad),
    ("com.microsoft", "Gelu"): of_input(activations.gelu_grad),
    ("com.microsoft", "QuickGelu"): of_input(quick_gelu),
}
