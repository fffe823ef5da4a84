"""Gradients of activations and softmax, from the formulas.

X is the activation's input, Y its output, dY the gradient of the loss with respect to Y.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.emit import HALF_TYPES, Miss
from kfac_onnx.graph.values import dtype_of, int_attribute

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.graph.emit import Emitter, Lowered, Rule

__all__ = [
    "RULES",
    "fast_gelu_grad",
    "gelu_grad",
    "leaky_relu_grad",
    "log_softmax_grad",
    "number",
    "quick_gelu_grad",
    "relu_grad",
    "sigmoid_grad",
    "softmax_grad",
    "tanh_grad",
]


def elementwise(formula: Callable[[Emitter, ir.Node, ir.Value, ir.Value], ir.Value]) -> Rule:
    """Make a rule of `formula(emit, node, dY, X or Y)`, computed in float32 where the type is a half.

    The operators round once, at their end; so does the rule.
    """

    def rule(emit: Emitter, node: ir.Node) -> Lowered:
        grad, other = node.inputs[:2]
        dtype = dtype_of(grad) or dtype_of(other)
        if grad is None or other is None or dtype is None:
            return Miss("the type of its inputs is unknown")
        work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
        result = formula(emit, node, emit.cast(grad, work, dtype), emit.cast(other, work, dtype))
        return [emit.cast(result, dtype, work)]

    rule.__doc__ = formula.__doc__
    return rule


def number(emit: Emitter, value: float, like: ir.Value) -> ir.Value:
    """Return a constant of the type that `like` has."""
    return emit.scalar(value, dtype_of(like) or ir.DataType.FLOAT)


def tanh_grad(emit: Emitter, _: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
    """TanhGrad(dY, Y) = dY (1 − Y²)."""
    return emit.op("Mul", grad, emit.op("Sub", number(emit, 1, grad), emit.op("Mul", output, output)))


def sigmoid_grad(emit: Emitter, _: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
    """SigmoidGrad(dY, Y) = dY Y (1 − Y)."""
    slope = emit.op("Mul", output, emit.op("Sub", number(emit, 1, grad), output))
    return emit.op("Mul", grad, slope)


def relu_grad(emit: Emitter, _: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
    """ReluGrad(dY, Y) = dY where Y > 0, else 0."""
    zero = number(emit, 0, grad)
    return emit.op("Where", emit.op("Greater", output, zero), grad, zero)


def leaky_relu_grad(emit: Emitter, node: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
    """LeakyReluGrad(dY, Y; alpha) = dY where Y > 0, else alpha dY."""
    found = node.attributes.get("alpha")
    alpha = number(emit, 0.01 if found is None else found.as_float(), grad)
    positive = emit.op("Greater", output, number(emit, 0, grad))
    return emit.op("Where", positive, grad, emit.op("Mul", grad, alpha))


def gelu_grad(emit: Emitter, _: ir.Node, grad: ir.Value, x: ir.Value) -> ir.Value:
    """GeluGrad(dY, X) = dY (Φ(X) + X φ(X)), the exact Gelu with Φ, φ of the normal distribution."""
    error = emit.op("Erf", emit.op("Mul", x, number(emit, math.sqrt(0.5), grad)))
    below = emit.op("Mul", emit.op("Add", error, number(emit, 1, grad)), number(emit, 0.5, grad))
    half_square = emit.op("Mul", emit.op("Mul", x, x), number(emit, -0.5, grad))
    density = emit.op("Mul", emit.op("Exp", half_square), number(emit, 1 / math.sqrt(2 * math.pi), grad))
    return emit.op("Mul", grad, emit.op("Add", below, emit.op("Mul", x, density)))


def fast_gelu_grad(emit: Emitter, _: ir.Node, grad: ir.Value, x: ir.Value) -> ir.Value:
    """FastGeluGrad(dY, X): Gelu ≈ X/2 (1 + tanh u), u = √(2/π) (X + 0.044715 X³)."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    square = emit.op("Mul", x, x)
    inner = emit.op("Add", emit.op("Mul", square, number(emit, k * cubic, grad)), number(emit, k, grad))
    t = emit.op("Tanh", emit.op("Mul", x, inner))
    slope = emit.op("Add", emit.op("Mul", square, number(emit, 3 * k * cubic, grad)), number(emit, k, grad))
    one_less = emit.op("Sub", number(emit, 1, grad), emit.op("Mul", t, t))
    bent = emit.op("Mul", emit.op("Mul", x, one_less), slope)
    total = emit.op("Add", emit.op("Add", t, number(emit, 1, grad)), bent)
    return emit.op("Mul", grad, emit.op("Mul", total, number(emit, 0.5, grad)))


