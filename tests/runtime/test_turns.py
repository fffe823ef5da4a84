"""One thread at a time is in a session; a checkpoint may be written in a thread of its own."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession, turns
from kfac_onnx.runtime import session as module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    Open = Callable[..., TrainingSession]

SENTENCE = (
    "`{}` was called while another thread is in `{}` of the same training session\n"
    "  help: use a session from one thread; `save(path, background=True)` between two steps writes a checkpoint in"
    " a thread of its own"
)

METHODS: dict[str, Callable[[TrainingSession, Any, Path], object]] = {
    "step": lambda session, batch, path: session.step(batch),
    "forward": lambda session, batch, path: session.forward(batch),
    "evaluate": lambda session, batch, path: session.evaluate([batch]),
    "fit": lambda session, batch, path: session.fit([batch]),
    "states": lambda session, batch, path: session.states,
    "parameters": lambda session, batch, path: session.parameters["emb.weight"],
    "health": lambda session, batch, path: session.health(),
    "assign": lambda session, batch, path: session.assign({}),
    "save": lambda session, batch, path: session.save(path / "other.ckpt"),
    "finish_saving": lambda session, batch, path: session.finish_saving(),
    "export": lambda session, batch, path: session.export(path / "other.onnx"),
    "close": lambda session, batch, path: session.close(),
}


class Busy:
    """Keeps a session in `fit` in a thread of its own, between its first two steps."""

    def __init__(self, session: TrainingSession, batches: list[Any]) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._work = self._pool.submit(session.fit, batches, metrics=self._row)

    def _row(self, row: object) -> None:
        self.there.set()
        assert self.go_on.wait(60)

    def __enter__(self) -> Busy:
        assert self.there.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._work.result()
        self._pool.shutdown()


@pytest.mark.parametrize("name", METHODS)
def test_while_one_thread_fits_another_gets_a_sentence(
    toy: ModuleType, open_toy: Open, tmp_path: Path, name: str
) -> None:
    session, batches = open_toy(), toy.batches(3)
    with Busy(session, batches):
        with pytest.raises(UserError) as caught:
            METHODS[name](session, batches[0], tmp_path)
        assert str(caught.value) == SENTENCE.format(name, "fit")
    assert list(tmp_path.iterdir()) == []
    twin = open_toy()
    twin.fit(batches)
    assert session.position == twin.position == 3
    for key, array in twin.states.items():
        np.testing.assert_array_equal(session.states[key], array)


class Evaluating:
    """Keeps a session in `evaluate` in a thread of its own, between two batches."""

    def __init__(self, session: TrainingSession, batch: Any) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()
        self._batch = batch
        self._pool = ThreadPoolExecutor(1)
        self.loss = self._pool.submit(session.evaluate, self._batches())

    def _batches(self) -> Iterator[Any]:
        yield self._batch
        self.there.set()
        assert self.go_on.wait(60)
        yield self._batch


def test_a_step_waits_for_the_end_of_an_evaluation(toy: ModuleType, open_toy: Open) -> None:
    session, twin, (batch,) = open_toy(), open_toy(), toy.batches(1)
    before = twin.evaluate([batch])
    evaluating = Evaluating(session, batch)
    assert evaluating.there.wait(60)
    threading.Timer(0.1, evaluating.go_on.set).start()
    assert session.step(batch) == twin.step(batch)
    assert evaluating.loss.done()
    assert evaluating.loss.result() == pytest.approx(before, rel=1e-7)


def test_who_waits_too_long_gets_a_sentence(
    toy: ModuleType, open_toy: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    session, (batch,) = open_toy(), toy.batches(1)
    evaluating = Evaluating(session, batch)
    assert evaluating.there.wait(60)
    with pytest.raises(UserError) as caught:
        session.step(batch)
    assert str(caught.value) == SENTENCE.format("step", "evaluate")
    evaluating.go_on.set()
    evaluating.loss.result()
    assert session.step(batch)["step"] == 1


def test_threads_have_their_turns_in_order() -> None:
    """One that comes again and again does not keep the others out."""
    order: list[int] = []
    both = turns.Turns()
    started = threading.Barrier(2)

    def come(number: int) -> None:
        started.wait(60)
        for _ in range(50):
            with both.turn("step"):
                order.append(number)
                time.sleep(1e-4)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert len(order) == 100
    assert changes > 40


def test_a_user_function_within_fit_may_use_the_session(
    toy: ModuleType, open_toy: Open, tmp_path: Path
) -> None:
    session, batches = open_toy(), toy.batches(2)
    session.fit(batches, metrics=lambda row: session.save(tmp_path / f"{row['position']}.ckpt") and None)
    assert TrainingSession.resume(tmp_path / "1.ckpt").position == 1


def test_a_thread_that_failed_gives_the_session_back(toy: ModuleType, open_toy: Open) -> None:
    session, (batch,) = open_toy(), toy.batches(1)

    def fails() -> Iterator[Any]:
        yield batch
        raise KeyError("mine")

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError):
        pool.submit(session.evaluate, fails()).result()
    assert session.step(batch)["step"] == 1


# --- saving in the background ------------------------------------------------------------------------


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this event is set."""
    event, write = threading.Event(), module.write_checkpoint

    def later(*arguments: Any) -> None:
        assert event.wait(60)
        write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", later)
    return event


