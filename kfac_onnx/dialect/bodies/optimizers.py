"""First-order optimizers for all other parameters, and for tables that are compared with them.

No Nesterov, no dampening; weight decay is decoupled, an operator of its own that any of them can follow.
Sources: Polyak 1964 (momentum), Kingma & Ba 2015 (Adam, its epsilon outside the root), Duchi, Hazan & Singer
2011 (Adagrad), Loshchilov & Hutter 2019, algorithm 2 (decoupled decay, https://arxiv.org/abs/1711.05101).
"""

from __future__ import annotations

from onnxscript import FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F32, F64, body, op

__all__ = ["adagrad", "adam", "decay_weights", "momentum", "sgd"]


@body
def decay_weights(W: FLOAT, lr: FLOAT, decay: float):
    """W' = W·(1 − lr·decay)."""
    return op.Mul(W, op.Sub(op.Constant(value_float=1.0), op.Mul(lr, op.Constant(value_float=decay))))


@body
def sgd(W: FLOAT, g: FLOAT, lr: FLOAT):
    """W' = W − lr·g."""
    return op.Sub(W, op.Mul(lr, g))


@body
def momentum(W: FLOAT, g: FLOAT, v: FLOAT, lr: FLOAT, mu: float):
    """Compute v' = mu·v + g, W' = W − lr·v'."""
    new_v = op.Add(op.Mul(op.Constant(value_float=mu), v), g)
    return op.Sub(W, op.Mul(lr, new_v)), new_v


@body
def adam(
    W: FLOAT, g: FLOAT, m: FLOAT, v: FLOAT, t: INT64, lr: FLOAT, beta1: float, beta2: float, epsilon: float
):
    """Compute m' = β1·m + (1−β1)·g, v' = β2·v + (1−β2)·g², W' = W − lr·m̂/(sqrt(v̂) + ε); t counts from 1.

    m̂ = m'/(1−β1^t), v̂ = v'/(1−β2^t).
    """
    one64 = op.Cast(op.Constant(value_float=1.0), to=F64)
    b1 = op.Cast(op.Constant(value_float=beta1), to=F64)
    b2 = op.Cast(op.Constant(value_float=beta2), to=F64)
    t64 = op.Cast(t, to=F64)
    fresh1 = op.Cast(op.Sub(one64, b1), to=F32)
    fresh2 = op.Cast(op.Sub(one64, b2), to=F32)
    new_m = op.Add(op.Mul(op.Constant(value_float=beta1), m), op.Mul(fresh1, g))
    new_v = op.Add(op.Mul(op.Constant(value_float=beta2), v), op.Mul(fresh2, op.Mul(g, g)))
    m_hat = op.Div(new_m, op.Cast(op.Sub(one64, op.Pow(b1, t64)), to=F32))
    v_hat = op.Div(new_v, op.Cast(op.Sub(one64, op.Pow(b2, t64)), to=F32))
    step = op.Div(m_hat, op.Add(op.Sqrt(v_hat), op.Constant(value_float=epsilon)))
    return op.Sub(W, op.Mul(lr, step)), new_m, new_v


@body
def adagrad(W: FLOAT, g: FLOAT, acc: FLOAT, lr: FLOAT, epsilon: float):
    """Compute acc' = acc + g², W' = W − lr·g/(sqrt(acc') + epsilon)."""
    new_acc = op.Add(acc, op.Mul(g, g))
    step = op.Div(g, op.Add(op.Sqrt(new_acc), op.Constant(value_float=epsilon)))
    return op.Sub(W, op.Mul(lr, step)), new_acc
