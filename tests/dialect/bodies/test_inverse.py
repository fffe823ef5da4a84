"""The inverse and the Newton–Schulz root against `eigh`, over widths and conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfac_onnx.fisher.damping import Relative
from kfac_onnx.fisher.roots import InverseRoot
from kfac_onnx.reference.operators import power

Runner = Callable[..., list[Any]]

EPS = float(np.finfo(np.float32).eps)


def factor(D: int, condition: float, seed: int = 0) -> Any:
    """A float32 matrix with eigenvalues spread evenly in the logarithm, from 1 down to 1/condition."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(D, D)))
    w = np.geomspace(1.0, 1.0 / condition, D) if D > 1 else np.ones(1)
    M = (Q * w) @ Q.T
    return ((M + M.T) / 2).astype(np.float32)


SHAPES = [(1, 1.0), (2, 10.0), (8, 1e4), (33, 1e2), (64, 1e4), (128, 1e3), (512, 1e4)]


@pytest.mark.parametrize(("D", "condition"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-12], ids=["unit", "tiny"])
def test_root_equals_eigh(D: int, condition: float, size: float, run_operator: Runner) -> None:
    M = factor(D, condition) * np.float32(size)
    root, residual = run_operator("FactorInverseRoot", (M, 0.0, np.eye(D)), {"iterations": 20})
    exact = power(M.astype(np.float64), -0.5)
    # Rounding of the matrix alone moves its smallest eigenvalue by eps · condition, relatively.
    limit = 4 * EPS * condition * np.abs(exact).max() + 1e-6 * np.abs(exact).max()
    assert np.abs(root - exact).max() <= limit
    assert np.array_equal(root, root.T)
    assert residual <= 8 * EPS * max(condition, 10.0)


@pytest.mark.parametrize(("D", "condition"), SHAPES)
def test_inverse_equals_eigh(D: int, condition: float, run_operator: Runner) -> None:
    M = factor(D, condition)
    inverse, residual = run_operator("FactorInverse", (M, 0.0, np.eye(D)))
    exact = np.linalg.inv(M.astype(np.float64))
    # One float64 Newton step leaves only the rounding of the result to float32.
    assert np.abs(inverse - exact).max() <= 2e-7 * np.abs(exact).max()
    assert np.array_equal(inverse, inverse.T)
    assert residual <= 1e-6


@pytest.mark.parametrize("D", [4, 64, 512])
def test_a_batch_of_one_is_within_the_presets_iterations_and_tolerance(D: int, run_operator: Runner) -> None:
    row = np.random.default_rng(D).normal(size=(1, D)).astype(np.float32) * np.float32(1e-3)
    G = row.T @ row
    rho = 0.01
    method, damping = InverseRoot.of(D, Relative(rho).condition(D)), rho * np.trace(G) / D
    attributes = {"iterations": method.iterations}
    root, residual = run_operator("FactorInverseRoot", (G, damping, np.eye(D)), attributes)
    exact = power(G.astype(np.float64) + np.float64(np.float32(damping)) * np.eye(D), -0.5)
    assert residual <= method.tolerance
    # Entries of an inverse root carry half of the relative error eps·(1 + D/ρ) of the eigenvalues.
    assert np.abs(root - exact).max() <= method.tolerance * np.abs(exact).max()
    assert not np.abs(root * 1.01 - exact).max() <= min(method.tolerance, 1e-3) * np.abs(exact).max()


def test_too_few_iterations_show_in_the_residual(run_operator: Runner) -> None:
    M = factor(64, 1e4)
    _, residual = run_operator("FactorInverseRoot", (M, 0.0, np.eye(64)), {"iterations": 5})
    assert residual > 0.1


def test_a_factor_that_is_not_finite_gives_no_finite_root(run_operator: Runner) -> None:
    M = factor(4, 10.0)
    M[1, 2] = np.nan
    for name, attributes in (("FactorInverse", {}), ("FactorInverseRoot", {"iterations": 9})):
        result, residual = run_operator(name, (M, 0.1, np.eye(4)), attributes)
        assert not np.isfinite(result).all()
        assert not residual <= 1e30
