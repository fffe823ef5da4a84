"""Float64 twins of the `ai.kfac` operators: the same inputs, attributes and outputs, written plainly.

Every twin takes arrays positionally and attributes by keyword and returns a tuple of its outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TWINS", "Array", "power", "sample_rows", "scatter_add"]

Array = npt.NDArray[Any]
"""Float64 where it is a real number, int64 where it counts or indexes."""

FLOOR: Final = 1e-30


def scatter_add(base: Array, ids: Array, rows: Array) -> Array:
    """Return `base` with `rows` added at `ids` along the first axis, repeated ids adding up."""
    result = base.copy()
    for index, row in zip(ids, rows, strict=True):
        result[index] = result[index] + row
    return result


def power(M: Array, exponent: float) -> Array:
    """Return a symmetric matrix to a real power: Q max(w, 0)^exponent Qᵀ."""
    w, Q = np.linalg.eigh(M)
    return (Q * np.maximum(w, 0.0) ** exponent) @ Q.T


def _trace(G: Array) -> float:
    return float(np.trace(G))


def _correction(decay: float, count: int, debias: int) -> float:
    return 1.0 / (1.0 - decay**count) if debias and count > 0 else 1.0


def input_factor_decay(
    scale: Array, total: Array, count: Array, lookups: Array, *, decay: float, debias: int, normalize: int
) -> tuple[Array, ...]:
    """Advance the running scale of A."""
    increment = 0.0
    if lookups > 0:
        scale = decay * scale
        total = decay * total + (1 - decay) * (1.0 if normalize else lookups)
        count = count + 1
        increment = (1 - decay) / (scale * (lookups if normalize else 1.0))
    correction = _correction(decay, max(int(count), 1), debias)
    return (scale, total, count, np.asarray(increment), scale * correction, total * correction)


def input_factor_update(A: Array, ids: Array, increments: Array) -> tuple[Array, ...]:
    """Ã[ids] += increments."""
    return (scatter_add(A, ids, increments),)


def input_factor_average(
    A: Array, ids: Array, weights: Array, lookups: Array, *, decay: float
) -> tuple[Array, ...]:
    """Average over the whole vocabulary."""
    if not lookups > 0:
        return (A,)
    return (decay * A + (1 - decay) * scatter_add(np.zeros_like(A), ids, weights) / lookups,)


def output_factor_update(
    G: Array, count: Array, rows: Array, lookups: Array, scale: Array, *, decay: float
) -> tuple[Array, ...]:
    """G ← decay·G + (1−decay)·scale·gᵀg/lookups."""
    if not lookups > 0:
        return (G, count)
    return (decay * G + (1 - decay) * scale * (rows.T @ rows) / lookups, count + 1)


def factor_debias(G: Array, count: Array, *, decay: float) -> tuple[Array, ...]:
    """Ĝ = G / (1 − decay^count)."""
    return (G * _correction(decay, int(count), 1),)


def sample_rows(total: Any, size: Any, turn: Any) -> tuple[Array, ...]:
    """One row of each of n = min(size, total) strata: floor((j + u_j)·total/n), u_j = frac(α·j + β·turn)."""
    total, n = int(total), min(int(size), int(total))
    chosen: list[int] = []
    for j in range(n):
        u = (3242174889 * j + 2447445413 * int(turn)) % 2**32 / 2**32
        chosen.append(min(int((j + u) * total / n), total - 1))
    return (np.asarray(chosen, np.int64),)


def take_now(wanted: Array, now: Array) -> tuple[Array, ...]:
    """All that is wanted, or none."""
    return (np.where(now, wanted, 0),)


def factor_trace(G: Array) -> tuple[Array, ...]:
    """Return tr G."""
    return (np.asarray(_trace(G)),)


def damping_relative(trace: Array, *, rho: float, size: int) -> tuple[Array, ...]:
    """Return rho times the mean eigenvalue of a factor."""
    return (np.asarray(rho * max(trace / size, FLOOR)),)


def damping_pi(total_a: Array, G: Array, *, damping: float, vocab_size: int, pi: int) -> tuple[Array, ...]:
    """√λ·pi and √λ/pi."""
    trace = np.float64(_trace(G))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt((total_a / vocab_size) / (trace / len(G)))
        if pi == 0 or (pi == 2 and total_a * trace == 0):
            ratio = np.float64(1.0)
        return (np.sqrt(damping) * ratio, np.sqrt(damping) / ratio)


def factor_inverse(G: Array, damping_g: Array, previous: Array) -> tuple[Array, ...]:
    """(G + damping_g·I)⁻¹ and a residual of 0."""
    if _trace(G) == 0:
        return (previous, np.asarray(0.0))
    return (np.linalg.inv(G + damping_g * np.eye(len(G))), np.asarray(0.0))


def factor_inverse_root(G: Array, damping_g: Array, previous: Array, *, iterations: int) -> tuple[Array, ...]:
    """(G + damping_g·I)^(−1/2) and a residual of 0; the iterations do not matter to an exact root."""
    if _trace(G) == 0:
        return (previous, np.asarray(0.0))
    return (power(G + damping_g * np.eye(len(G)), -0.5), np.asarray(0.0))


def precondition_rows(
    rows: Array, a: Array, damping_a: Array, root: Array, scale: Array | float, *, exponent: float
) -> tuple[Array, ...]:
    """Return scale · (a + damping_a)^exponent · (rows · root)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((scale * (a + damping_a) ** exponent)[:, None] * (rows @ root),)


