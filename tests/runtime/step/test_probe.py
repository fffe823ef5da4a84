"""The probe: in-place scatters work in the installed onnxruntime, and the probe sees when they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.runtime.step import probe
from kfac_onnx.runtime.step.tensors import Buffer, Device
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from types import ModuleType

CPU = Device("cpu", 0)
PROVIDERS = ["CPUExecutionProvider"]


@pytest.mark.parametrize("operator", ["ScatterND", "ScatterElements"])
@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatters_work_in_place_here(operator: str, reduction: str) -> None:
    assert probe.in_place_problem([(operator, reduction)], PROVIDERS, CPU) is None


def test_other_reductions_are_not_trusted() -> None:
    assert probe.in_place_problem([("ScatterND", "max")], PROVIDERS, CPU) == (
        "ScatterND with reduction 'max' was not tried in place"
    )


def test_scatters_are_found_inside_functions(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    found = probe.scatters_of(stage.model for stage in plan.stages if stage.writes)
    assert found == {("ScatterND", "add"), ("ScatterND", "none"), ("ScatterElements", "add")}


def test_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Buffer.read
    monkeypatch.setattr(Buffer, "read", lambda self: read(self) * np.float32(1.01))
    assert probe.in_place_problem([("ScatterND", "add")], PROVIDERS, CPU) == (
        "ScatterND with reduction 'add' gives wrong numbers in place"
    )
