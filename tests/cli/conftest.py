"""Running commands as the console script does, and small models for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from kfac_onnx.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RELU = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N] x) => (float[N] y) <float[2] unused = {1, 2}> {
  dead = Abs(x)
  y = Relu(x)
}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, stdout, stderr (with the test's folder as DIR)."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Outcome]:
    """Run `kfac-onnx` with these words in this process."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Outcome(code, out.replace(str(tmp_path), "DIR"), err.replace(str(tmp_path), "DIR"))

    return call


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    """A model that is no training graph, with one dead node and one dead initializer."""
    path = tmp_path / "relu.onnx"
    path.write_bytes(onnx.parser.parse_model(RELU).SerializeToString())
    return path