def precondition_dense(
    grad: Array, A: Array, gain: Array, damping_a: Array, root: Array, *, exponent: float
) -> tuple[Array, ...]:
    """(gain·Ã + damping_a)^exponent · (grad · root)."""
    return precondition_rows(grad, gain * A, damping_a, root, 1.0, exponent=exponent)


def merge_rows(ids: Array, rows: Array) -> tuple[Array, ...]:
    """Distinct ids, ascending, and the sums of their rows."""
    unique, inverse = np.unique(ids, return_inverse=True)
    return (unique, scatter_add(np.zeros((len(unique), rows.shape[1])), inverse, rows))


def merge_lookups(slot: Array, ids: Array, rows: Array) -> tuple[Array, ...]:
    """Sum the rows of each id that occurs, in the order of their last lookups."""
    slot = np.array(slot)
    positions = np.arange(len(ids))
    slot[ids] = positions  # of repeated ids, the last assignment stays
    winners = positions[slot[ids] == positions]
    place = np.arange(len(winners))
    rank = np.searchsorted(winners, slot[ids])
    return (slot, ids[winners], place, scatter_add(np.zeros((len(winners), rows.shape[1])), rank, rows))


def row_adagrad_step(
    rows: Array, place: Array, acc: Array, scale: Array, *, epsilon: float
) -> tuple[Array, ...]:
    """Scale each merged row by scale/(√acc' + epsilon)."""
    acc = acc + (rows**2).mean(axis=1)[place]
    return (scale * rows / (np.sqrt(acc) + epsilon)[:, None], acc)


def row_window_step(rows: Array, place: Array, r: Array, fresh: Array, scale: Array) -> tuple[Array, ...]:
    """Scale each merged row by scale/√r', a row whose r' is 0 by 0."""
    r = r + fresh * (rows**2).mean(axis=1)[place]
    root = np.where(r > 0, np.sqrt(r), np.inf)
    return (scale * rows / root[:, None], r)


def row_element_adagrad_step(rows: Array, place: Array, acc: Array, *, epsilon: float) -> tuple[Array, ...]:
    """Scale each entry of merged rows by 1/(√acc' + epsilon)."""
    acc = acc + (rows**2)[place]
    return (rows / (np.sqrt(acc) + epsilon), acc)


def row_adagrad(rows: Array, acc: Array, *, epsilon: float) -> tuple[Array, ...]:
    """Scale each row by 1/(√acc' + epsilon)."""
    acc = acc + (rows**2).mean(axis=1)
    return (rows / (np.sqrt(acc) + epsilon)[:, None], acc)


def row_element_adagrad(rows: Array, acc: Array, *, epsilon: float) -> tuple[Array, ...]:
    """Scale each entry by 1/(√acc' + epsilon)."""
    acc = acc + rows**2
    return (rows / (np.sqrt(acc) + epsilon), acc)


def window_decay(
    scale: Array, count: Array, lookups: Array, *, power: float, least: float
) -> tuple[Array, ...]:
    """Return the window's scalars, b = 1 − max(t^(−power), least)."""
    if not lookups > 0:
        return (scale, count, scale, np.asarray(0.0), 1.0 / scale)
    fresh = max(float(count + 1) ** -power, least)
    decayed = scale * (1.0 - fresh)
    scale = decayed if decayed > 0 else np.asarray(1.0)
    return (scale, count + 1, decayed, np.asarray(fresh), 1.0 / scale)


def row_window(rows: Array, r: Array, fresh: Array) -> tuple[Array, ...]:
    """Scale each row by 1/√r', a row whose r' is 0 by 0."""
    r = r + fresh * (rows**2).mean(axis=1)
    root = np.where(r > 0, np.sqrt(r), np.inf)
    return (rows / root[:, None], r)


def add_rows(W: Array, ids: Array, rows: Array) -> tuple[Array, ...]:
    """W[ids] += rows."""
    return (scatter_add(W, ids, rows),)


def apply_rows(W: Array, ids: Array, update: Array, lr: Array) -> tuple[Array, ...]:
    """W[ids] −= lr·update."""
    return (scatter_add(W, ids, -lr * update),)


def apply_columns(W: Array, ids: Array, update: Array, lr: Array) -> tuple[Array, ...]:
    """W[:, ids] −= lr·updateᵀ."""
    return (scatter_add(W.T, ids, -lr * update).T,)


def apply_flat(W: Array, ids: Array, update: Array, lr: Array) -> tuple[Array, ...]:
    """Apply to a table stored as one vector."""
    D = update.shape[1]
    return (scatter_add(W.reshape(-1, D), ids, -lr * update).reshape(-1),)


