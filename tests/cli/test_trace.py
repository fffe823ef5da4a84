"""What is shown between the passes that read a graph."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kfac_onnx.canonical.pipelines import FINISH, PLAIN, PREPARE, STANDARD
from kfac_onnx.cli.main import main
from kfac_onnx.pipeline.pipeline import parse_pipeline

GRAPH = str(Path(__file__).parents[1] / "data" / "graphs" / "ortart_dyncore__nplm.onnx")
READING = [str(item) for text in (PLAIN, PREPARE, STANDARD, FINISH) for item in parse_pipeline(text)]


def passes_in(messages: list[str]) -> list[str]:
    """Return the passes that lines such as `    1.2 ms  dce: +0 -3 ~0` name, in order."""
    return [line.split(" ms  ")[1].split(": +")[0] for line in messages if " ms  " in line]


@pytest.mark.parametrize("option", ["-v", "--timing"])
def test_scan_shows_every_pass_that_reads(option: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG if option == "-v" else logging.INFO, "kfac_onnx")
    assert main(["scan", GRAPH, option]) == 0
    assert passes_in(caplog.messages) == READING


def test_without_an_option_scan_shows_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kfac_onnx")
    assert main(["scan", GRAPH]) == 0
    assert passes_in(caplog.messages) == []


def test_transform_shows_all_passes_and_the_graph_after_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kfac_onnx")
    words = ["--timing", "--print-after-change", "--verify-reading"]
    assert main(["transform", GRAPH, "-o", str(tmp_path / "out.onnx"), *words]) == 0
    shown = passes_in(caplog.messages)
    assert shown[: len(READING)] == READING
    assert shown[len(READING)].startswith("find-embeddings")
    changed = [line for line in caplog.messages if line.startswith("after lower-training-operators, pass ")]
    assert len(changed) == 1
    assert "ScatterElements(" in changed[0]
