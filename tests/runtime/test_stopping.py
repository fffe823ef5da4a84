"""SIGINT and SIGTERM during training: a whole step, a checkpoint, and the end; the second one at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.stopping import Interrupted, Terminated, stop_signals

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    Open = Callable[..., TrainingSession]


@pytest.mark.parametrize(
    ("number", "kind", "base", "status"),
    [
        (signal.SIGINT, Interrupted, KeyboardInterrupt, 130),
        (signal.SIGTERM, Terminated, SystemExit, 143),
    ],
)
def test_a_signal_ends_the_run_after_its_step_and_saves(
    toy: ModuleType, open_toy: Open, tmp_path: Path, number: int, kind: Any, base: Any, status: int
) -> None:
    session, place = open_toy(), tmp_path / "run"
    before = {item: signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)}
    rows: list[Any] = []

    def row(made: Any) -> None:
        rows.append(made)
        if made["position"] == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(base) as error:
        session.fit(toy.batches(9), metrics=row, checkpoint=place, held_out=toy.batches(1))
    assert isinstance(error.value, kind)
    assert error.value.status == status
    assert str(error.value) == f"stopped by {signal.Signals(number).name} after batch 3; saved in '{place}'"
    assert [item["position"] for item in rows] == [1, 2, 3]
    assert {item: signal.getsignal(item) for item in before} == before
    with TrainingSession.resume(place, threads=1) as resumed, open_toy() as whole:
        assert resumed.position == 3
        resumed.fit(toy.batches(9)[3:])
        whole.fit(toy.batches(9))
        for name, array in whole.states.items():
            assert array.tobytes() == resumed.states[name].tobytes(), name


def test_without_a_checkpoint_nothing_is_saved(toy: ModuleType, open_toy: Open) -> None:
    with pytest.raises(Interrupted) as error:
        open_toy().fit(toy.batches(9), metrics=lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert str(error.value) == "stopped by SIGINT after batch 1; nothing was saved"


def test_the_metrics_file_is_whole(toy: ModuleType, open_toy: Open, tmp_path: Path) -> None:
    batches = iter(toy.batches(9))

    def feed() -> Any:
        for index, batch in enumerate(batches):
            if index == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with pytest.raises(Interrupted):
        open_toy().fit(feed(), metrics=tmp_path / "log.jsonl")
    text = (tmp_path / "log.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["position"] for line in text.splitlines()] == [1, 2, 3]


def test_a_second_signal_stops_at_once(toy: ModuleType, open_toy: Open, tmp_path: Path) -> None:
    def twice(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as error:
        open_toy().fit(toy.batches(9), metrics=twice, checkpoint=tmp_path / "run.ckpt")
    assert not isinstance(error.value, Interrupted)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_the_users_and_ignored_signals_stay(toy: ModuleType, open_toy: Open) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    other = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        def both(_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

        assert open_toy().fit(toy.batches(3), metrics=both).steps == 3
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, other)
    assert came == [signal.SIGTERM] * 3


def test_in_another_thread_nothing_is_changed(toy: ModuleType, open_toy: Open) -> None:
    seen: list[object] = []

    def train() -> None:
        with stop_signals() as stop:
            seen.append(signal.getsignal(signal.SIGINT))
            seen.append(stop.signal)
        seen.append(open_toy().fit(toy.batches(2)).steps)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, None, 2]


PROGRAM = """
import os, signal, sys
from kfac_onnx.runtime import TrainingSession
def row(made):
    os.kill(os.getpid(), signal.SIGTERM)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGTERM)
with TrainingSession.resume(sys.argv[1]) as session:
    session.fit([BATCH] * 3, metrics=row, checkpoint=sys.argv[1])
print("not reached")
"""


@pytest.mark.parametrize(("words", "code", "position"), [((), 143, 1), (("twice",), -signal.SIGTERM, 0)])
def test_a_program_that_catches_nothing(
    toy: ModuleType, open_toy: Open, tmp_path: Path, words: tuple[str, ...], code: int, position: int
) -> None:
    batch = toy.batches(1)[0]
    literal = ", ".join(f"{n!r}: np.array({a.tolist()!r}, np.{a.dtype})" for n, a in batch.items())
    program = "import numpy as np\n" + PROGRAM.replace("BATCH", f"{{{literal}}}")
    open_toy().save(tmp_path / "run.ckpt")
    done = subprocess.run(  # noqa: S603  our own interpreter
        [sys.executable, "-c", program, str(tmp_path / "run.ckpt"), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    with TrainingSession.resume(tmp_path / "run.ckpt") as session:
        assert session.position == position
