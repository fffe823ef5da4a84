"""Schedules: the formulas at their corners, the text form, and bad settings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.schedules import KINDS, Schedule, parse


def test_constant_with_warm_up() -> None:
    schedule = Schedule("constant", warmup=4)
    assert [schedule.factor(p) for p in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_ends_at_final() -> None:
    schedule = Schedule("linear", warmup=2, steps=10, final=0.2)
    assert [schedule.factor(p) for p in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert schedule.factor(6) == pytest.approx(0.6)
    assert schedule.factor(10) == pytest.approx(0.2)
    assert schedule.factor(1000) == pytest.approx(0.2)


def test_cosine_is_half_way_in_the_middle() -> None:
    schedule = Schedule("cosine", steps=8)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(2) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule.factor(4) == pytest.approx(0.5)
    assert schedule.factor(8) == pytest.approx(0.0, abs=1e-12)


def test_warm_up_stable_decay() -> None:
    schedule = Schedule("wsd", warmup=2, steps=20, final=0.2, decay=8)
    assert [schedule.factor(p) for p in (0, 1, 2, 12)] == [0.5, 1.0, 1.0, 1.0]
    assert schedule.factor(16) == pytest.approx(0.6)
    assert schedule.factor(20) == pytest.approx(0.2)
    assert schedule.factor(99) == pytest.approx(0.2)
    unset = Schedule("wsd", steps=50)
    assert [unset.factor(40), unset.factor(45)] == [1.0, pytest.approx(0.5)]


def test_a_horizon_is_filled_in_once() -> None:
    schedule = Schedule("linear").within(10)
    assert schedule.steps == 10
    assert schedule.within(20).steps == 10
    assert Schedule("constant").within(10) == Schedule("constant")


def test_a_missing_horizon() -> None:
    with pytest.raises(UserError) as error:
        Schedule("cosine", warmup=3).factor(3)
    assert str(error.value) == (
        "the schedule 'cosine:warmup=3' needs the number of steps\n"
        "  help: write 'cosine:steps=N', or give steps= or epochs= to fit"
    )


schedules = st.builds(
    Schedule,
    st.sampled_from([kind for kind in KINDS if kind != "wsd"]),
    st.integers(0, 100),
    st.none() | st.integers(1, 1000),
    st.floats(0, 1),
) | st.builds(
    Schedule,
    st.just("wsd"),
    st.integers(0, 100),
    st.none() | st.integers(1, 1000),
    st.floats(0, 1),
    st.none() | st.integers(1, 1000),
)


@given(schedules)
def test_text_and_back(schedule: Schedule) -> None:
    assert parse(str(schedule)) == schedule


@given(schedules.filter(lambda schedule: schedule.steps is not None), st.integers(0, 2000))
def test_factors_lie_between_zero_and_one(schedule: Schedule, position: int) -> None:
    assert 0.0 <= schedule.factor(position) <= 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cosin",
            "unknown schedule 'cosin'; did you mean 'cosine'?\n  help: schedules are constant, linear, cosine, wsd",
        ),
        ("cosine:warm=3", "unknown option 'warm' of schedule 'cosine'; did you mean 'warmup'?"),
        ("cosine:warmup=x", "option 'warmup' of schedule 'cosine' must be a number, got 'x'"),
        ("cosine:warmup=-1", "a schedule's warmup must be at least 0, got -1"),
        ("cosine:steps=0", "a schedule's steps must be at least 1, got 0"),
        ("cosine:decay=2", "a schedule's decay belongs to 'wsd', not to 'cosine'"),
        ("wsd:decay=0", "a schedule's decay must be at least 1, got 0"),
        ("cosine:final=2", "a schedule's final must lie between 0 and 1, got 2.0"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    assert str(error.value) == message
