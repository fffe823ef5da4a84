"""`train` on data as people have them, with vocabularies, and resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from table_files import FORMATS, WRITERS
from toy import whole_step

from kfac_onnx.api import save
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Outcome

ROWS = 64
RNG = np.random.default_rng(3)
TABLE = {"user": RNG.integers(0, 23, ROWS).tolist(), "y": (RNG.integers(-8, 8, ROWS) / 4).tolist()}


@pytest.fixture
def model(tmp_path: Path, toy: object) -> Path:
    """The toy step with first values of its parameters in it."""
    path = tmp_path / "toy.onnx"
    save(whole_step(), path)
    np.savez(tmp_path / "first.npz", **toy.parameters())  # type: ignore[attr-defined]
    return path


def trained(run: Callable[..., Outcome], model: Path, *words: object) -> Outcome:
    first = model.parent / "first.npz"
    return run("train", model, "--parameters", first, "--threads", 1, "--json", *words)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_to_the_same_loss(
    run: Callable[..., Outcome], model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "data").mkdir()
    path = WRITERS[name](tmp_path / "data", TABLE)
    outcome = trained(run, model, "--data", path, "--columns", "user=ids", "--batch-size", 8, "--no-shuffle",
                      "--held-out", path)  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    session = TrainingSession(model, parameters=model.parent / "first.npz", threads=1)
    ids, y = np.array(TABLE["user"]), np.array(TABLE["y"], np.float32)
    batches = [{"ids": ids[at : at + 8], "y": y[at : at + 8]} for at in range(0, ROWS, 8)]
    assert outcome.data["loss"] == session.fit(batches).loss
    assert outcome.data["held_out"]["8"] == session.evaluate(batches)


def test_a_resumed_run_sees_the_rows_of_the_whole_one(
    run: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    path = WRITERS["a file of JSON lines"](tmp_path, TABLE)
    words = ["--data", path, "--columns", "user=ids", "--batch-size", 8, "--shuffle-window", 20, "--seed", 4]
    whole = trained(run, model, *words, "--steps", 13, "--metrics", tmp_path / "whole.jsonl")
    assert whole.code == 0
    place = tmp_path / "run.ckpt"
    trained(run, model, *words, "--steps", 5, "--checkpoint", place)
    rest = run("train", model, "--data", path, "--columns", "user=ids", "--resume", place, "--steps", 13,
               "--threads", 1, "--json", "--metrics", tmp_path / "rest.jsonl")  # fmt: skip
    assert (rest.code, rest.err) == (0, "")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    again = [json.loads(line)["loss"] for line in (tmp_path / "rest.jsonl").read_text().splitlines()]
    assert losses[5:] == again


def test_a_vocabulary_is_built_and_used(run: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    names = [f"user {number}" for number in TABLE["user"]]
    path = WRITERS["a file of JSON lines"](tmp_path, {**TABLE, "user": names})
    words = ["--data", path, "--columns", "user=ids", "--batch-size", 8, "--no-shuffle"]
    refused = trained(run, model, *words)
    assert (refused.code, refused.err) == (
        1,
        "error: column 'user' of 'DIR/t.jsonl' holds texts, and input 'ids' takes int64\n"
        "  help: ids become rows by a vocabulary: kfac-onnx vocabulary build MODEL --data DATA --input ids\n",
    )
    built = run("vocabulary", "build", model, "--data", path, "--columns", "user=ids", "--input", "ids",
                "--rows", 23, "--min-count", 2)  # fmt: skip
    counts = sorted((-names.count(name), name) for name in set(names))
    keys = [name for count, name in counts if count <= -2]
    assert (built.code, built.out) == (
        0,
        f"DIR/toy.ids.vocabulary: {len(keys)} ids have rows from 0 on, all others share row {len(keys)};"
        f" the table needs {len(keys) + 1} rows\n",
    )
    shown = run("vocabulary", "show", tmp_path / "toy.ids.vocabulary", "--json").data
    assert [entry["id"] for entry in shown["top"]] == keys[:20]
    rows = [keys.index(name) if name in keys else len(keys) for name in names]
    (tmp_path / "numbers").mkdir()
    numbers = WRITERS["a file of JSON lines"](tmp_path / "numbers", {**TABLE, "user": rows})
    plain = trained(run, model, "--data", numbers, *words[2:], "--vocabulary", "ids=none")
    used = trained(run, model, *words)
    assert used.err == "the ids of 'ids' become rows by 'DIR/toy.ids.vocabulary'\n"
    assert used.data["loss"] == plain.data["loss"]


def test_a_vocabulary_that_does_not_fit(run: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    path = WRITERS["a file of JSON lines"](tmp_path, {"user": list(range(100, 130)), "y": [0.0] * 30})
    words = ["--data", path, "--columns", "user=ids"]
    assert run("vocabulary", "build", model, *words, "--input", "ids", "-o", tmp_path / "v").code == 0
    outcome = trained(run, model, *words, "--batch-size", 8, "--vocabulary", f"ids={tmp_path / 'v'}")
    assert (outcome.code, outcome.err) == (
        1,
        # Which row an id is, the graph itself goes on to compute: the check is that of every step.
        "error: id 29 in input 'ids' is not a row of parameter 'emb.weight', which has 23 rows\n"
        "  help: ids from -23 to 22 are allowed; nothing was written\n",
    )
    for option, message in (
        (["--input", "idz"], "error: the model has no input 'idz'; did you mean 'ids'?\n"),
        (["--input", "ids", "--input", "y", "-o", "x"],
         "error: --output is given, but there is more than one --input: each has its own file\n"),
    ):  # fmt: skip
        assert run("vocabulary", "build", model, *words, *option).err == message
    assert trained(run, model, *words, "--vocabulary", "ids").err == (
        "error: --vocabulary wants INPUT=FILE, not 'ids'\n  help: INPUT=none takes the ids as they are\n"
    )
    assert trained(run, model, *words).err == (
        "error: 'DIR/t.jsonl' is a table of rows, and the graph takes batches of any size\n"
        "  help: give a size: --batch-size 256\n"
    )
    assert onnx.load(model).graph.input[0].name == "ids"


def test_logs_metrics_and_the_best(run: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    path = WRITERS["a file of JSON lines"](tmp_path, TABLE)
    words = [
        "--data",
        path,
        "--columns",
        "user=ids",
        "--batch-size",
        8,
        "--held-out",
        path,
        "--eval-every",
        2,
    ]
    outcome = trained(
        run, model, *words, "--metric", "rmse", "--scores", "p", "--labels", "y", "--monitor", "rmse", "--best",
        tmp_path / "best.ckpt", "--log", f"csv:{tmp_path / 'log.csv'}", "--log-every", 4,
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    measured = outcome.data["held_out_metrics"]
    assert list(measured) == ["2", "4", "6", "8"]
    for at, values in measured.items():
        assert values["rmse"] == pytest.approx(outcome.data["held_out"][at] ** 0.5, rel=1e-6)  # float32 sums
    best = min(measured, key=lambda at: measured[at]["rmse"])
    assert outcome.data["best"]["position"] == int(best)
    with TrainingSession.resume(tmp_path / "best.ckpt", threads=1) as session:
        assert session.position == int(best)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert sum(",table/emb.weight/rows_touched," in line for line in lines) == 2
    assert sum(",held_out/rmse," in line for line in lines) == 4
    assert 'metric = ["rmse"]' in run("inspect", tmp_path / "best.ckpt").out
    for option, message in (
        (["--metric", "rmse"], "error: --metric is given, but no --held-out to evaluate on\n"),
        (["--held-out", path, "--patience", 2],
         "error: --patience counts evaluations, and there is one at the end only\n  help: give --eval-every\n"),
        (["--held-out", path, "--metric", "rmse"],
         "error: the graph has no loss over classes, so that it does not say which values its predictions are\n"
         "  help: name scores and labels: --scores VALUE --labels VALUE\n"),
    ):  # fmt: skip
        assert trained(run, model, *words[:6], *option).err == message
