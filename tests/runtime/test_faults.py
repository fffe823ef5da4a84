"""Faults: onnxruntime raises in a stage, the feeder or a callback raises, Ctrl-C comes within a step.

Each leaves parameters and states as before or as after a step, bit by bit, or the session says that it
cannot know and refuses to go on.
"""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException  # pyright: ignore

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.step import probe
from kfac_onnx.step.plan import Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from tests.runtime.conftest import GraphCase

    Open = Callable[..., TrainingSession]

HALF_WRITTEN = (
    "the parameters and states of this session are half written: onnxruntime failed in a step\n"
    "  help: go on from the last checkpoint: TrainingSession.resume(...), or train --resume"
)

RENORMALIZED = {"renormalize_below": 0.9}
RENORMALIZED_AT = 10
"""Steps of decay 0.99 until the next one brings the scale of the counts below 0.9."""


class Fault:
    """Makes one stage's session raise at a run; `after` lets the run happen first."""

    def __init__(
        self,
        session: TrainingSession,
        slot: Slot,
        *,
        at: int = 1,
        after: bool = False,
        act: Callable[[], None] | None = None,
    ) -> None:
        (self._runner,) = session._open.engine.stages(lambda other: other == slot)
        self._session: Any = self._runner.session
        self._left, self._after, self._act = at, after, act
        self.came = False
        self._runner.session = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: object) -> None:
        self._left -= 1
        due = self._left == 0
        if not due or self._after or self._act is not None:
            self._session.run_with_iobinding(binding)
        if due:
            self.came = True
            self._runner.session = self._session
            if self._act is not None:
                self._act()
            else:
                raise RuntimeException(
                    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : out of memory\nat some.cc:12"
                )


def bits(session: TrainingSession) -> dict[str, bytes]:
    """Return what a step must not touch if it fails; slots are scratch, written anew by each step."""
    return {name: array.tobytes() for name, array in session.states.items() if not name.endswith("/slot")}


def counters(session: TrainingSession) -> tuple[int, int, int]:
    return session.committed, session.skipped, session.position


def failure(stage: str) -> str:
    return f"onnxruntime failed in stage '{stage}' of a step: [ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : out of memory"


BEFORE = [Slot.REFRESH, Slot.PRECONDITION]


def fails_and_goes_on(
    session: TrainingSession,
    plain: TrainingSession,
    batches: list[Any],
    slot: Slot,
    *,
    after: bool,
    made: int = 2,
) -> None:
    """Fail in one stage of the step after `made`, then check that nothing of the step is left."""
    for batch in batches[:made]:
        session.step(batch)
        plain.step(batch)
    before, counted = bits(session), counters(session)
    fault = Fault(session, slot, after=after)
    with pytest.raises(UserError) as error:
        session.step(batches[made])
    assert fault.came
    if slot == Slot.GRADIENTS:
        assert error.value.message.startswith("the batch cannot be run through the graph: [ONNXRuntimeError]")
        assert error.value.help == "nothing was written"
    else:
        assert error.value.message == failure(slot.name.lower().replace("_", "-"))
        assert error.value.help == "nothing of the step was kept, and the session can go on"
    assert bits(session) == before
    assert counters(session) == counted
    for batch in batches[made:]:
        assert session.step(batch) == plain.step(batch)
    assert bits(session) == bits(plain)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("slot", [Slot.GRADIENTS, *BEFORE], ids=lambda slot: slot.name)
def test_a_fault_before_the_commit_is_undone(
    toy: ModuleType, open_toy: Open, slot: Slot, after: bool
) -> None:
    session, plain = open_toy(), open_toy()
    fails_and_goes_on(session, plain, toy.batches(6), slot, after=after)


@pytest.mark.parametrize("slot", [Slot.REFRESH, Slot.PRECONDITION, Slot.COMMIT], ids=lambda slot: slot.name)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_copying_form_undoes_every_fault(
    toy: ModuleType, open_toy: Open, monkeypatch: pytest.MonkeyPatch, slot: Slot, after: bool
) -> None:
    monkeypatch.setattr(probe, "in_place_problem", lambda *_: "ScatterND was seen to copy")
    fails_and_goes_on(open_toy(), open_toy(), toy.batches(6), slot, after=after)


def test_the_copying_form_breaks_where_it_writes_a_state_twice(
    toy: ModuleType, open_toy: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "in_place_problem", lambda *_: "ScatterND was seen to copy")
    session = open_toy(model=RENORMALIZED)
    batches = toy.batches(RENORMALIZED_AT + 2)
    for batch in batches[:RENORMALIZED_AT]:
        session.step(batch)
    Fault(session, Slot.RENORMALIZE)
    with pytest.raises(UserError, match=r"stage 'renormalize'"):
        session.step(batches[-2])
    refuses_everything(session, batches[-1], tmp_path)