@pytest.mark.parametrize("place", ["run.ckpt", "folder"])
def test_steps_go_on_while_a_checkpoint_is_written(
    toy: ModuleType, open_toy: Open, tmp_path: Path, held_back: threading.Event, place: str
) -> None:
    session, batches = open_toy(), toy.batches(4)
    for batch in batches[:2]:
        session.step(batch)
    states, parameters = session.states, dict(session.parameters)
    file = session.save(tmp_path / place, background=True)
    for batch in batches[2:]:
        session.step(batch)
    assert not file.exists()
    held_back.set()
    assert session.finish_saving() == file
    resumed = TrainingSession.resume(file, threads=1)
    assert (resumed.position, resumed.committed) == (2, 2)
    for key, array in {**states, **parameters}.items():
        np.testing.assert_array_equal(resumed.states[key], array)
    for batch in batches[2:]:
        resumed.step(batch)
    for key, array in session.states.items():
        np.testing.assert_array_equal(resumed.states[key], array)


def test_the_next_save_and_the_end_wait_for_the_file(
    toy: ModuleType, open_toy: Open, tmp_path: Path, held_back: threading.Event
) -> None:
    batches = toy.batches(3)
    with open_toy() as session:
        for number, batch in enumerate(batches):
            session.step(batch)
            threading.Timer(0.05, held_back.set).start()
            session.save(tmp_path / "run", keep=2, background=number != 1)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["step-0000000002.ckpt", "step-0000000003.ckpt"]


@pytest.mark.parametrize("then", ["step", "save", "finish_saving", "close"])
def test_what_went_wrong_is_raised_by_what_comes_next(
    toy: ModuleType, open_toy: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    session, (batch,) = open_toy(), toy.batches(1)

    def full(*arguments: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(module, "write_checkpoint", full)
    session.save(tmp_path / "run.ckpt", background=True)
    assert session._writing is not None
    session._writing._thread.join()
    with pytest.raises(UserError, match="the disk is full"):
        METHODS[then](session, batch, tmp_path)
    monkeypatch.undo()
    if then != "close":  # said once
        assert session.step(batch)["step"] == 1


def test_a_copy_that_does_not_fit_is_refused(
    open_toy: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(size: int, what: str) -> None:
        raise UserError(f"{what} takes {size} bytes")

    monkeypatch.setattr(module, "require_memory", none)
    session = open_toy()
    size = sum(array.nbytes for array in session.states.values())
    with pytest.raises(UserError) as caught:
        session.save(tmp_path / "run.ckpt", background=True)
    assert (
        caught.value.message == f"a copy of all states, which is written while steps go on takes {size} bytes"
    )
    assert list(tmp_path.iterdir()) == []
    session.save(tmp_path / "run.ckpt")
