"""The short cut: the same numbers to the last bit, the same errors, and nothing left of what fails in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException  # pyright: ignore
from preset_names import COUNTING

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.step import probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.step.short_cut import ShortWay

ORDERED = {"ordered": True}


def bits(session: TrainingSession) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.states.items()}


def way_of(session: TrainingSession) -> ShortWay:
    assert session._stepper._short is not None
    return session._stepper._short


def long_way(session: TrainingSession) -> TrainingSession:
    session._stepper._short = None
    return session


class Taken:
    """Counts how often the short cut was run, and can make a run fail."""

    def __init__(self, session: TrainingSession, act: Callable[[Any], None] | None = None) -> None:
        assert session._open.engine.whole is not None
        self._session: Any = session._open.engine.whole.session
        self._act = act
        self.count = 0
        session._open.engine.whole.session = self  # type: ignore[assignment]

    def run_with_iobinding(self, binding: Any) -> None:
        self.count += 1
        if self._act is None:
            self._session.run_with_iobinding(binding)
        else:
            self._act(lambda: self._session.run_with_iobinding(binding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def broken(text: str = "out of memory") -> Exception:
    return RuntimeException(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {text}\nat some.cc:12")


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("preset", COUNTING)
@pytest.mark.parametrize(
    "name",
    [
        "torchjoint_in__dlrm_mean",
        "torchjoint_in__nplm",
        "ortart_dyncore__twotower",
        "ortart_legloss__nplm_sum",
        "ortart_dyncore__nplm_dropout",
        "ortart_dyncore__nplm_bf16",
    ],
)
def test_the_numbers_are_those_of_the_stages(
    graph_case: Callable[..., Any], name: str, preset: str, threads: int
) -> None:
    case = graph_case(name, preset=preset, refresh_every=5)
    short = case.open(threads=threads, seed=1)
    plain = long_way(case.open(threads=threads, seed=1))
    taken = Taken(short)
    for step in range(21):
        batch = case.batches[step // 7 % 2]
        assert short.step(batch) == plain.step(batch)
        if step == 11:  # a step that is skipped: nothing of it may stay
            for key in [name for name, item in batch.items() if item.dtype.kind == "f"]:
                wrong = {**batch, key: np.full_like(batch[key], np.nan)}
                assert short.step(wrong)["skipped"] == plain.step(wrong)["skipped"]
    assert bits(short) == bits(plain)
    assert taken.count > 5
    assert short._stepper.roots.records == plain._stepper.roots.records


def test_it_is_taken_between_refreshes_for_shapes_that_were_seen(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session, plain = open_toy(model=ORDERED), long_way(open_toy(model=ORDERED))
    taken = Taken(session)
    sizes = [6, 6, 6, 6, 6, 6, 3, 3, 3, 3, 6, 6, 6, 6]
    counts: list[int] = []
    for seed, size in enumerate(sizes):
        (batch,) = toy.batches(1, seed=seed, size=size)
        assert session.step(batch) == plain.step(batch)
        counts.append(taken.count)
    # Refreshes in steps 1, 2, 3, 6, 9, 12; two steps of a size that was not there are not short.
    assert np.diff([0, *counts]).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1, 1]
    assert bits(session) == bits(plain)


def test_one_batch_of_another_size_changes_nothing(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    """The last batch of an epoch: the next one is short again."""
    session, plain = open_toy(model=ORDERED), long_way(open_toy(model=ORDERED))
    taken = Taken(session)
    counts: list[int] = []
    for seed, size in enumerate([6, 6, 6, 6, 3, 6, 6, 6]):
        (batch,) = toy.batches(1, seed=seed, size=size)
        assert session.step(batch) == plain.step(batch)
        counts.append(taken.count)
    # Step 6 is a refresh; 7 and 8 are short.
    assert np.diff([0, *counts]).tolist() == [0, 0, 0, 1, 0, 0, 1, 1]
    assert bits(session) == bits(plain)


@pytest.mark.parametrize("copies", [False, True], ids=["in-place", "copying"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_within_is_taken_back_and_the_step_made_the_long_way(
    toy: ModuleType,
    open_toy: Callable[..., TrainingSession],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    copies: bool,
) -> None:
    if copies:
        monkeypatch.setattr(probe, "in_place_problem", lambda *_: "ScatterND was seen to copy")
    session, plain = open_toy(model=ORDERED), long_way(open_toy(model=ORDERED))

    def fail(run: Callable[[], None]) -> None:
        if when == "after":
            run()
        raise broken()

    taken = Taken(session, fail)
    for batch in toy.batches(8):
        assert session.step(batch) == plain.step(batch)
    assert taken.count == 4
    assert bits(session) == bits(plain)
    assert not session._stepper.broken
    assert not way_of(session).off


def test_a_fault_between_the_counts_of_two_tables(graph_case: Callable[..., Any]) -> None:
    """The first table's counts were written, the second's not even read."""
    case = graph_case("ortart_dyncore__twotower", preset="half")
    session, plain = case.open(), long_way(case.open())
    way = way_of(session)
    first, second = way._plan.counted

    def fail(run: Callable[[], None]) -> None:
        held = session._open.engine.buffer(second.state).view()
        before = held.copy()
        run()
        assert not np.array_equal(held, before)
        held[...] = before
        way._array(second.before).fill(np.nan)
        raise broken()

    taken = Taken(session, fail)
    for step in range(12):
        batch = case.batches[step // 6]
        assert session.step(batch) == plain.step(batch)
    assert taken.count > 2
    assert bits(session) == bits(plain)
    assert first.state != second.state


def test_an_interrupt_within_leaves_nothing(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session, plain = open_toy(model=ORDERED), long_way(open_toy(model=ORDERED))
    batches = toy.batches(8)
    for batch in batches[:3]:
        session.step(batch)
        plain.step(batch)

    def interrupt(run: Callable[[], None]) -> None:
        run()
        raise KeyboardInterrupt

    assert session._open.engine.whole is not None
    own = session._open.engine.whole.session
    Taken(session, interrupt)
    before = bits(session)
    with pytest.raises(KeyboardInterrupt):
        session.step(batches[3])
    assert bits(session) == before
    session._open.engine.whole.session = own
    for batch in batches[3:]:
        assert session.step(batch) == plain.step(batch)
    assert bits(session) == bits(plain)


def test_an_output_of_another_shape_ends_the_short_cut(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session, plain = open_toy(model=ORDERED), long_way(open_toy(model=ORDERED))

    def fail(run: Callable[[], None]) -> None:
        run()
        raise broken("shape verification failed: requested shape {3}, computed {4}")

    taken = Taken(session, fail)
    for batch in toy.batches(8):
        assert session.step(batch) == plain.step(batch)
    assert taken.count == 1
    assert way_of(session).off
    assert bits(session) == bits(plain)


def test_bad_batches_get_the_same_error_and_write_nothing(graph_case: Callable[..., Any]) -> None:
    case = graph_case("torchjoint_in__nplm", preset="half")
    session = case.open()
    for _ in range(5):
        session.step(case.batches[0])
    plain = long_way(case.open())
    for _ in range(5):
        plain.step(case.batches[0])
    taken = Taken(session)
    before = bits(session)
    integers = [name for name, array in case.batches[0].items() if array.dtype.kind == "i"]
    assert integers
    for name in integers:
        array = case.batches[0][name].copy()
        array.reshape(-1)[-1] = 10**6
        batch = {**case.batches[0], name: array}
        with pytest.raises(UserError) as mine:
            session.step(batch)
        with pytest.raises(UserError) as theirs:
            plain.step(batch)
        assert str(mine.value) == str(theirs.value)
        assert bits(session) == before
    assert taken.count == len(integers)
    assert session.step(case.batches[0]) == plain.step(case.batches[0])
    assert taken.count == len(integers) + 1


def test_rejected_negative_ids_are_seen_after_the_run(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    model = {"ordered": True, "negatives": "reject"}
    session, plain = open_toy(model=model), long_way(open_toy(model=model))
    batches = toy.batches(8)
    for batch in batches[:3]:
        session.step(batch)
        plain.step(batch)
    before = bits(session)
    taken = Taken(session)
    wrong = {**batches[3], "ids": batches[3]["ids"].copy()}
    wrong["ids"][2] = -1
    with pytest.raises(UserError, match=r"id -1 in input 'ids' is not a row"):
        session.step(wrong)
    assert taken.count == 1
    assert bits(session) == before
    for batch in batches[3:]:
        assert session.step(batch) == plain.step(batch)
    assert bits(session) == bits(plain)
