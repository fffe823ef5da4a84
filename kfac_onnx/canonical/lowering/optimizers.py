"""Lowering of the optimizers of `ai.onnx.preview.training`: Adam, Adagrad and Momentum.

With learning rate R, update count T, and for each tensor X its gradient G and its states V, H:

    Gr = norm_coefficient · X + G
    Momentum  V' = alpha·V + (T > 0 ? beta : 1)·Gr;  X' = X − R·V'  or, nesterov, X − R·(Gr + alpha·V')
    Adagrad   H' = H + Gr²;  X' = X − R/(1 + T·decay_factor) · Gr / (√H' + epsilon)
    Adam      V' = alpha·V + (1 − alpha)·Gr;  H' = beta·H + (1 − beta)·Gr²
              X' = (1 − norm_coefficient_post)·(X − Ra·V' / (√H' + epsilon)),
              Ra = T > 0 ? R·√(1 − beta^T) / (1 − alpha^T) : R

Source: the operators' specifications, domain ai.onnx.preview.training, version 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.emit import Emitter, Lowered, Miss, Rule
from kfac_onnx.graph.values import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GROUPS", "RULES", "TRAINING_DOMAIN", "tensors_of"]

TRAINING_DOMAIN: Final = "ai.onnx.preview.training"
GROUPS: Final = {"Momentum": 3, "Adagrad": 3, "Adam": 4}
"""Operator -> inputs per tensor: X, G and its states."""


def tensors_of(node: ir.Node) -> list[tuple[ir.Value, ...]] | None:
    """Return (X, G, states...) of each tensor that an optimizer node updates; None if its inputs are wrong.

    The node's outputs are X', then each state's new value, grouped the same way without G.
    """
    size = GROUPS[node.op_type]
    held = list(node.inputs[2:])
    if not held or len(held) % size or any(value is None for value in (*node.inputs[:2], *held)):
        return None
    count = len(held) // size
    known = [value for value in held if value is not None]
    return [tuple(known[index::count]) for index in range(count)]


def _attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a float attribute; a default is rounded to float32, as attributes are."""
    found = node.attributes.get(name)
    return float(np.float32(default)) if found is None else found.as_float()