def write_rows(table: Array, ids: Array, values: Array) -> tuple[Array, ...]:
    """table[ids] = values."""
    table = table.copy()
    table[ids] = values
    return (table,)


def scatter_rows(ids: Array, rows: Array, *, vocab_size: int) -> tuple[Array, ...]:
    """Dense gradient of a table."""
    return (scatter_add(np.zeros((vocab_size, rows.shape[1])), ids, rows),)


def all_finite(x: Array) -> tuple[Array, ...]:
    """0, or NaN where an entry is not finite, or the sum of their sizes does not fit into float32."""
    return (np.asarray(0.0 if np.abs(x).sum(dtype=np.float64) <= np.finfo(np.float32).max else np.nan),)


def muon_direction(g: Array, M: Array, *, mu: float) -> tuple[Array, ...]:
    """Nesterov momentum of matrices [L, R, C], each divided by its Frobenius norm."""
    new = mu * M + (1 - mu) * g
    direction = mu * new + (1 - mu) * g
    norm = np.sqrt((direction**2).sum(axis=(-2, -1), keepdims=True))
    return (direction / (norm + 1e-7), new)


def orthogonalize_step(X: Array) -> tuple[Array, ...]:
    """a·X + (b·A + c·A·A)·X with A = X·Xᵀ."""
    A = X @ np.swapaxes(X, -1, -2)
    return (3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X,)


def output_row_scale(
    z: Array, M: Array, r: Array, t: Array, *, beta: float, power: float
) -> tuple[Array, ...]:
    """Momentum of z over the root of a widening window of its rows' mean squares; t counts from 1."""
    fresh = float(int(t)) ** -power
    window = (1 - fresh) * r + fresh * (z**2).mean(axis=1)
    momentum = beta * M + (1 - beta) * z
    return (momentum / (1 - beta ** int(t)) / (np.sqrt(window) + 1e-12)[:, None], momentum, window)


def layer_momentum(z: Array, M: Array, t: Array, *, beta: float) -> tuple[Array, ...]:
    """Debiased momentum of z; t counts from 1."""
    new = beta * M + (1 - beta) * z
    return (new / (1 - beta ** int(t)), new)


def decay_weights(W: Array, lr: Array, *, decay: float) -> tuple[Array, ...]:
    """W' = W·(1 − lr·decay)."""
    return (W * (1.0 - lr * decay),)


def sgd(W: Array, g: Array, lr: Array) -> tuple[Array, ...]:
    """W − lr·g."""
    return (W - lr * g,)


def momentum(W: Array, g: Array, v: Array, lr: Array, *, mu: float) -> tuple[Array, ...]:
    """Velocity: v' = mu·v + g."""
    v = mu * v + g
    return (W - lr * v, v)


def adam(
    W: Array, g: Array, m: Array, v: Array, t: Array, lr: Array, *, beta1: float, beta2: float, epsilon: float
) -> tuple[Array, ...]:
    """Adam's step number t, counted from 1."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1 ** int(t)), v / (1 - beta2 ** int(t))
    return (W - lr * m_hat / (np.sqrt(v_hat) + epsilon), m, v)


def adagrad(W: Array, g: Array, acc: Array, lr: Array, *, epsilon: float) -> tuple[Array, ...]:
    """Sum of squares: acc' = acc + g²."""
    acc = acc + g**2
    return (W - lr * g / (np.sqrt(acc) + epsilon), acc)


TWINS: Final[Mapping[str, Callable[..., tuple[Array, ...]]]] = {
    "InputFactorDecay": input_factor_decay,
    "InputFactorUpdate": input_factor_update,
    "InputFactorAverage": input_factor_average,
    "OutputFactorUpdate": output_factor_update,
    "FactorDebias": factor_debias,
    "SampleRows": sample_rows,
    "TakeNow": take_now,
    "FactorTrace": factor_trace,
    "DampingRelative": damping_relative,
    "DampingPi": damping_pi,
    "FactorInverse": factor_inverse,
    "FactorInverseRoot": factor_inverse_root,
    "PreconditionRows": precondition_rows,
    "PreconditionDense": precondition_dense,
    "MergeRows": merge_rows,
    "MergeLookups": merge_lookups,
    "RowAdagradStep": row_adagrad_step,
    "RowWindowStep": row_window_step,
    "RowElementAdagradStep": row_element_adagrad_step,
    "RowAdagrad": row_adagrad,
    "WindowDecay": window_decay,
    "RowWindow": row_window,
    "RowElementAdagrad": row_element_adagrad,
    "AddRows": add_rows,
    "ApplyRows": apply_rows,
    "ApplyColumns": apply_columns,
    "ApplyFlat": apply_flat,
    "WriteRows": write_rows,
    "ScatterRows": scatter_rows,
    "AllFinite": all_finite,
    "MuonDirection": muon_direction,
    "OrthogonalizeStep": orthogonalize_step,
    "OutputRowScale": output_row_scale,
    "LayerMomentum": layer_momentum,
    "DecayWeights": decay_weights,
    "Sgd": sgd,
    "Momentum": momentum,
    "Adam": adam,
    "Adagrad": adagrad,
}
"""Every operator's twin by the operator's name."""
