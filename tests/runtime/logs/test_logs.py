"""Logs: what they are given, what they write, read back by the libraries themselves."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.logs.places import LOGS, log_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from toy_sessions import GraphCase

    from kfac_onnx.runtime import TrainingSession


def of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    assert len(events.Histograms("table/emb.weight/values")) == 2
    assert events.Histograms("table/emb.weight/values")[0].histogram_value.num == 23 * 4
    assert b"batch-size = 3" in events.Tensors("settings")[0].tensor_proto.string_val[0]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_csv(path: Path) -> dict[str, list[tuple[int, float]]]:
    values: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["name"], []).append((int(row["position"]), float(row["value"])))
    return values


def of_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    client = pytest.importorskip("mlflow.tracking").MlflowClient(tracking_uri=f"sqlite:///{folder}")
    (run,) = client.search_runs([client.get_experiment_by_name("kfac-onnx").experiment_id])
    names = run.data.metrics
    return {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in names}


def test_every_step_that_is_due_is_logged_and_no_other(graph_case: Callable[..., GraphCase]) -> None:
    case = graph_case("torchjoint_in__nplm", preset="half", lr=0.1)
    table = "m.emb.weight"
    calls: list[tuple[int, dict[str, float]]] = []
    batches = [*case.batches, *case.batches, case.batches[0]]
    with case.open(schedule="linear:steps=5") as session:
        before = {}
        losses = []
        for batch in batches[:3]:
            before = session.parameters[table]
            losses.append(session.step(batch)["loss"])
        after = session.parameters[table]
        condition = session.health()[0].condition
    with case.open(schedule="linear:steps=5") as session:
        session.fit(
            batches, log=lambda values, position: calls.append((position, dict(values))), log_every=3,
            held_out=batches[:2],
        )  # fmt: skip
        held_out = session.evaluate(batches[:2])
    (position, values), (end, measured) = calls
    assert (position, end, measured) == (3, 5, {"held_out/loss": held_out})
    assert values["loss"] == pytest.approx(np.mean(losses), rel=1e-15)
    changed = (after != before).any(axis=1)
    difference = after.astype(np.float64) - before.astype(np.float64)
    assert values[f"table/{table}/update_norm"] == pytest.approx(np.linalg.norm(difference), rel=1e-12)
    assert values[f"table/{table}/rows_touched"] == changed.sum() == len(np.unique(batches[2]["ids"]))
    assert values[f"table/{table}/condition"] == condition
    assert values["skipped_steps"] == 0
    assert values["rate/kfac/lr"] == pytest.approx(0.1 * (1 - 2 / 5))
    examples = sum(len(batch["ids"]) for batch in batches[:3])
    assert values["examples_per_second"] == pytest.approx(examples / 3 / values["ms_per_step"] * 1e3)


READ: dict[str, Callable[[Path], dict[str, list[tuple[int, float]]]]] = {
    "tensorboard": of_tensorboard, "csv": of_csv, "mlflow": of_mlflow,
}  # fmt: skip


@pytest.mark.filterwarnings("default")  # what these libraries warn of among themselves
@pytest.mark.parametrize("name", LOGS)
def test_what_is_written_can_be_read_by_its_own_library(
    name: str,
    tmp_path: Path,
    open_toy: Callable[..., TrainingSession],
    toy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "place"
    target = {"mlflow": f"mlflow:sqlite:///{place}", "wandb": "wandb:tests"}.get(name, f"{name}:{place}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if name != "csv":
        pytest.importorskip(name)
    calls: list[tuple[int, dict[str, float]]] = []
    with open_toy(lr=0.1) as session:
        session.settings = "batch-size = 3\n"
        session.fit(
            toy.batches(4),
            log=[target, lambda values, position: calls.append((position, dict(values)))],
            log_every=2,
            histograms=LOGS[name].histograms,
        )
    expected: dict[str, list[tuple[int, float]]] = {}
    for position, values in calls:
        for key, number in values.items():
            expected.setdefault(key, []).append((position, number))
    if name == "wandb":
        assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        return
    written = READ[name](place)
    assert set(written) == set(expected)
    for key, pairs in expected.items():
        assert [step for step, _ in written[key]] == [step for step, _ in pairs]
        # TensorBoard keeps float32.
        np.testing.assert_allclose([v for _, v in written[key]], [v for _, v in pairs], rtol=1e-6)


def test_a_csv_file_goes_on(
    tmp_path: Path, open_toy: Callable[..., TrainingSession], toy: ModuleType
) -> None:
    for _ in range(2):
        with open_toy(lr=0.1) as session:
            session.fit(toy.batches(2), log=f"csv:{tmp_path / 'log.csv'}", log_every=2)
    assert (tmp_path / "log.csv").read_text().count("position,name,value") == 1
    assert len(of_csv(tmp_path / "log.csv")["loss"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log": "tensorbord:x"}, "unknown log 'tensorbord'; did you mean 'tensorboard'?"),
        ({"log": "csv"}, "the log 'csv' needs a place"),
        ({"log": ["csv:x"], "histograms": True}, "histograms are wanted, and no log takes them"),
        ({"log": "csv:none/x.csv"}, "the log 'none/x.csv' cannot be written: No such file or directory"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"best": "b.ckpt"}, "best is given, but no held-out data to evaluate on"),
        ({"held_out": [], "patience": 2}, "patience counts evaluations, and there is one at the end only"),
        ({"held_out": [], "monitor": "auc"}, "the best is wanted by 'auc', which is not measured"),
        ({"held_out": [], "best": "folder"}, "the best checkpoint is a file, and 'folder' is a folder"),
    ],
)
def test_what_is_refused_before_the_first_step(
    open_toy: Callable[..., TrainingSession], toy: ModuleType, options: dict[str, Any], message: str
) -> None:
    with open_toy() as session:
        with pytest.raises(UserError) as caught:
            session.fit(toy.batches(1), **options)
        assert (caught.value.message, session.position) == (message, 0)


def test_libraries_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("kfac_onnx.runtime.logs.places.importlib.import_module", missing)
    for name in set(LOGS) - {"csv"}:
        kind, argument = log_of(f"{name}:{tmp_path}")
        with pytest.raises(UserError) as caught:
            kind.open(argument)
        assert str(caught.value) == (
            f"'--log {name}' needs the package {name}, which is not installed\n  help: pip install {name}"
        )


def test_the_best_is_kept_and_a_run_that_gets_no_better_stops(
    tmp_path: Path, open_toy: Callable[..., TrainingSession], toy: ModuleType
) -> None:
    """A rate of 0 after some steps, by a schedule, ends what can become better."""
    batches = toy.batches(40)
    held_out = toy.batches(3, seed=9)
    best = tmp_path / "best.ckpt"
    with open_toy(lr=0.05, rest_lr=0.05) as session:
        losses: list[float] = []
        rows: list[Any] = []
        result = session.fit(
            batches * 20, held_out=held_out, eval_every=1, patience=3, best=best, metrics=rows.append,
            measures=["rmse"], scores="p", labels="y", monitor="rmse",
        )  # fmt: skip
        losses = [row["held_out_metrics"]["rmse"] for row in rows]
    assert result.stopped_early
    least = int(np.argmin(losses))
    assert len(losses) == least + 4
    assert result.best == {"rmse": losses[least], "position": least + 1, "waited": 3}
    np.testing.assert_allclose(losses, np.sqrt([row["held_out"] for row in rows]), rtol=1e-5)  # float32 sums
    with type(session).resume(best, threads=1) as again:
        assert again.position == least + 1
        assert again.measure(held_out, ["rmse"], scores="p", labels="y")["rmse"] == losses[least]
        assert again.best == {"rmse": losses[least], "position": least + 1, "waited": 0}
        before = best.read_bytes()
        rest = again.fit(
            batches[:1], held_out=held_out, best=best, measures=["rmse"], scores="p", labels="y", monitor="rmse",
        )  # fmt: skip
        better = rest.measured[least + 2]["rmse"] < losses[least]
        assert (best.read_bytes() != before) == better
        assert not better
        assert math.isfinite(rest.loss)
        with pytest.raises(UserError) as caught:
            again.measure(held_out, ["rmse"], scores="pp", labels="y")
        assert caught.value.message == "the graph has no value 'pp'; did you mean 'p'?"
