"""The preconditioner itself: rows of a gradient times powers of the two damped factors.

    update[n] = scale · (a[n] + damping_a)^exponent · (rows[n] · root)     root = (G + damping_g·I)^exponent

The map is linear in the rows, so repeated rows need no merging. `scale` is 1, or −lr where the result goes
into the table as it is: a factor per row costs less than one per entry. Source:
docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import FLOAT  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import body, op

__all__ = ["precondition_dense", "precondition_rows"]


@body
def precondition_rows(rows: FLOAT, a: FLOAT, damping_a: FLOAT, root: FLOAT, scale: FLOAT, exponent: float):
    """Compute scale · (a + damping_a)^exponent · (rows · root); `a` is A at the row of each lookup."""
    weight = op.Mul(scale, op.Pow(op.Add(a, damping_a), op.Constant(value_float=exponent)))
    return op.Mul(op.Unsqueeze(weight, op.Constant(value_ints=[1])), op.MatMul(rows, root))


@body
def precondition_dense(grad: FLOAT, A: FLOAT, gain: FLOAT, damping_a: FLOAT, root: FLOAT, exponent: float):
    """Compute (gain·Ã + damping_a)^exponent · (grad · root) over the whole vocabulary, for tied tables."""
    weight = op.Pow(op.Add(op.Mul(gain, A), damping_a), op.Constant(value_float=exponent))
    return op.Mul(op.Unsqueeze(weight, op.Constant(value_ints=[1])), op.MatMul(grad, root))
