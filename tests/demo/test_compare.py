"""The demo as a whole, on few steps: what it returns and prints, and that it repeats."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rich.console import Console

from kfac_onnx.demo import DemoResult, run
from kfac_onnx.demo.arms import ARMS, BASELINES, Arm, ArmResult
from kfac_onnx.demo.corpus import load_corpus
from kfac_onnx.demo.curves import Curve
from kfac_onnx.demo.model import EMBEDDING, initial_parameters
from kfac_onnx.errors import UserError

from .test_model import reference

if TYPE_CHECKING:
    from pathlib import Path

ARM_NAMES = ["Adam", "Muon + Adam", "ours on tables", "ours everywhere"]


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_the_demo_compares_four_optimizers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = console()
    picture = tmp_path / "curves.png"
    result = run(quick=True, steps=40, threads=2, plot=picture, console=target)
    assert [entry.arm.name for entry in result.arms] == ARM_NAMES
    assert [entry.curve.steps for entry in result.arms] == [(20, 40)] * 4
    assert result.level == result.arms[0].curve.best
    for entry in result.arms:
        # ln 2001 = 7.60 before training: 20 steps bring every optimizer below 7, 40 well below 6.
        assert entry.curve.losses[0] < 7.0
        assert entry.curve.losses[1] < 6.0
        assert entry.ms_per_step > 0
        assert entry.skipped == 0
    vocabulary, width = 12_762, 64
    adam, muon, tables, everywhere = (entry.state_bytes for entry in result.arms)
    assert adam == muon == pytest.approx(2 * 4 * vocabulary * width, abs=64)  # and a counter
    assert tables == everywhere
    assert tables == pytest.approx(4 * (vocabulary + 2 * width**2), abs=128)  # and scalars
    text = printed(target).replace("\u00a0", " ")
    assert "scan: embedding.weight is a table of 12,762 x 64, read by Gather" in text
    assert "transform: Muon + Adam:" in text
    for column in (
        "optimizer",
        "best",
        "steps",
        "vs Adam",
        "1.00 / 1.00",
        "ms/step",
        "state",
        "83.8 kB",
        "6.53 MB",
    ):
        assert column in text
    assert "⠑" in text  # the curves
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_is_one_object_and_a_seed_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run(quick=True, steps=4, threads=1, json=True) for _ in range(2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    data = json.loads(lines[0])
    assert data["steps"] == 4
    assert [entry["arm"]["name"] for entry in data["arms"]] == ARM_NAMES
    for baseline in BASELINES:
        entry = next(entry for entry in data["arms"] if entry["arm"]["name"] == baseline)
        assert entry["steps_ratio"][baseline] == entry["time_ratio"][baseline] == 1.0
    assert data["arms"][0]["best_loss"] == data["level"]
    assert data["arms"][0]["steps_to_level"] == data["arms"][0]["curve"]["steps"][-1]
    assert [entry.curve for entry in first.arms] == [entry.curve for entry in second.arms]


def test_held_out_loss_is_that_of_the_trained_parameters() -> None:
    from importlib import resources

    from kfac_onnx.api import transform
    from kfac_onnx.runtime import TrainingSession

    corpus = load_corpus()
    held_out = corpus.held_out(size=40, limit=100)  # batches of 40, 40 and 20
    arm = ARMS[-1]
    with resources.as_file(resources.files("kfac_onnx.demo").joinpath("data/lm.onnx")) as path:
        model = transform(
            path, preset=arm.preset, lr=arm.lr, rest=arm.rest, rest_lr=arm.rest_lr, **arm.options
        )
    with TrainingSession(model, parameters=initial_parameters(3), threads=1) as session:
        batches = corpus.batches(64, 3)
        for _ in range(3):
            session.step(next(batches))
        values = dict(session.parameters)
        loss = session.evaluate(held_out)
    expected = sum(
        float(reference(values, batch["ids"], batch["labels"])["loss"]) * len(batch["labels"])
        for batch in held_out
    )
    # A float32 mean of 100 losses near 7.
    np.testing.assert_allclose(loss, expected / 100, rtol=1e-5)
    assert (values[EMBEDDING] != initial_parameters(3)[EMBEDDING]).any()


def result_of(
    losses: dict[str, tuple[float, ...]], milliseconds: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> DemoResult:
    arms = tuple(
        ArmResult(Arm(name, name, 0.1, 0.1), Curve((10, 20, 30), values), time, 1, 0)
        for (name, values), time in zip(losses.items(), milliseconds, strict=True)
    )
    return DemoResult(arms, arms[0].curve.best, 30, 0, 1.0)


def test_steps_are_counted_to_the_best_loss_of_adam() -> None:
    result = result_of({"Adam": (5.0, 4.0, 4.5), "fast": (4.5, 3.5, 3.0), "slow": (6.0, 5.0, 4.1)})
    steps = [result.steps_to_level(entry) for entry in result.arms]
    assert steps == [20.0, 15.0, None]
    data = json.loads(result.to_json())
    assert [entry["steps_to_level"] for entry in data["arms"]] == [20.0, 15.0, None]
    assert [entry["best_loss"] for entry in data["arms"]] == [4.0, 3.0, 4.1]


def test_ratios_of_steps_and_of_time_to_each_baseline() -> None:
    losses = {"Adam": (5.0, 4.0, 4.5), "Muon + Adam": (5.0, 4.5, 3.5), "fast": (4.5, 3.5, 3.0)}
    result = result_of(losses, milliseconds=(2.0, 4.0, 3.0))
    entries = {entry["arm"]["name"]: entry for entry in json.loads(result.to_json())["arms"]}
    assert entries["fast"]["steps_ratio"] == {"Adam": 15 / 20, "Muon + Adam": 20 / 30}
    assert entries["fast"]["time_ratio"] == {"Adam": 15 / 20 * 3 / 2, "Muon + Adam": 20 / 30 * 3 / 4}
    assert entries["Muon + Adam"]["steps_ratio"]["Adam"] == 25 / 20
    assert entries["Adam"]["steps_ratio"]["Muon + Adam"] is None
    assert entries["Adam"]["time_ratio"]["Muon + Adam"] is None


def test_bad_arguments_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(steps=1, console=console())
    assert str(caught.value) == "the demo needs at least 2 steps, not 1"
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError) as caught:
        run(plot=tmp_path / "curves.jpg", console=console())
    assert str(caught.value) == "the plot is a PNG, so its name must end in .png, not 'curves.jpg'"
