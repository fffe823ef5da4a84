"""An evenly spread sample of a batch's rows, for statistics that need not see all of them.

The rows 0..R−1 are cut into n strata of R/n rows each, and one row is taken from each of them:

    index_j = floor((j + u_j)·R/n),   u_j = frac(α·j + β·turn),   j = 0..n−1,   n = min(size, R)

u is a lattice that fills the unit interval evenly in j and in the turn (α = 0.7549, β = 0.5698 in units of
2^−32, Roberts' two-dimensional generalisation of the golden ratio), so over the turns each row is taken
equally often, n/R of them, whatever period the batch has; R times the mean over the sample is an unbiased
estimate of the sum. With size ≥ R it is all rows, in order. Nothing is random: a turn gives the same rows
on every machine.
"""

from __future__ import annotations

from onnxscript import BOOL, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F64, I64, body, op

__all__ = ["sample_rows", "take_now"]


@body
def sample_rows(total: INT64, size: INT64, turn: INT64):
    """Return min(size, total) indices below total."""
    one = op.Constant(value_int=1)
    word = op.Constant(value_int=4294967296)
    n = op.Min(size, total)
    j = op.Range(op.Constant(value_int=0), n, one)
    along = op.Mul(j, op.Constant(value_int=3242174889))
    mixed = op.Mod(op.Add(along, op.Mul(turn, op.Constant(value_int=2447445413))), word)
    u = op.Div(op.Cast(mixed, to=F64), op.Cast(word, to=F64))
    place = op.Mul(op.Add(op.Cast(j, to=F64), u), op.Cast(total, to=F64))
    index = op.Cast(op.Div(place, op.Cast(n, to=F64)), to=I64)
    return op.Min(index, op.Sub(total, one))


@body
def take_now(wanted: INT64, now: BOOL):
    """As many rows as wanted, or none in a step that takes none in.

    On a device it is always `wanted`: there a number of rows that depends on a value would have to be copied
    to the host. Whoever takes the rows counts them as none then, so that the result does not change.
    """
    return op.Where(now, wanted, op.Constant(value_int=0))
