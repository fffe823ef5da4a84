from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import onnx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Outcome


def test_without_output_the_model_is_printed(run: Callable[..., Outcome], relu: Path) -> None:
    outcome = run("opt", relu, "-p", "dce")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        "metadata kfac.pipeline = dce\nopset   ai.onnx 18\ninput   x float32[N]\n%y = Relu(%x)\n"
        "output  y float32[N]\n"
    )


def test_with_output_a_whole_file_is_written(run: Callable[..., Outcome], relu: Path, tmp_path: Path) -> None:
    outcome = run("opt", relu, "-p", "dce", "-o", tmp_path / "out.onnx")
    assert outcome.code == 0
    assert outcome.out.strip().splitlines()[-1].split()[:4] == ["dce", "0", "2", "0"]
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Relu"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "relu.onnx"]


def test_the_input_is_not_overwritten(run: Callable[..., Outcome], relu: Path) -> None:
    before = relu.read_bytes()
    outcome = run("opt", relu, "-p", "dce", "-o", relu)
    assert outcome.code == 1
    assert outcome.err == (
        "error: 'DIR/relu.onnx' is the input and will not be overwritten\n  help: choose another name\n"
    )
    assert relu.read_bytes() == before


def test_stdin_is_a_model(run: Callable[..., Outcome], relu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(relu.read_bytes())))
    assert "%y = Relu(%x)" in run("opt", "-", "-p", "dce").out


def test_print_after_change_shows_the_model_on_stderr(run: Callable[..., Outcome], relu: Path) -> None:
    outcome = run("opt", relu, "-p", "dce,dce", "--print-after-change", "--json")
    assert outcome.err.count("after dce, pass 1 of 2:\n") == 1
    assert "pass 2 of 2" not in outcome.err  # the second changes nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dcee",
            "error: unknown pass 'dcee'; did you mean 'dce'?\n  help: the passes are: inline-functions, sort-nodes, ",
        ),
        (
            "lower{targte=cpu}",
            "error: unknown option 'targte' of pass 'lower'; did you mean 'target'?\n"
            "  help: the options of 'lower' are: ",
        ),
        ("dce,", "error: the pipeline has an end where the name of a pass should be at character 5\n"),
    ],
)
def test_a_wrong_pipeline_is_one_sentence(
    run: Callable[..., Outcome], relu: Path, text: str, message: str
) -> None:
    outcome = run("opt", relu, "-p", text)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(message)


def test_list_shows_every_option_with_its_range(run: Callable[..., Outcome]) -> None:
    lines = run("opt", "--list").out.splitlines()
    assert "dce: Remove nodes, initializers and functions that no output needs; inputs stay." in lines
    found = {item["pass"]: item for item in run("opt", "--list", "--json").data}
    assert {"find-embeddings", "insert-embedding-kfac", "insert-optimizer", "lower", "dce"} <= set(found)
    target = next(option for option in found["lower"]["options"] if option["name"] == "target")
    assert target["accepts"].startswith("one of cpu, cuda")


def test_opt_wants_a_model_and_a_pipeline(run: Callable[..., Outcome], relu: Path) -> None:
    assert run("opt", relu).err == (
        "error: opt wants MODEL and -p PIPELINE, or --list\n  help: run `kfac-onnx opt --help`\n"
    )
