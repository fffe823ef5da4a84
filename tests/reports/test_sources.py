"""Reports take files, checkpoints, and models in memory of either kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import kfac_onnx as kx
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

NUMBERS = ", ".join(str(number / 10) for number in range(20))
FORWARD = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (int64[N] ids) => (float[N, 4] z) <float[5, 4] table = {{{NUMBERS}}}> {{ z = Gather(table, ids) }}"""


@pytest.fixture
def step() -> ir.Model:
    return kx.transform(kx.differentiate(onnx.parser.parse_model(FORWARD)))


def test_inspect_takes_what_scan_takes(step: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    kx.save(step, path)
    with kx.TrainingSession(path) as session:
        session.step({"ids": np.array([1, 2]), "labels": np.array([0, 3])})
        session.save(tmp_path / "run.ckpt")
    reports = [kx.inspect(source).to_json() for source in (step, ir.to_proto(step), path, str(path))]
    assert reports[0]["sites"][0]["parameter"] == "table"
    assert reports[1:] == reports[:1] * 3
    assert kx.inspect(tmp_path / "run.ckpt").to_json()["pipeline"] == reports[0]["pipeline"]


def test_diff_takes_files(step: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    kx.save(step, path)
    assert not kx.diff(path, ir.to_proto(step))
    assert not kx.diff(step, str(path))
    assert kx.diff(onnx.parser.parse_model(FORWARD), path).sections["inputs"].added


@pytest.mark.parametrize("report", [kx.inspect, lambda path: kx.diff(path, path), kx.scan], ids=["inspect", "diff", "scan"])  # fmt: skip
def test_a_missing_file_is_said(report: object, tmp_path: Path) -> None:
    assert callable(report)
    with pytest.raises(UserError) as error:
        report(tmp_path / "none.onnx")
    assert error.value.message == f"there is no file '{tmp_path / 'none.onnx'}'"