@pytest.mark.parametrize("copies", [False, True], ids=["in-place", "copying"])
def test_a_skipped_step_is_undone_as_before(
    toy: ModuleType, open_toy: Open, monkeypatch: pytest.MonkeyPatch, copies: bool
) -> None:
    if copies:
        monkeypatch.setattr(probe, "in_place_problem", lambda *_: "ScatterND was seen to copy")
    session = open_toy()
    good, bad = toy.batches(2)
    session.step(good)
    before = bits(session)
    assert session.step({**bad, "y": bad["y"] * np.float32(np.nan)})["skipped"]
    assert bits(session) == before
    assert not session._stepper.broken


@pytest.mark.parametrize("name", ["torchjoint_in__dlrm_mean", "torchjoint_in__nplm"])
@pytest.mark.parametrize("slot", BEFORE, ids=lambda slot: slot.name)
def test_real_graphs_undo_faults(graph_case: Callable[..., GraphCase], name: str, slot: Slot) -> None:
    case = graph_case(name, rest="adam")
    session, plain = case.open(), case.open()
    # Step 4 is a refresh step; step 3 is none.
    made = 3 if slot == Slot.REFRESH else 2
    fails_and_goes_on(session, plain, case.batches * 3, slot, after=True, made=made)


def refuses_everything(session: TrainingSession, batch: Any, folder: Path) -> None:
    def read(what: str) -> Callable[[], object]:
        return lambda: getattr(session, what)

    tries: list[Callable[[], object]] = [
        lambda: session.step(batch),
        lambda: session.fit([batch]),
        lambda: session.evaluate([batch]),
        lambda: session.save(folder / "half.ckpt"),
        lambda: session.export(folder / "half.onnx"),
        lambda: session.assign({}),
        read("parameters"),
        read("states"),
    ]
    for attempt in tries:
        with pytest.raises(UserError) as error:
            attempt()
        assert str(error.value) == HALF_WRITTEN
    assert list(folder.iterdir()) == []
    session.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("slot", "model"),
    [(Slot.COMMIT, {}), (Slot.RENORMALIZE, RENORMALIZED)],
    ids=["commit", "renormalize"],
)
def test_a_fault_while_writing_breaks_the_session(
    toy: ModuleType, open_toy: Open, tmp_path: Path, slot: Slot, model: dict[str, Any], after: bool
) -> None:
    session = open_toy(model=model)
    made = RENORMALIZED_AT if model else 1
    batches = toy.batches(made + 2)
    for batch in batches[:made]:
        session.step(batch)
    fault = Fault(session, slot, after=after)
    with pytest.raises(UserError) as error:
        session.step(batches[made])
    assert fault.came
    assert str(error.value) == (
        f"{failure(slot.name.lower())}\n"
        "  help: parameters and states are half written: go on from the last checkpoint"
    )
    assert counters(session) == (made, 0, made)
    refuses_everything(session, batches[made + 1], tmp_path)


def test_a_fault_in_the_undo_of_a_skipped_step_breaks_the_session(
    toy: ModuleType, open_toy: Open, tmp_path: Path
) -> None:
    session = open_toy()
    good, bad = toy.batches(2)
    session.step(good)
    Fault(session, Slot.UNDO)
    with pytest.raises(UserError, match=r"stage 'undo'"):
        session.step({**bad, "y": bad["y"] * np.float32(np.nan)})
    refuses_everything(session, good, tmp_path)


def test_a_fault_in_the_undo_of_a_fault_breaks_the_session(
    toy: ModuleType, open_toy: Open, tmp_path: Path
) -> None:
    session = open_toy()
    batch = toy.batches(1)[0]
    Fault(session, Slot.PRECONDITION)
    Fault(session, Slot.UNDO)
    with pytest.raises(UserError, match=r"stage 'undo'"):
        session.step(batch)
    refuses_everything(session, batch, tmp_path)


