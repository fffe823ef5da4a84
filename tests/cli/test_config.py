"""Settings in a file: read, completed by the command line, printed, and kept in checkpoints."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest

from kfac_onnx.cli.config import _settable
from kfac_onnx.cli.train import command
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

GRAPH = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm.onnx"
NAMES = _settable(command)
VALUES: dict[str, Any] = {
    "model": "m \\ é\x7f.onnx", "schedule": "cosine:warmup=3", "data": "d.npz", "resume": "",
    "provider": ["cuda"], "provider-option": ["device_id=1"], "columns": ["a=b", "c=d"], "vocabulary": ["a=f"],
    "rule": ["emb_*=adaptive{lr=0.02}"], "gradients": ["a=b"], "padding-idx": ["a=1"],
}  # fmt: skip


def value_of(key: str) -> Any:
    """Return a value for each option that there is, so that a new one is tried too."""
    parameter = NAMES[key]
    if key in VALUES:
        return VALUES[key]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return True
    if isinstance(parameter, click.Option) and parameter.multiple:
        return ["x"]
    return {"integer": 3, "integer range": 3, "float": 0.25}.get(parameter.type.name, f"some {key}")


def text_of(values: dict[str, Any]) -> str:
    return "".join(
        f"{key} = {json.dumps(value)}\n".replace("\x7f", "\\u007f") for key, value in values.items()
    )


def test_every_setting_goes_through_a_file_and_back(run: Callable[..., Outcome], tmp_path: Path) -> None:
    values = {key: value_of(key) for key in NAMES}
    path = tmp_path / "run.toml"
    path.write_text(text_of(values), encoding="utf-8")
    first = run("train", "--config", path, "--print-config")
    assert (first.code, first.err) == (0, "")
    assert tomllib.loads(first.out) == values
    path.write_text(first.out, encoding="utf-8")
    assert run("train", "--config", path, "--print-config").out == first.out


def test_the_command_line_comes_first(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "m.onnx"\ndata = "d.npz"\nlr = 1\nseed = 4\nrule = "a=sgd"\n')
    words = ("--lr", 0.5, "--rule", "b=sgd", "--no-shuffle", "--print-config")
    outcome = run("train", "--config", path, "other.onnx", *words)
    settings = tomllib.loads(outcome.out)
    assert (settings["model"], settings["lr"], settings["seed"], settings["rule"]) == (
        "other.onnx", 0.5, 4, ["b=sgd"],
    )  # fmt: skip
    assert (settings["no-shuffle"], settings["cuda-graph"], settings["preset"]) == (
        True,
        False,
        DEFAULT_PRESET,
    )
    assert "# steps =  # How many steps," in outcome.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 1", "unknown setting 'sed' in 'DIR/run.toml'; did you mean 'seed'?"),
        ("seed = 'x'", "'seed' in 'DIR/run.toml' must be a whole number, got a text"),
        ("seed = true", "'seed' in 'DIR/run.toml' must be a whole number, got true or false"),
        ("lr = '1'", "'lr' in 'DIR/run.toml' must be a number, got a text"),
        ("data = 3", "'data' in 'DIR/run.toml' must be a text, got a whole number"),
        ("no-shuffle = 1", "'no-shuffle' in 'DIR/run.toml' must be true or false, got a whole number"),
        ("rule = [1]", "'rule' in 'DIR/run.toml' must be a list of texts"),
        ("data = 2026-01-01", "'data' in 'DIR/run.toml' must be a text, got a date or time"),
        ("[data]\nfile = 1", "'data' in 'DIR/run.toml' must be a text, got a table"),
        ("seed = =", "'DIR/run.toml' is no TOML: Invalid value (at line 1, column 8)"),
    ],
)
def test_files_that_cannot_be_read(
    run: Callable[..., Outcome], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    outcome = run("train", "m.onnx", "--data", "d.npz", "--config", path)
    assert (outcome.code, outcome.err.splitlines()[0]) == (1, f"error: {message}")


def test_a_file_of_all_settings_trains_as_the_command_line_does(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    with np.load(GRAPH.with_suffix(".npz")) as file:
        np.savez(tmp_path / "w.npz", **{n[3:]: file[n] for n in file.files if n.startswith("in:m.")})
    ids = np.random.default_rng(0).integers(0, 100, (64, 4))
    np.savez(tmp_path / "d.npz", ids=ids, labels=ids[:, 0] // 2)
    step = tmp_path / "step.onnx"
    assert run("transform", GRAPH, "-o", step, "--preset", "adagrad").code == 0
    words = [step, "--data", tmp_path / "d.npz", "--batch-size", 16, "--parameters", tmp_path / "w.npz",
             "--checkpoint", tmp_path / "run.ckpt", "--threads", 1, "--metrics", tmp_path / "m.jsonl"]  # fmt: skip
    printed = run("train", *words, "--print-config").out.replace("DIR", str(tmp_path))
    assert not (tmp_path / "run.ckpt").exists()
    (tmp_path / "run.toml").write_text(printed)
    plain = run("train", *words, "--json")
    configured = run("train", "--config", tmp_path / "run.toml", "--json")
    assert (configured.code, configured.err) == (0, "")
    assert configured.data["loss"] == plain.data["loss"]
    assert configured.data["settings"]["batch-size"] == 16
    kept = run("inspect", tmp_path / "run.ckpt", "--json").data["checkpoint"]["settings"]
    assert kept.replace("DIR", str(tmp_path)) == printed.rstrip("\n") + "\n"
    assert "  batch-size = 16\n" in run("inspect", tmp_path / "run.ckpt").out
    resumed = run(
        "train", "--config", tmp_path / "run.toml", "--resume", tmp_path / "run.ckpt", "--steps", 6, "-q"
    )
    assert (resumed.code, resumed.err) == (0, "")
