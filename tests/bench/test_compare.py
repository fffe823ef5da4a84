"""Ratios that moved are found, and only those; aims are read off recorded numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kfac_onnx.bench.compare import compare
from kfac_onnx.bench.targets import targets

from .conftest import case_result

if TYPE_CHECKING:
    from kfac_onnx.bench import Results


def test_the_same_results_have_no_drift(recorded: Results) -> None:
    assert compare(recorded, recorded, tolerance=0.0) == ([], [])


def test_a_slower_arm_is_worse(recorded: Results) -> None:
    slower = replace(recorded, cases=(case_result(10_000, 2.4), recorded.cases[1]))
    drifts, missing = compare(recorded, slower, tolerance=0.15)
    assert missing == []
    assert [(drift.arm, drift.ratio, drift.worse) for drift in drifts] == [
        ("half", "plain-sgd", True),
        ("half", "torch-sgd", True),
        ("half", "fbgemm-rowwise-adagrad", True),
    ]
    assert drifts[0].change == pytest.approx(2.4 / 1.8 - 1)
    assert str(drifts[0]) == "mf D=64 N=4096, V=10,000: half / plain-sgd was 1.80, is 2.40 (+33%)"


def test_a_faster_arm_is_better(recorded: Results) -> None:
    faster = replace(recorded, cases=(case_result(10_000, 1.2), recorded.cases[1]))
    drifts, _ = compare(recorded, faster, tolerance=0.15)
    assert [drift.worse for drift in drifts] == [False, False, False]


def test_the_tolerance_is_relative(recorded: Results) -> None:
    other = replace(recorded, cases=(case_result(10_000, 1.8 * 1.14), recorded.cases[1]))
    assert compare(recorded, other, tolerance=0.15)[0] == []
    assert len(compare(recorded, other, tolerance=0.13)[0]) == 3


def test_what_is_gone_is_missing(recorded: Results) -> None:
    case = recorded.cases[1]
    left = replace(case, timings=tuple(item for item in case.timings if item.arm != "half"))
    fewer = replace(recorded, cases=(left,))
    assert compare(recorded, fewer, tolerance=0.15)[1] == [
        "mf D=64 N=4096, V=10,000",
        "mf D=64 N=4096, V=1,000,000: half",
    ]


def test_aims_of_recorded_results(recorded: Results) -> None:
    found = {aim.aim.removeprefix("mf D=64 N=4096"): aim for aim in targets(recorded)}
    big = ", V=1,000,000: "
    assert (found[f"{big}half over SGD rows"].value, found[f"{big}half over SGD rows"].met) == (2.2, False)
    sparse = found[f"{big}torch-sparse-adam over half"]
    assert sparse.value == pytest.approx(8 / 2.2)
    assert sparse.met
    assert f"{big}torch-adam over half" not in found  # it was not run
    added = found[": what half adds at V=1,000,000 over that at V=10,000"]
    assert added.value == pytest.approx(1.2 / 0.8)
    share = found[f"{big}floor of the added work over its time"]
    assert share.value == pytest.approx(0.5)
    assert not share.met


def test_the_aim_of_memory(recorded: Results) -> None:
    big = replace(recorded, cases=(case_result(10_000_000, 2.0, peak=6_000),))
    (aim,) = (aim for aim in targets(big) if "memory" in aim.aim)
    # 5.12 GB of tables: 6 GB of 1.15 * 5.12 + 0.3 = 6.188 GB.
    assert aim.value == pytest.approx(6.0 / 6.188)
    assert aim.met