@pytest.mark.parametrize("slot", [Slot.GRADIENTS, Slot.PRECONDITION, Slot.COMMIT], ids=lambda slot: slot.name)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(
    toy: ModuleType, open_toy: Open, slot: Slot, number: signal.Signals
) -> None:
    class StopError(Exception):
        pass

    def handler(*_: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else StopError

    session, plain = open_toy(), open_toy()
    batches = toy.batches(4)
    before = signal.signal(number, handler)
    try:
        fault = Fault(session, slot, at=2, act=lambda: signal.raise_signal(number))
        session.step(batches[0])
        with pytest.raises((KeyboardInterrupt, StopError)):
            session.step(batches[1])
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert fault.came
    for batch in batches[:2]:
        plain.step(batch)
    assert counters(session) == (2, 0, 2)
    assert bits(session) == bits(plain)
    for batch in batches[2:]:
        assert session.step(batch) == plain.step(batch)


class FeederError(Exception):
    pass


def feeding(batches: list[Any]) -> Iterator[Any]:
    yield from batches
    raise FeederError("the data server went away")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_feeder_that_raises(toy: ModuleType, open_toy: Open, tmp_path: Path) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(5)
    place = tmp_path / "run.ckpt"
    with pytest.raises(FeederError, match="the data server went away"):
        session.fit(
            feeding(batches[:3]),
            steps=5,
            metrics=tmp_path / "log.jsonl",
            checkpoint=place,
            checkpoint_every=2,
        )
    for batch in batches[:2]:
        plain.step(batch)
    with TrainingSession.resume(place) as resumed:
        assert counters(resumed) == (2, 0, 2)
        assert bits(resumed) == bits(plain)
    plain.step(batches[2])
    assert counters(session) == (3, 0, 3)
    assert bits(session) == bits(plain)
    assert [row["position"] for row in rows(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert {item.name for item in tmp_path.iterdir()} == {"run.ckpt", "log.jsonl"}
    for batch in batches[3:]:
        assert session.step(batch) == plain.step(batch)


def test_a_feeder_that_ends_early(
    toy: ModuleType, open_toy: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(3)
    result = session.fit(iter(batches), steps=5, checkpoint=tmp_path / "run.ckpt")
    assert result.steps == 3
    assert "the batches ended after 3 of 5 steps" in caplog.messages
    for batch in batches:
        plain.step(batch)
    with TrainingSession.resume(tmp_path / "run.ckpt") as resumed:
        assert bits(resumed) == bits(plain)


def test_a_feeder_that_is_as_long_as_said(
    toy: ModuleType, open_toy: Open, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_toy().fit(iter(toy.batches(3)), steps=3).steps == 3
    assert open_toy().fit(iter(toy.batches(3))).steps == 3
    assert "the batches ended" not in caplog.text


@pytest.mark.parametrize("wrong", [None, 3, [np.zeros(3)], {"ids": "x", "y": "z"}], ids=repr)
def test_a_feeder_that_gives_something_else(toy: ModuleType, open_toy: Open, wrong: object) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(3)
    given = [batches[0], wrong, batches[1]]
    with pytest.raises(UserError):
        session.fit(given)  # type: ignore[arg-type]
    assert bits(session) == bits(plain)  # a list is looked through before the first step
    with pytest.raises(UserError):
        session.fit(iter(given))  # type: ignore[arg-type]
    plain.step(batches[0])
    assert bits(session) == bits(plain)
    assert session.step(batches[1]) == plain.step(batches[1])


def test_a_callback_that_raises(toy: ModuleType, open_toy: Open, tmp_path: Path) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(4)
    seen: list[int] = []

    def callback(row: Any) -> None:
        seen.append(row["position"])
        if row["position"] == 2:
            raise FeederError("the tracker is away")

    with pytest.raises(FeederError, match="the tracker is away"):
        session.fit(batches, metrics=callback, checkpoint=tmp_path / "run.ckpt", checkpoint_every=2)
    assert seen == [1, 2]
    assert list(tmp_path.iterdir()) == [], "the step whose row was refused is not saved"
    for batch in batches[:2]:
        plain.step(batch)
    assert counters(session) == (2, 0, 2)
    assert bits(session) == bits(plain)
    for batch in batches[2:]:
        assert session.step(batch) == plain.step(batch)


def test_a_held_out_set_that_raises(toy: ModuleType, open_toy: Open) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(3)
    with pytest.raises(FeederError):
        session.fit(batches, held_out=feeding(batches[:1]), eval_every=2)
    for batch in batches[:2]:
        plain.step(batch)
    assert bits(session) == bits(plain)
    assert session.step(batches[2]) == plain.step(batches[2])


def test_a_fault_in_a_run_leaves_its_last_checkpoint(toy: ModuleType, open_toy: Open, tmp_path: Path) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(6)
    place = tmp_path / "run.ckpt"
    Fault(session, Slot.COMMIT, at=5)
    with pytest.raises(UserError, match=r"^onnxruntime failed in stage 'commit' of a step"):
        session.fit(batches, metrics=tmp_path / "log.jsonl", checkpoint=place, checkpoint_every=2)
    assert [row["position"] for row in rows(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    with TrainingSession.resume(place, threads=1) as resumed:
        assert resumed.position == 4
        for batch in batches[:4]:
            plain.step(batch)
        assert bits(resumed) == bits(plain)
        for batch in batches[4:]:
            assert resumed.step(batch) == plain.step(batch)
        assert bits(resumed) == bits(plain)
