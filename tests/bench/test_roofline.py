"""The floor adds up what each table needs, at given rates; measured rates are sane."""

from __future__ import annotations

import numpy as np
import pytest

from kfac_onnx.bench.results import Roofline, Timing
from kfac_onnx.bench.roofline import Machine, achieved, floor_of
from kfac_onnx.bench.workloads import cases


class Known(Machine):
    """A machine whose rates are known: a row of D floats takes D ns, a product 1 ns for 1,000 FLOPs."""

    def gather_ms(self, V: int, N: int, D: int) -> float:
        return 1e-6 * N * D

    def scatter_ms(self, V: int, N: int, D: int) -> float:
        return 2e-6 * N * D

    def gram_ms(self, N: int, D: int) -> float:
        return 1e-9 * 2 * N * D**2

    def product_ms(self, N: int, D: int) -> float:
        return 3e-9 * 2 * N * D**2

    def copy_ms(self, floats: int) -> float:
        return 1e-7 * floats


def test_the_floor_is_the_sum_of_its_parts() -> None:
    case = cases("mf", vocab_sizes=(1_000,), widths=(64,), lookups=(4_096,))[0]
    found = floor_of(case, Known(1))
    flops = 2 * 4_096 * 64**2
    expected = {
        "gather a": 2 * 4_096e-6,
        "count": 2 * 2 * 4_096e-6,
        "gᵀg": 2 * 1e-9 * flops,
        "rows · root": 2 * 3e-9 * flops,
        "row scaling": 2 * 1e-7 * 4_096 * 64,
        "finite check": 1e-7 * 4_096 * 64,  # half of a copy: it only reads
    }
    assert found.parts == pytest.approx(expected)
    assert found.floor_ms == pytest.approx(sum(expected.values()))
    assert found.rates["[64,4096]·[4096,64], GFLOP/s"] == pytest.approx(1_000)
    assert found.rates["copy of 262,144 floats, GB/s"] == pytest.approx(80)


def test_tables_of_all_widths_count() -> None:
    one, more = (cases("dlrm", vocab_sizes=(V,))[0] for V in (10, 1_000))
    assert floor_of(one, Known(1)).parts == pytest.approx(floor_of(more, Known(1)).parts)
    widths = [shape[1] for shape in one.tables.values()]
    assert floor_of(one, Known(1)).parts["gᵀg"] == pytest.approx(
        sum(2e-9 * 2_048 * width**2 for width in widths)
    )


def test_the_achieved_share() -> None:
    floor = Roofline({"gᵀg": 0.6}, {}, 0.6)
    sgd, half = Timing("plain-sgd", ms=1.0, ratio_sgd=1.0), Timing("half", ms=2.2, ratio_sgd=2.0)
    found = achieved(floor, half, sgd)
    # The SGD step of the same group: 2.2 / 2.0 = 1.1 ms.
    assert found.added_ms == pytest.approx(1.1)
    assert found.share == pytest.approx(0.6 / 1.1)
    assert achieved(floor, Timing("half", skipped="too large"), sgd) == floor
    assert achieved(floor, Timing("half", ms=1.0, ratio_sgd=1.0), sgd).share is None


def test_measured_rates_are_positive_and_kept() -> None:
    machine = Machine(1)
    found = [
        machine.gather_ms(500, 64, 1),
        machine.scatter_ms(500, 64, 1),
        machine.scatter_ms(500, 64, 8),
        machine.gram_ms(64, 8),
        machine.product_ms(64, 8),
        machine.copy_ms(512),
    ]
    assert all(np.isfinite(found))
    assert min(found) > 0
    assert machine.gram_ms(64, 8) == found[3]
