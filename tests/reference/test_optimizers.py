"""The float64 optimizers against sums written out, and against the operators' twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kfac_onnx.reference import TWINS, AdagradReference, AdamReference, MomentumReference, SgdReference

STEPS = [np.random.default_rng(seed).normal(size=(4, 3)) for seed in range(8)]
ATOL = 1e-13  # float64, tens of roundings of 1e-16


def path(optimizer: SgdReference) -> Any:
    w = np.ones((4, 3))
    for g in STEPS:
        w = optimizer.step(w, g)
    return w


def test_sgd_sums_gradients() -> None:
    np.testing.assert_allclose(path(SgdReference(0.1)), 1 - 0.1 * sum(STEPS), atol=ATOL)


def test_momentum_weighs_a_gradient_by_how_long_it_acts() -> None:
    weights = [sum(0.9**k for k in range(8 - i)) for i in range(8)]
    expected = 1 - 0.1 * sum(w * g for w, g in zip(weights, STEPS, strict=True))
    np.testing.assert_allclose(path(MomentumReference(0.1)), expected, atol=ATOL)


def test_adagrad_divides_by_the_root_of_all_squares() -> None:
    squares = np.cumsum(np.square(STEPS), axis=0)
    expected = 1 - 0.1 * (np.array(STEPS) / np.sqrt(squares)).sum(axis=0)
    # epsilon 1e-10 beside roots of order 0.1 to 1
    np.testing.assert_allclose(path(AdagradReference(0.1)), expected, atol=1e-8)


def test_first_step_of_adam_is_lr_in_every_entry() -> None:
    stepped = AdamReference(0.1).step(np.ones((4, 3)), STEPS[0])
    # epsilon 1e-8 beside gradients of order 0.01 to 1
    np.testing.assert_allclose(1 - stepped, 0.1 * np.sign(STEPS[0]), atol=1e-6)


def test_adam_follows_its_operator() -> None:
    w = m = v = np.zeros((4, 3))
    w = w + 1.0
    attributes = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    for t, g in enumerate(STEPS, start=1):
        w, m, v = TWINS["Adam"](w, g, m, v, np.array(t), 0.1, **attributes)
    np.testing.assert_allclose(path(AdamReference(0.1)), w, atol=ATOL)


@pytest.mark.parametrize("kind", [SgdReference, MomentumReference, AdamReference, AdagradReference])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: type[SgdReference]) -> None:
    optimizer, clean = kind(0.1), kind(0.1)
    w = optimizer.step(np.ones((4, 3)), STEPS[0])
    clean.step(np.ones((4, 3)), STEPS[0])
    np.testing.assert_array_equal(optimizer.step(w, STEPS[1] * np.nan), w)
    np.testing.assert_array_equal(optimizer.step(w, STEPS[2], lr=0.5), clean.step(w, STEPS[2], lr=0.5))
