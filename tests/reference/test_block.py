"""The float64 block against dense Fisher matrices and against its own definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kfac_onnx.reference import BlockReference, BlockSettings

V, D = 5, 3
RNG = np.random.default_rng(11)
IDS = np.array([0, 2, 2, 4])
GRADS = RNG.normal(size=(4, D))
DAMPING = 0.3

# float64: a few hundred roundings of 1e-16 on numbers of order one.
ATOL = 1e-12


def block(ids: Any = IDS, grads: Any = GRADS, decay: float = 0.0, **switches: Any) -> BlockReference:
    made = BlockReference(V, D, BlockSettings(**switches), exponents=(0.5, -0.5, 2.0))
    made.covariance_update([[ids]], [[[grads]]], decay)
    made.inverse_update(DAMPING)
    return made


def damped(made: BlockReference) -> Any:
    a, g = made.dampings(DAMPING)
    return np.kron(np.diag(made.input_factor + a), made.output_factor + g * np.eye(D))


def test_block_is_the_fisher_matrix_when_all_rows_have_equal_gradients() -> None:
    """Each example's gradient of the table is e_id gᵀ; with g the same for all, A ⊗ G is exact."""
    same = np.tile(GRADS[0], (4, 1))
    fisher = np.zeros((V * D, V * D))
    for index, g in zip(IDS, same, strict=True):
        example = np.zeros((V, D))
        example[index] = g
        fisher += np.outer(example.reshape(-1), example.reshape(-1)) / 4
    np.testing.assert_allclose(block(grads=same).full_fisher_block(), fisher, atol=ATOL)


@pytest.mark.parametrize("exponent", [1.0, -1.0, 0.5, -0.5, 2.0])
def test_powers_are_those_of_the_damped_matrix(exponent: float) -> None:
    made, x = block(), RNG.normal(size=(V, D))
    w, Q = np.linalg.eigh(damped(made))
    expected = ((Q * w**exponent) @ Q.T @ x.reshape(-1)).reshape(V, D)
    found = made.multiply_matpower(x, None, DAMPING, exponent)
    np.testing.assert_allclose(found, expected, atol=ATOL * np.abs(expected).max())
    assert not np.allclose(found * 1.01, expected, atol=ATOL)


def test_rows_equal_the_dense_vector_at_those_rows() -> None:
    made, x = block(), RNG.normal(size=(V, D))
    dense = made.multiply_matpower(x, None, DAMPING, -1.0)
    picked = np.array([4, 0, 4])
    rows = made.multiply_matpower(x[picked], picked, DAMPING, -1.0)
    np.testing.assert_allclose(rows, dense[picked], atol=ATOL)


def test_between_updates_only_the_stored_inverse_is_stale() -> None:
    made, x = block(decay=0.5), np.eye(V)[:, :D]
    before = made.multiply_matpower(x, None, DAMPING, -1.0)
    stored = made.stored[-1.0]
    made.covariance_update([[IDS]], [[[3 * GRADS]]], 0.5)
    a, _ = made.dampings(DAMPING)
    expected = (1 / (made.input_factor + a))[:, None] * (x @ stored)
    found = made.multiply_matpower(x, None, DAMPING, -1.0)
    np.testing.assert_allclose(found, expected, atol=ATOL)
    assert not np.allclose(found, before, atol=1e-3)


def test_averages_start_at_one_and_identity() -> None:
    made = block(decay=0.9)
    counts = np.array([1, 0, 2, 0, 1]) / 4
    np.testing.assert_allclose(made.input_factor, 0.9 + 0.1 * counts, atol=ATOL)
    np.testing.assert_allclose(made.output_factor, 0.9 * np.eye(D) + 0.1 * GRADS.T @ GRADS / 4, atol=ATOL)


def test_debias_forgets_the_start() -> None:
    once = block(decay=0.9, debias=True)
    np.testing.assert_allclose(once.input_factor, np.array([1, 0, 2, 0, 1]) / 4, atol=ATOL)
    np.testing.assert_allclose(once.output_factor, GRADS.T @ GRADS / 4, atol=ATOL)


def test_towers_are_stacked_or_averaged() -> None:
    ids = [[np.array([0, 1, 2])], [np.array([3])]]
    grads = [[[GRADS[:3]], [GRADS[3:]]]]
    for towers, weights in (("concat", [1 / 4] * 3 + [1 / 4, 0]), ("separate", [1 / 6] * 3 + [1 / 2, 0])):
        made = BlockReference(V, D, BlockSettings(towers=towers))  # type: ignore[arg-type]
        made.covariance_update(ids, grads, 0.0)
        np.testing.assert_allclose(made.input_factor, weights, atol=ATOL)
        moment = sum(w * np.outer(g, g) for w, g in zip(weights, GRADS, strict=False))
        np.testing.assert_allclose(made.output_factor, moment, atol=ATOL)


def test_sources_are_summed_and_columns_of_ids_count_for_their_row() -> None:
    made = BlockReference(V, D, BlockSettings())
    ids = np.array([[0, 0], [1, -1], [V, 3], [4, 4]])
    made.covariance_update([[ids]], [[[GRADS]], [[2 * GRADS]]], 0.0)
    np.testing.assert_allclose(made.input_factor, np.array([2, 1, 0, 1, 2]) / 4, atol=ATOL)
    np.testing.assert_allclose(made.output_factor, 5 * GRADS.T @ GRADS / 4, atol=ATOL)


def test_several_uses_share_the_damping_and_scale_the_block() -> None:
    made = BlockReference(V, D, BlockSettings(), num_uses=2)
    made.covariance_update([[IDS[:2], IDS[2:]]], [[[GRADS[:2], GRADS[2:]]]], 0.0)
    made.inverse_update(DAMPING)
    one = block()
    one.inverse_update(DAMPING / 2)
    x = RNG.normal(size=(V, D))
    for exponent in (1.0, -1.0):
        found = made.multiply_matpower(x, None, DAMPING, exponent)
        expected = 2.0**exponent * one.multiply_matpower(x, None, DAMPING / 2, exponent)
        np.testing.assert_allclose(found, expected, atol=ATOL * np.abs(expected).max())
    np.testing.assert_allclose(made.full_fisher_block(), 2 * one.full_fisher_block(), atol=ATOL)


def test_pi_without_a_trace() -> None:
    zero = 0 * GRADS
    with np.errstate(divide="ignore"):
        assert np.isinf(BlockReferenceAfter(zero, "tracenorm").pi())
    assert BlockReferenceAfter(zero, "guarded").pi() == 1
    assert BlockReferenceAfter(zero, "off").dampings(DAMPING) == (np.sqrt(DAMPING), np.sqrt(DAMPING))


def BlockReferenceAfter(grads: Any, pi: Any) -> BlockReference:  # noqa: N802  reads as the class it returns
    made = BlockReference(V, D, BlockSettings(pi=pi))
    made.covariance_update([[IDS]], [[[grads]]], 0.0)
    return made


def test_damping_splits_by_the_ratio_of_mean_eigenvalues() -> None:
    made = block()
    a, g = made.dampings(DAMPING)
    assert a * g == pytest.approx(DAMPING, rel=1e-12)
    assert a / g == pytest.approx((made.input_factor.mean()) / (np.trace(made.output_factor) / D), rel=1e-12)
