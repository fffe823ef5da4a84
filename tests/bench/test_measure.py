"""Which arms are timed together, percentiles, and a whole small run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.bench import Results, Settings, run
from kfac_onnx.bench.arms import choose
from kfac_onnx.bench.growth import measure_growth
from kfac_onnx.bench.measure import groups_that_fit, timing
from kfac_onnx.bench.memory import measure_memory, peak_bytes
from kfac_onnx.bench.results import Memory, read_results
from kfac_onnx.bench.workloads import cases
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kfac_onnx.bench.workloads import Case


def test_a_group_fits_and_has_the_reference() -> None:
    arms = choose(["half", "adagrad", "adaptive", "plain-adam"], torch=False)
    groups, left_out = groups_that_fit(arms, 5_120_000_000, 20e9)
    assert [[arm.name for arm in group] for group in groups] == [
        ["plain-sgd", "half", "adagrad"],
        ["plain-sgd", "adaptive"],
    ]
    assert left_out == {"plain-adam": "needs about 77 GB, 18 GB are free"}
    together, nothing = groups_that_fit(arms, 1_000, 20e9)
    assert [[arm.name for arm in group] for group in together] == [
        ["plain-sgd", "half", "adagrad", "adaptive"],
        ["plain-sgd", "plain-adam"],  # what touches every row is apart
    ]
    assert nothing == {}


def test_percentiles() -> None:
    assert timing(list(range(101))) == (50.0, 10.0, 90.0)


def test_a_small_run(tmp_path: Path) -> None:
    settings = Settings(
        workloads=("mf",), vocab_sizes=(500,), widths=(8,), lookups=(32,), steps=3, threads=1, arms=("half",),
        profile=True,
    )  # fmt: skip
    results = run(settings, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []  # initial values are gone
    (case,) = results.cases
    assert [timing.arm for timing in case.timings] == ["plain-sgd", "half"]
    sgd, half = case.timings
    assert (sgd.ratio_sgd, sgd.ratio_torch, sgd.steps, sgd.state_bytes) == (1.0, None, 3, 0)
    assert half.ms is not None
    assert sgd.ms is not None
    assert half.ratio_sgd == pytest.approx(half.ms / sgd.ms)
    assert half.state_bytes is not None
    assert half.state_bytes >= 2 * 4 * (500 + 8 * 8)
    assert case.roofline is not None
    assert case.roofline.floor_ms == pytest.approx(sum(case.roofline.parts.values()))
    assert case.roofline.added_ms == pytest.approx(half.ms - sgd.ms)
    assert [item.arm for item in case.profiles] == ["plain-sgd", "half"]
    operators = {item.operator for item in case.profiles[1].operators}
    assert {"graph", "OutputFactorUpdate", "PreconditionRows", "AddRows"} <= operators
    for item in case.profiles:
        assert item.step_ms == pytest.approx(item.host_ms + sum(phase.ms for phase in item.phases))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results.to_json()))
    assert read_results(path) == results


def test_growth_is_measured_between_the_extremes(tmp_path: Path) -> None:
    settings = Settings(
        workloads=("mf",), vocab_sizes=(300, 700, 500), widths=(8,), lookups=(32,), steps=4, threads=1,
        arms=("half",),
    )  # fmt: skip
    results = run(settings, scratch=tmp_path)
    (growth,) = results.growth
    assert (growth.name, growth.small, growth.large, growth.steps) == ("mf D=8 N=32", 300, 700, 4)
    assert 0 < growth.added_small_ms < 100
    assert 0 < growth.added_large_ms < 100
    assert list(tmp_path.iterdir()) == []


def test_growth_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_onnx.bench.growth.available_bytes", lambda place: 1.6e9)
    small, large = (cases("mf", vocab_sizes=(V,), widths=(64,), lookups=(32,))[0] for V in (1_000, 100_000))
    assert measure_growth(small, large, tmp_path, steps=1, threads=1, seconds=1.0) is None


def test_memory_of_an_arm(small: Callable[[str], tuple[Case, Path]]) -> None:
    case, parameters = small("mf")
    found = measure_memory(case, "half", parameters, threads=1, movielens=None)
    assert isinstance(found, Memory), found
    assert 10e6 < found.start <= found.opened <= found.stepped <= found.saved <= found.resumed < 2e9
    missing = measure_memory(
        case, "half", parameters.with_name("none.safetensors"), threads=1, movielens=None
    )
    assert isinstance(missing, str)
    assert "there is no file" in missing


def test_the_peak_is_of_this_process() -> None:
    before = peak_bytes()
    block = np.ones(30_000_000)  # 240 MB, more than what the tests before left free
    assert block[-1] == 1
    after = peak_bytes()
    assert before <= after
    assert after >= 240e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(steps=0), "steps must be at least 1, not 0"),
        (Settings(threads=0), "threads must be at least 1, got 0"),
        (Settings(vocab_sizes=(0,)), "a vocabulary must be between 1 and 1,000,000,000, not 0"),
        (Settings(widths=(-1,)), "a width must be between 1 and 1,000,000,000, not -1"),
    ],
)
def test_settings_out_of_range(settings: Settings, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(settings)
    assert caught.value.message == message


def test_results_survive_json(recorded: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(recorded.to_json(), allow_nan=False))
    assert read_results(path) == recorded


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "settings": 3}'])
def test_other_files_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is not a file of results"):
        read_results(path)
