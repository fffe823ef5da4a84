"""One run in a place of checkpoints: who has it, until when, and when a lock is stale."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.saved import run_lock
from kfac_onnx.runtime.saved.run_lock import RunLock, lock_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


def test_where_it_lies(tmp_path: Path) -> None:
    assert lock_of(tmp_path) == tmp_path / ".lock"
    assert lock_of(tmp_path / "run") == tmp_path / "run" / ".lock"
    assert lock_of(tmp_path / "run.ckpt") == tmp_path / ".run.ckpt.lock"


def test_one_at_a_time(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    with pytest.raises(UserError) as error:
        RunLock(tmp_path)
    assert str(error.value) == (
        f"'{tmp_path}' is used by another session of this process\n"
        "  help: close that session, or give another place for checkpoints"
    )
    first.release()
    first.release()
    assert not lock_of(tmp_path).exists()
    second = RunLock(tmp_path)
    assert lock_of(tmp_path).exists()
    del second
    gc.collect()
    assert not lock_of(tmp_path).exists(), "what nothing refers to lets others in"


def test_two_sessions_of_one_process(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    place = tmp_path / "run"
    first = open_toy()
    first.step(toy.batches(1)[0])
    first.save(place, keep=2)
    before = {item.name: item.read_bytes() for item in place.iterdir()}
    with TrainingSession.resume(place) as second:
        second.step(toy.batches(1)[0])
        with pytest.raises(UserError, match=r"is used by another session of this process"):
            second.save(place, keep=1)
        assert {item.name: item.read_bytes() for item in place.iterdir()} == before
        first.close()
        second.save(place, keep=1)
    assert [item.name for item in place.iterdir()] == ["step-0000000002.ckpt"]


def test_a_failed_fit_leaves_no_folder(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    session = open_toy()
    with pytest.raises(UserError, match="no input"):
        session.fit([{}], checkpoint=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    session.fit(toy.batches(1), checkpoint=tmp_path / "a" / "b")
    assert [item.name for item in (tmp_path / "a" / "b").iterdir()] == ["step-0000000001.ckpt"]


def holder(**fields: object) -> str:
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": "2026-01-01T00:00:00+00:00",
        "born": None,
    }
    return json.dumps(about | fields)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks: only what the file says can tell."""
    monkeypatch.setattr(run_lock, "_flock", lambda descriptor: None)


@pytest.mark.usefixtures("without_flock")
def test_a_stale_lock_without_the_systems(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for text in (holder(pid=gone.pid), holder(born=1), "", "[", "\0" * 50):
        lock_of(tmp_path).write_text(text)
        RunLock(tmp_path).release()
        assert not lock_of(tmp_path).exists()
    assert len(caplog.messages) == 2


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(
    "fields", [{"host": "elsewhere", "pid": 7}, {"pid": 1, "host": "elsewhere", "born": 3}]
)
def test_a_lock_of_another_host_without_the_systems(tmp_path: Path, fields: dict[str, object]) -> None:
    lock_of(tmp_path).write_text(holder(**fields))
    with pytest.raises(UserError) as error:
        RunLock(tmp_path)
    assert str(error.value) == (
        f"'{tmp_path}' is used by another run: process {fields['pid']} on 'elsewhere', begun"
        " 2026-01-01T00:00:00+00:00\n"
        f"  help: wait for its end, or delete '{lock_of(tmp_path)}' if it is gone, or give another place for"
        " checkpoints"
    )
    assert lock_of(tmp_path).exists()


def test_a_place_that_cannot_be_written_has_no_lock(tmp_path: Path) -> None:
    RunLock(tmp_path / "none" / "run").release()
    assert list(tmp_path.iterdir()) == []
