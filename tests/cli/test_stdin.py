"""A model on standard input is read once, however often a command looks at it."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

import kfac_onnx as kx

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Outcome

NUMBERS = ", ".join(str(number / 10) for number in range(20))
FORWARD = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (int64[N] ids) => (float[N, 4] z) <float[5, 4] table = {{{NUMBERS}}}> {{ z = Gather(table, ids) }}"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    kx.save(kx.differentiate(onnx.parser.parse_model(FORWARD)), tmp_path / "train.onnx")
    np.savez(tmp_path / "data.npz", ids=np.array([1, 2, 0, 4]), labels=np.array([0, 3, 1, 2]))
    return tmp_path / "train.onnx"


COMMANDS = {
    "check": ("check", "-", "--json"),
    "scan": ("scan", "-", "--json"),
    "why": ("why", "-", "table", "--json"),
    "verify": ("verify", "-", "--data", "DATA", "--json"),
    "train": ("train", "-", "--data", "DATA", "--batch-size", "2", "--steps", "2", "--json"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("forward", [False, True], ids=["training", "forward"])
def test_from_stdin_as_from_the_file(
    run: Callable[..., Outcome],
    graph: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    forward: bool,
) -> None:
    path = graph.parent / "forward.onnx"
    onnx.save(onnx.parser.parse_model(FORWARD), path)
    source = path if forward else graph
    given = [str(graph.parent / "data.npz") if word == "DATA" else word for word in words]
    expected = run(*(source if word == "-" else word for word in given))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    outcome = run(*given)
    assert outcome.code == expected.code
    if expected.code == 0:
        first, second = expected.data, outcome.data
        for report in (first, second):
            for timed in ("seconds", "ms_per_step") if isinstance(report, dict) else ():
                report.pop(timed, None)
            if isinstance(report, dict) and "settings" in report:
                report["settings"].pop("model")  # the name of a file, or that of standard input
        assert second == first
    else:
        assert outcome.err.replace("'-'", "'MODEL'").replace("--> -", "--> MODEL") == expected.err.replace(
            f"'{source}'", "'MODEL'"
        ).replace(f"--> DIR/{source.name}", "--> MODEL").replace(f"'DIR/{source.name}'", "'MODEL'")
