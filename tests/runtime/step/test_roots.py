"""Inverse roots on the host, and when they take over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.runtime.step.roots import eigen_power

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession


@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25, 0.5, 2.0])
def test_powers_of_a_damped_factor(exponent: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 6))
    factor, damping = (rows.T @ rows / 20).astype(np.float32), 0.1
    root = eigen_power(factor, damping, exponent)
    assert root is not None
    assert root.dtype == np.float32
    np.testing.assert_array_equal(root, root.T)
    damped = factor.astype(np.float64) + damping * np.eye(6)
    if exponent == 2.0:
        expected = damped @ damped
    else:
        power = np.linalg.matrix_power(root.astype(np.float64), round(abs(1 / exponent)))
        expected, root = (np.linalg.inv(damped) if exponent < 0 else damped), power
    # float32 rounding of entries up to about 10, raised to at most the fourth power
    np.testing.assert_allclose(root, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_gives_none() -> None:
    assert eigen_power(np.full((2, 2), np.nan, np.float32), 0.1, -0.5) is None
    assert eigen_power(np.eye(2, dtype=np.float32), float("nan"), -0.5) is None
    assert eigen_power(np.zeros((2, 2), np.float32), 0.0, -0.5) is None


def test_the_host_takes_over_above_the_tolerance(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy(model={"tolerance": -1.0})  # no residual is that good
    twin = toy.Twin.start(toy.parameters())
    for batch in toy.batches(12):
        session.step(batch)
        twin.step(batch)
    assert session.host_roots == 6  # steps 1, 2, 3, 6, 9, 12
    np.testing.assert_allclose(
        session.states["root"], twin.root, rtol=1e-4
    )  # float32 sums in G, damped by 1 %
    np.testing.assert_allclose(session.parameters["emb.weight"], twin.emb, atol=5e-5)


def test_a_skipped_step_keeps_the_root(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    session = open_toy(model={"tolerance": -1.0})
    batches = toy.batches(2)
    session.step(batches[0])
    before = session.states["root"].tobytes()
    assert session.step({**batches[1], "y": batches[1]["y"] * np.float32(np.nan)})["skipped"]
    assert session.states["root"].tobytes() == before
    assert session.host_roots == 1
