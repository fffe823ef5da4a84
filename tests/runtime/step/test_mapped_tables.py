"""Tables trained in their files: bit-equal to an ordinary session, killed, full, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]  bare PathLike

import kfac_onnx as kx
from kfac_onnx.bench.graphs import training_graph
from kfac_onnx.cli.main import main
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.step.mapped_tables import tables_on_disk

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

V, D, N = 500, 8, 32


def model(ids: str = "ids", rows: int = V, *, preset: str = "half") -> ir.Model:
    """A factorization: a table, a weight, and a target; `ids` are the batch's, or computed from them."""
    body = "" if ids == "ids" else f"{ids} = Add(ids, one)\n "
    graph = training_graph(
        "int64[N] ids, float[N] y" if ids == "ids" else "int64[N] ids, int64[1] one, float[N] y",
        {"table": (rows, D), "w": (D,)},
        f"""{body}x = Gather(table, {ids})
 wx = Mul(x, w)
 s = ReduceSum<keepdims=0>(wx, last)
 e = Sub(s, y)
 q = Mul(e, e)
 loss = ReduceMean<keepdims=0>(q)""",
    )
    return kx.transform(graph, preset=preset, lr=0.01, rest="adam", rest_lr=1e-3)


def values(rows: int = V) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "table": rng.normal(size=(rows, D)).astype(np.float32),
        "w": rng.normal(size=D).astype(np.float32),
    }


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {"ids": rng.integers(0, V - 1, N), "y": rng.normal(size=N).astype(np.float32)} for _ in range(count)
    ]


def run(session: TrainingSession, count: int, start: int = 0) -> list[float | None]:
    return [session.step(batch)["loss"] for batch in batches(count)[start:]]


def equal_states(one: TrainingSession, other: TrainingSession) -> None:
    mine, theirs = one.states, other.states
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("preset", ["half", "adagrad", "plain-sgd"])
def test_steps_are_bit_equal_and_the_file_is_the_buffer(tmp_path: Path, preset: str) -> None:
    step = model(preset=preset)
    with (
        TrainingSession(step, parameters=values(), threads=1) as usual,
        TrainingSession(step, parameters=values(), threads=1, tables_in=tmp_path) as mapped,
    ):
        assert run(mapped, 8) == run(usual, 8)
        equal_states(mapped, usual)
        assert mapped.describe()["tables_on_disk"] == {"table": str(tmp_path / "table.safetensors")}
        (table,) = tables_on_disk(tmp_path)
        assert (table.parameter, table.shape, table.nbytes, table.state) == (
            "table",
            (V, D),
            V * D * 4,
            "open",
        )
        assert table.on_disk >= table.nbytes
        trained = usual.parameters["table"]
    stored = load_file(tmp_path / "table.safetensors")["table"]
    assert stored.tobytes() == trained.tobytes()
    assert np.abs(stored - values()["table"]).max() > 1e-4
    assert [table.state for table in tables_on_disk(tmp_path)] == ["closed"]


def test_a_table_that_is_there_is_trained_where_it_lies(tmp_path: Path) -> None:
    given = values()
    save_file({"table": given["table"]}, tmp_path / "table.safetensors")
    with (
        TrainingSession(model(), parameters={"w": given["w"]}, threads=1, tables_in=tmp_path) as mapped,
        TrainingSession(model(), parameters=given, threads=1) as usual,
    ):
        mapped.fit(batches(6))  # with hints from the prefetching thread
        usual.fit(batches(6))
        equal_states(mapped, usual)


def test_a_checkpoint_is_a_copy_and_is_resumed_in_files_or_in_memory(tmp_path: Path) -> None:
    with TrainingSession(model(), parameters=values(), threads=1, tables_in=tmp_path / "tables") as session:
        run(session, 4)
        saved = session.save(tmp_path / "run.ckpt")
        run(session, 8, 4)
        with pytest.raises(UserError) as caught:
            session.save(tmp_path / "other.ckpt", background=True)
        assert caught.value.message == (
            "save(background=True) copies all states into memory, and tables are trained in their files"
        )
        for folder in (None, tmp_path / "again"):
            with TrainingSession.resume(saved, threads=1, tables_in=folder) as other:
                assert other.position == 4
                run(other, 8, 4)
                equal_states(other, session)


