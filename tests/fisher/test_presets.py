"""The presets' numbers and the ranges of their parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.fisher.damping import Pi, Relative
from kfac_onnx.fisher.presets import PRESETS, find_preset
from kfac_onnx.fisher.roots import Inverse, InverseRoot, step_root
from kfac_onnx.fisher.row_scales import Counts, SquareSum, Window
from kfac_onnx.fisher.sampling import Sample
from kfac_onnx.fisher.settings import Average
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET

HALF, R17 = PRESETS["half"], PRESETS["r1.7"]


def test_half_is_inverse_roots_of_debiased_averages() -> None:
    assert HALF.powers == (("A", -0.5), ("G", -0.5))
    assert HALF.damping == Relative(0.01)
    assert HALF.rows == Counts(average=Average(decay=0.99), share=False)
    assert HALF.output == Average(decay=0.95, start=0.0, debias=True)
    assert (HALF.per_example, HALF.refresh_every, HALF.lr) == (False, 10, 0.01)


def test_r17_is_the_original() -> None:
    average = Average(decay=0.95, start=1.0, debias=False)
    assert R17.powers == (("A", -1.0), ("G", -1.0))
    assert R17.damping == Pi(1e-3, "tracenorm")
    assert (R17.rows, R17.output) == (Counts(average=average, share=True), average)
    assert R17.per_example


def test_the_others_keep_no_input_factor() -> None:
    assert [PRESETS[name].input_decay for name in ("adagrad", "adaptive")] == [None, None]
    assert PRESETS["adagrad"].rows == SquareSum(epsilon=1e-10)
    assert PRESETS["adaptive"].rows == Window(power=0.8)
    assert [PRESETS[name].lr for name in ("adagrad", "adaptive")] == [0.1, 0.01]


def test_presets_are_found_by_name() -> None:
    assert find_preset(DEFAULT_PRESET) is PRESETS[DEFAULT_PRESET]
    with pytest.raises(UserError) as caught:
        find_preset("halve")
    assert str(caught.value) == (
        f"unknown preset 'halve'; did you mean 'half'?\n  help: use one of {', '.join(PRESETS)}"
    )


def test_refresh_steps() -> None:
    assert [t for t in range(1, 41) if HALF.refreshes(t)] == [1, 2, 4, 8, 10, 20, 30, 40]
    every = replace(HALF, refresh_every=3)
    assert [t for t in range(1, 13) if every.refreshes(t)] == [1, 2, 3, 4, 6, 8, 9, 12]


@pytest.mark.parametrize("D", [1, 16, 64, 512])
def test_iterations_bring_the_smallest_eigenvalue_to_one(D: int) -> None:
    """The scalar iteration λ ← λ(3 − λ)²/4 from the smallest possible λ = 1/(1 + D/ρ)."""
    condition = HALF.damping.condition(D)
    method = step_root(-0.5, D, condition)
    assert condition == 1 + D / 0.01
    assert isinstance(method, InverseRoot)
    smallest = 1.0 / condition
    for _ in range(method.iterations):
        smallest = smallest * (3.0 - smallest) ** 2 / 4.0
    # Quadratic convergence: 1e-7 is float32's own rounding.
    assert abs(smallest - 1.0) < 1e-7
    assert method.iterations == math.ceil(math.log(condition) / math.log(2.25)) + 5


def test_tolerances() -> None:
    assert step_root(-0.5, 64, HALF.damping.condition(64)).tolerance == pytest.approx(
        2 * np.finfo(np.float32).eps * 6401, rel=1e-12
    )
    assert R17.damping.condition(64) is None
    assert step_root(-1.0, 64, None) == Inverse(tolerance=1e-6)
    assert step_root(-0.5, 64, None) == InverseRoot(25, 1e-3)  # ceil(ln 1e7 / ln 2.25) + 5


@pytest.mark.parametrize("uses", [2, 3])
def test_independent_uses_share_the_damping(uses: int) -> None:
    assert Relative(0.01).for_uses(uses) == Relative(0.01 / math.sqrt(uses))
    assert Pi(0.1).for_uses(uses) == Pi(0.1, uses=uses)


NEED_A = (
    "preset 'half' must have a power of A exactly where counts scale the rows\n"
    "  help: give the powers of A and G, or another scale of rows and the power of G"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"powers": (("A", -0.5), ("G", -0.25))}, "the power of G must be -1 or -0.5, not -0.25"),
        ({"powers": (("G", -0.5),)}, NEED_A),
        ({"rows": Window()}, NEED_A),
        (
            {"powers": (("A", -0.5), ("B", -0.5))},
            "preset 'half' has the powers A, B\n"
            "  help: give one of G, and one of A where rows are scaled by counts",
        ),
        (
            {"output": Average(decay=0.9, start=1.0)},
            "preset 'half' has a debiased average, which starts at 0",
        ),
        ({"refresh_every": 0}, "refresh-every must be at least 1, not 0"),
        *(
            ({"damping": Relative(value)}, f"damping must be a positive number, not {value}")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
    ],
)
def test_declarations_that_no_step_can_be_made_of(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(HALF, **change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "g-rows must be at least 1, not 0"),
        ({"every": 0}, "g-every must be at least 1, not 0"),
    ],
)
def test_samples_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Sample(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_decays_out_of_range(decay: float) -> None:
    with pytest.raises(UserError) as caught:
        Average(decay=decay)
    assert str(caught.value) == f"the decay of an average must be between 0 and 1, not {decay:g}"


def test_a_decay_of_a_needs_an_input_factor() -> None:
    assert HALF.with_input_decay(0.9).input_decay == 0.9
    with pytest.raises(UserError) as caught:
        PRESETS["adagrad"].with_input_decay(0.9)
    assert str(caught.value) == (
        "decay-a has no meaning for preset 'adagrad', which has no input factor\n"
        "  help: leave it out, or take a preset that scales rows by counts"
    )