class _Formula:
    """Arithmetic in one element type; constants of zero and one vanish, numbers are emitted once."""

    def __init__(self, emit: Emitter, node: ir.Node, dtype: ir.DataType) -> None:
        self.emit = emit
        self.node = node
        self.dtype = dtype
        self._once: dict[str, ir.Value] = {}

    def once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """Return what `make` emits, the same for all tensors of the node."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def number(self, value: float) -> ir.Value:
        return self.emit.scalar(value, self.dtype)

    def scalar(self, index: int) -> ir.Value:
        """Return a one-entry input of the node (R or T) as a scalar of this type."""
        emit, value = self.emit, _given(self.node.inputs[index])

        def make() -> ir.Value:
            flat = emit.op("Reshape", value, emit.constant(np.zeros(0, np.int64)))
            return emit.cast(flat, self.dtype, dtype_of(value))

        return self.once(f"input {index}", make)

    def scaled(self, factor: float, value: ir.Value) -> ir.Value:
        return value if factor == 1.0 else self.emit.op("Mul", self.number(factor), value)

    def plus(self, first: ir.Value | None, second: ir.Value) -> ir.Value:
        return second if first is None else self.emit.op("Add", first, second)

    def regularized(self, X: ir.Value, G: ir.Value) -> ir.Value:
        """Return G with the gradient of norm_coefficient/2 · ‖X‖²."""
        weight = _attribute(self.node, "norm_coefficient", 0.0)
        return self.plus(None if weight == 0.0 else self.scaled(weight, X), G)

    def after_first(self, then: ir.Value, first: ir.Value) -> ir.Value:
        """Return `then` if T > 0, else `first`."""
        emit, T = self.emit, self.node.inputs[1]
        zero = emit.scalar(0, dtype_of(T) or ir.DataType.INT64)
        flat = emit.op("Reshape", T, emit.constant(np.zeros(0, np.int64)))
        return emit.op("Where", emit.op("Greater", flat, zero), then, first)


def _momentum(f: _Formula, X: ir.Value, G: ir.Value, V: ir.Value) -> tuple[ir.Value, ...] | Miss:
    emit, node = f.emit, f.node
    mode = node.attributes.get("mode")
    kind = "standard" if mode is None else mode.as_string()
    if kind not in ("standard", "nesterov"):
        return Miss(f"its mode is '{kind}', not standard or nesterov")
    alpha, beta = _attribute(node, "alpha", 0.0), _attribute(node, "beta", 1.0)
    g = f.regularized(X, G)
    taken = g
    if beta != 1.0:
        weight = f.once("weight", lambda: f.after_first(f.number(beta), f.number(1.0)))
        taken = emit.op("Mul", weight, g)
    new_v = emit.op("Add", f.scaled(alpha, V), taken)
    step = new_v if kind == "standard" else emit.op("Add", g, f.scaled(alpha, new_v))
    return emit.op("Sub", X, emit.op("Mul", f.scalar(0), step)), new_v


def _adagrad(f: _Formula, X: ir.Value, G: ir.Value, H: ir.Value) -> tuple[ir.Value, ...] | Miss:
    emit, node = f.emit, f.node
    decay = _attribute(node, "decay_factor", 0.0)

    def decayed() -> ir.Value:
        count = f.scaled(decay, f.scalar(1))
        return emit.op("Div", f.scalar(0), emit.op("Add", f.number(1.0), count))

    rate = f.scalar(0) if decay == 0.0 else f.once("rate", decayed)
    g = f.regularized(X, G)
    new_h = emit.op("Add", H, emit.op("Mul", g, g))
    root = emit.op("Add", emit.op("Sqrt", new_h), f.number(_attribute(node, "epsilon", 1e-6)))
    return emit.op("Sub", X, emit.op("Div", emit.op("Mul", rate, g), root)), new_h


def _adam(f: _Formula, X: ir.Value, G: ir.Value, V: ir.Value, H: ir.Value) -> tuple[ir.Value, ...] | Miss:
    emit, node = f.emit, f.node
    alpha, beta = _attribute(node, "alpha", 0.9), _attribute(node, "beta", 0.999)

    def corrected() -> ir.Value:
        one, rate, t = f.number(1.0), f.scalar(0), f.scalar(1)
        second = emit.op("Sqrt", emit.op("Sub", one, emit.op("Pow", f.number(beta), t)))
        first = emit.op("Sub", one, emit.op("Pow", f.number(alpha), t))
        return f.after_first(emit.op("Div", emit.op("Mul", rate, second), first), rate)

    adjusted = f.once("rate", corrected)
    g = f.regularized(X, G)
    new_v = emit.op("Add", f.scaled(alpha, V), f.scaled(1.0 - alpha, g))
    new_h = emit.op("Add", f.scaled(beta, H), f.scaled(1.0 - beta, emit.op("Mul", g, g)))
    root = emit.op("Add", emit.op("Sqrt", new_h), f.number(_attribute(node, "epsilon", 1e-6)))
    new_x = emit.op("Sub", X, emit.op("Div", emit.op("Mul", adjusted, new_v), root))
    post = _attribute(node, "norm_coefficient_post", 0.0)
    return f.scaled(1.0 - post, new_x), new_v, new_h


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise AssertionError("tensors_of has checked the inputs")
    return value


def _lowered(formula: Callable[..., tuple[ir.Value, ...] | Miss]) -> Rule:
    def rule(emit: Emitter, node: ir.Node) -> Lowered:
        groups = tensors_of(node)
        if groups is None:
            return Miss("its inputs are not R, T and as many tensors as gradients and states")
        results: list[tuple[ir.Value, ...]] = []
        formulas: dict[ir.DataType, _Formula] = {}
        for group in groups:
            dtype = dtype_of(group[0]) or ir.DataType.FLOAT
            own = formulas.setdefault(dtype, _Formula(emit, node, dtype))
            made = formula(own, *group)
            if isinstance(made, Miss):
                return made
            results.append(made)
        return [value for column in zip(*results, strict=True) for value in column]

    return rule


RULES: Final[dict[tuple[str, str], Rule]] = {
    (TRAINING_DOMAIN, "Momentum"): _lowered(_momentum),
    (TRAINING_DOMAIN, "Adagrad"): _lowered(_adagrad),
    (TRAINING_DOMAIN, "Adam"): _lowered(_adam),
}
