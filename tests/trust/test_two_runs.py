"""Two runs in one place of checkpoints: the second is refused, and a killed one keeps nobody out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.saved.run_lock import lock_of

PROGRAM = Path(__file__).with_name("two_runs.py")


def start(place: Path, steps: int) -> subprocess.Popen[str]:
    """Start a run and wait until it has saved once."""
    run = subprocess.Popen(  # noqa: S603  our own program
        [sys.executable, str(PROGRAM), str(place), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize("name", ["run", "run.ckpt"])
def test_two_processes(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    first = start(place, 3)
    before = {item.name: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()}
    about = json.loads(lock_of(place).read_text())
    assert (about["host"], about["pid"]) == (socket.gethostname(), first.pid)

    second = subprocess.run(  # noqa: S603  our own program
        [sys.executable, str(PROGRAM), str(place), "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    held = (
        f"'{place}' is used by another run: process {first.pid} on '{about['host']}', begun {about['start']}\n"
        "  help: wait for its end, or give another place for checkpoints\n"
    )
    foreign = (
        f"the folder '{place}' holds checkpoints of another run\n"
        "  help: go on from them (resume, `train --resume`), or give another folder\n"
    )
    assert (second.returncode, second.stdout) == (1, held if name == "run.ckpt" else foreign)

    resumed = TrainingSession.resume(place)  # the folder is its own, and still another run has it
    with resumed, pytest.raises(UserError) as error:
        resumed.fit([], checkpoint=place)
    assert f"{error.value}\n" == held
    assert {item.name: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()} == before

    assert first.communicate("go on\n", timeout=120)[0] == ""
    assert first.returncode == 0
    assert not lock_of(place).exists()
    with TrainingSession.resume(place) as session:
        assert session.position == 3


def test_a_killed_run_keeps_nobody_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "run"
    run = start(place, 3)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    about = json.loads(lock_of(place).read_text())
    with TrainingSession.resume(place) as session:
        session.save(place)
        assert json.loads(lock_of(place).read_text())["pid"] == os.getpid()
    assert caplog.messages == [
        f"the lock of '{place}' was left by process {run.pid} on '{about['host']}', begun {about['start']},"
        " which is gone; it is taken over"
    ]
    assert not lock_of(place).exists()
