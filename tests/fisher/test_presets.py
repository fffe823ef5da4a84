"""The presets' numbers and the ranges of their options."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.fisher.presets import ADAGRAD, ADAPTIVE, HALF, PRESETS, R17, Damping, find_preset


def test_the_default_is_the_one_of_the_spec() -> None:
    assert (HALF.exponent, HALF.damping.kind, HALF.damping.value) == (-0.5, "relative", 0.01)
    assert (HALF.input_decay, HALF.output_decay, HALF.debias) == (0.99, 0.95, True)
    assert (HALF.normalize_counts, HALF.scale_gradients, HALF.refresh_every) == (False, False, 10)
    assert HALF.uses_root


def test_r17_is_the_original() -> None:
    assert (R17.exponent, R17.damping.kind, R17.damping.value) == (-1.0, "pi", 1e-3)
    assert (R17.input_decay, R17.output_decay, R17.debias) == (0.95, 0.95, False)
    assert (R17.normalize_counts, R17.scale_gradients) == (True, True)
    assert (R17.start_input, R17.start_output) == (1.0, "identity")
    assert not R17.uses_root


def test_the_others_keep_no_input_factor() -> None:
    assert [p.input_decay for p in (ADAGRAD, ADAPTIVE)] == [None, None]
    assert (ADAGRAD.row_scale, ADAGRAD.epsilon) == ("adagrad", 1e-10)
    assert (ADAPTIVE.row_scale, ADAPTIVE.window_power) == ("window", 0.8)


def test_presets_are_found_by_name() -> None:
    assert list(PRESETS) == ["r1.7", "half", "adagrad", "adaptive"]
    assert find_preset("half") is HALF
    with pytest.raises(UserError) as caught:
        find_preset("halve")
    assert str(caught.value) == (
        "unknown preset 'halve'; did you mean 'half'?\n  help: use one of r1.7, half, adagrad, adaptive"
    )


def test_refresh_steps() -> None:
    assert [t for t in range(1, 41) if HALF.refreshes(t)] == [1, 2, 4, 8, 10, 20, 30, 40]
    every = replace(HALF, refresh_every=3)
    assert [t for t in range(1, 13) if every.refreshes(t)] == [1, 2, 3, 4, 6, 8, 9, 12]


@pytest.mark.parametrize("D", [1, 16, 64, 512])
def test_iterations_bring_the_smallest_eigenvalue_to_one(D: int) -> None:
    """The scalar iteration λ ← λ(3 − λ)²/4 from the smallest possible λ = 1/(1 + D/ρ)."""
    smallest = 1.0 / (1.0 + D / HALF.damping.value)
    for _ in range(HALF.iterations(D)):
        smallest = smallest * (3.0 - smallest) ** 2 / 4.0
    # Quadratic convergence: 1e-7 is float32's own rounding.
    assert abs(smallest - 1.0) < 1e-7
    assert HALF.iterations(D) == math.ceil(math.log(1 + D / 0.01) / math.log(2.25)) + 5


def test_tolerances() -> None:
    assert HALF.tolerance(64) == pytest.approx(2 * np.finfo(np.float32).eps * 6401, rel=1e-12)
    assert R17.tolerance(64) == 1e-6
    assert replace(R17, exponent=-0.5).tolerance(64) == 1e-3
    assert replace(R17, exponent=-0.5).iterations(64) == 25  # ceil(ln 1e7 / ln 2.25) + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exponent": -0.25}, "the exponent must be -1 or -0.5, not -0.25"),
        ({"input_decay": 1.5}, "the input decay must be between 0 and 1, not 1.5"),
        ({"output_decay": -0.1}, "the output decay must be between 0 and 1, not -0.1"),
        ({"input_decay": None}, "preset 'half' scales rows by the input factor, which needs a decay"),
        ({"refresh_every": 0}, "refresh-every must be at least 1, not 0"),
        ({"g_rows": 0}, "g-rows must be at least 1, not 0"),
        ({"g_every": 0}, "g-every must be at least 1, not 0"),
    ],
)
def test_options_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(HALF, **change)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_training_needs_a_damping(value: float) -> None:
    with pytest.raises(UserError) as caught:
        Damping(kind="relative", value=value)
    assert str(caught.value) == f"damping must be a positive number, not {value:g}"