KILLED = """
import os, signal, sys
from tests.runtime.step.test_mapped_tables import *
session = TrainingSession(model(), parameters=values(), threads=1, tables_in=sys.argv[1] + "/tables")
run(session, 3)
session.save(sys.argv[1] + "/run.ckpt")
commit = session._stepper._commit
def killed(batch):
    session._open.holders["table"].live.array[:7] += 1  # some rows of a step are written
    os.kill(os.getpid(), signal.SIGKILL)
session._stepper._commit = killed
run(session, 4, 3)
"""


def test_a_killed_run_is_refused_and_resumed_from_its_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603  this Python
        [sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "tables"
    mark = json.loads((folder / "tables.json").read_text())
    for given in (values(), {"w": values()["w"]}):
        with pytest.raises(UserError) as caught:
            TrainingSession(model(), parameters=given, tables_in=folder)
        assert caught.value.message == (
            f"the tables in '{folder}' are half trained: process {mark['pid']} on {mark['host']} ended without "
            "closing them, with rows of different steps"
        )
    with (
        TrainingSession.resume(tmp_path / "run.ckpt", threads=1, tables_in=folder) as resumed,
        TrainingSession(model(), parameters=values(), threads=1) as usual,
    ):
        run(resumed, 6, 3)
        run(usual, 6)
        equal_states(resumed, usual)


def test_a_full_disk_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError) as caught:
        TrainingSession(model(), parameters=values(), tables_in=tmp_path)
    assert caught.value.message == (
        f"'{tmp_path / 'table.safetensors'}' cannot be written: No space left on device"
    )
    assert not (tmp_path / "table.safetensors").exists()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    def refusal(parameters: dict[str, np.ndarray]) -> str:
        with pytest.raises(UserError) as caught:
            TrainingSession(model(), parameters=parameters, tables_in=tmp_path)
        return caught.value.message

    path = tmp_path / "table.safetensors"
    assert refusal({"w": values()["w"]}) == "parameter 'table' has no value"
    save_file({"table": values()["table"][1:]}, path)
    assert refusal(values()) == (f"'{path}' is there already, and the table 'table' is given a value as well")
    assert refusal({"w": values()["w"]}) == (
        f"'{path}' does not fit the table 'table', [500, 8] float32: it holds [499, 8] float32"
    )
    path.unlink()
    holes = values()
    holes["table"][-1, -1] = np.nan
    assert refusal(holes) == "the value of parameter 'table' holds entries that are not finite"


def test_inspect_shows_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingSession(model(), parameters=values(), threads=1, tables_in=tmp_path):
        assert main(["inspect", str(tmp_path)]) == 0
        assert "a run is changing them, or was killed" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "500 x 8" in said
    assert "closed: they are what their run left at its end" in said


def test_ids_that_the_graph_computes_are_hinted(tmp_path: Path) -> None:
    step = model("rows")
    with TrainingSession(step, parameters=values(), threads=1, tables_in=tmp_path) as session:
        hints = session._open.hints  # pyright: ignore[reportPrivateUsage]
        assert hints is not None
        batch = batches(1)[0] | {"one": np.ones(1, np.int64)}
        np.testing.assert_array_equal(hints.rows(batch)["table"], batch["ids"] + 1)
        session.prepared(batch)
        session.step(batch)


LARGE = """
import resource, sys, numpy as np
from kfac_onnx.runtime.step import mapped_tables
from tests.runtime.step.test_mapped_tables import *
rows, folder = 1 << 25, sys.argv[1]
mapped_tables._MOST = 1 << 25
session = TrainingSession(model(rows=rows), parameters={"w": values()["w"]}, threads=1, tables_in=folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
for _ in range(40):
    session.step({"ids": rng.integers(0, rows, 2048), "y": np.ones(2048, np.float32)})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux tells it")
def test_a_table_of_one_gigabyte_is_not_resident(tmp_path: Path) -> None:
    """40 steps touch 320 MB of its pages."""
    header = json.dumps({"table": {"dtype": "F32", "shape": [1 << 25, D], "data_offsets": [0, 1 << 30]}})
    with (tmp_path / "table.safetensors").open("wb") as file:
        file.write((4088).to_bytes(8, "little") + header.encode().ljust(4088))
        file.truncate(4096 + (1 << 30))
    done = subprocess.run(  # noqa: S603  this Python
        [sys.executable, "-c", LARGE, str(tmp_path)], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 << 10