def quick_gelu_grad(emit: Emitter, node: ir.Node, grad: ir.Value, x: ir.Value) -> ir.Value:
    """QuickGeluGrad(dY, X; alpha) = dY s (1 + alpha X (1 − s)), s = sigmoid(alpha X)."""
    found = node.attributes.get("alpha")
    scaled = emit.op("Mul", x, number(emit, 1.702 if found is None else found.as_float(), grad))
    s = emit.op("Sigmoid", scaled)
    rest = emit.op("Mul", scaled, emit.op("Sub", number(emit, 1, grad), s))
    return emit.op("Mul", grad, emit.op("Mul", s, emit.op("Add", rest, number(emit, 1, grad))))


def with_bias(formula: Callable[[Emitter, ir.Node, ir.Value, ir.Value], ir.Value]) -> Rule:
    """Make a rule of a formula in X for an operator whose third input is a bias added to X first."""

    def biased(emit: Emitter, node: ir.Node, grad: ir.Value, x: ir.Value) -> ir.Value:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            return formula(emit, node, grad, x)
        work = dtype_of(grad) or ir.DataType.FLOAT
        return formula(emit, node, grad, emit.op("Add", x, emit.cast(bias, work, dtype_of(bias))))

    biased.__doc__ = formula.__doc__
    return elementwise(biased)


def softmax_grad(emit: Emitter, node: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
    """SoftmaxGrad_13(dY, Y; axis=−1) = Y (dY − Σ dY Y) along axis."""
    axes = emit.ints(int_attribute(node, "axis", -1))
    total = emit.op("ReduceSum", emit.op("Mul", grad, output), axes, keepdims=1)
    return emit.op("Mul", output, emit.op("Sub", grad, total))


def log_softmax_grad(emit: Emitter, node: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
    """LogSoftmaxGrad_13(dY, Y; axis=−1) = dY − exp(Y) Σ dY along axis."""
    axes = emit.ints(int_attribute(node, "axis", -1))
    total = emit.op("ReduceSum", grad, axes, keepdims=1)
    return emit.op("Sub", grad, emit.op("Mul", emit.op("Exp", output), total))


def flattened(formula: Callable[[Emitter, ir.Node, ir.Value, ir.Value], ir.Value]) -> Rule:
    """Make a rule for the operators before opset 13, which see the tensor as a matrix split at `axis`."""

    def matrix(emit: Emitter, node: ir.Node, grad: ir.Value, output: ir.Value) -> ir.Value:
        axis = int_attribute(node, "axis", 1)
        shape = emit.op("Shape", grad)
        rows, columns = (emit.op("Flatten", item, axis=axis) for item in (grad, output))
        flat = ir.Node("", node.op_type, [], attributes=[ir.AttrInt64("axis", -1)])
        return emit.op("Reshape", formula(emit, flat, rows, columns), shape)

    matrix.__doc__ = formula.__doc__
    return elementwise(matrix)


MICROSOFT: dict[str, Rule] = {
    "TanhGrad": elementwise(tanh_grad),
    "SigmoidGrad": elementwise(sigmoid_grad),
    "ReluGrad": elementwise(relu_grad),
    "LeakyReluGrad": elementwise(leaky_relu_grad),
    "GeluGrad": elementwise(gelu_grad),
    "FastGeluGrad": elementwise(fast_gelu_grad),
    "QuickGeluGrad": elementwise(quick_gelu_grad),
    "BiasGeluGrad_dX": with_bias(gelu_grad),
    "BiasFastGeluGrad_dX": with_bias(fast_gelu_grad),
    "SoftmaxGrad_13": elementwise(softmax_grad),
    "LogSoftmaxGrad_13": elementwise(log_softmax_grad),
    "SoftmaxGrad": flattened(softmax_grad),
    "LogSoftmaxGrad": flattened(log_softmax_grad),
}
RULES = {("com.microsoft", name): rule for name, rule in MICROSOFT.items()}
