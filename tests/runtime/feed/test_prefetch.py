"""Batches made ahead in a thread: the same batches, the same errors at the same steps, no thread left over."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.batches import as_inputs
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.prefetch import prefetched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

DEPTHS = [0, 1, 2, 7]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_everything_comes_out_in_order(depth: int, count: int) -> None:
    with prefetched(range(count), depth, lambda item: 10 * item) as items:
        assert list(items) == [10 * n for n in range(count)]
        assert list(items) == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_queue_is_bounded(depth: int) -> None:
    """Never more than `depth` beyond what was taken, however long the consumer takes."""
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(30):
            made.append(n)
            yield n

    with prefetched(items(), depth) as ready:
        for taken, _ in enumerate(ready, 1):
            limit = time.monotonic() + 5.0
            while len(made) < min(taken + depth, 30) and time.monotonic() < limit:
                time.sleep(0.001)
            time.sleep(0.002)
            assert len(made) == min(taken + depth, 30)


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_exception_comes_at_its_step(depth: int) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth cannot be made")

    taken: list[int] = []
    with (  # noqa: PT012  what was taken before counts
        pytest.raises(ValueError, match="the sixth cannot be made"),
        prefetched(items(), depth) as ready,
    ):
        for item in ready:
            taken.append(item)
    assert taken == list(range(5))


@pytest.mark.parametrize("depth", DEPTHS[1:])
def test_an_exception_in_preparing_is_the_last_thing(depth: int) -> None:
    def prepare(item: int) -> int:
        return 60 // (3 - item)

    with prefetched(range(10), depth, prepare) as ready:
        assert [next(ready), next(ready), next(ready)] == [20, 30, 60]
        with pytest.raises(ZeroDivisionError):
            next(ready)
        assert threads() == []
        assert list(ready) == []


@pytest.mark.parametrize("depth", DEPTHS[1:])
def test_leaving_early_ends_the_thread(depth: int) -> None:
    made: list[int] = []

    def prepare(item: int) -> int:
        made.append(item)
        time.sleep(0.01)
        return item

    with prefetched(iter(range(10**9)), depth, prepare) as ready:
        assert next(ready) == 0
        assert len(threads()) == 1
    assert threads() == []
    count = len(made)
    time.sleep(0.03)
    assert len(made) == count <= depth + 1
    assert list(ready) == []


def test_a_consumer_that_fails_ends_the_thread() -> None:
    def consume() -> None:
        with prefetched(iter(int, 1), 2) as ready:
            next(ready)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert threads() == []


def narrow(toy: ModuleType, count: int = 23) -> dict[str, np.ndarray]:
    data = toy.batches(1, size=count)[0]
    return {**data, "ids": data["ids"].astype(np.int16)}


def test_arrays_are_cast_ahead_and_faults_left_for_the_step(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session, batch = open_toy(), narrow(toy, 6)
    ready = as_inputs(batch, session.batch_inputs)
    assert list(ready) == list(batch)
    assert ready["ids"].dtype == np.int64
    np.testing.assert_array_equal(ready["ids"], batch["ids"])
    wrong = {**batch, "y": batch["y"].astype(np.float64), "more": np.zeros(3)}
    assert as_inputs(wrong, session.batch_inputs) is wrong
    with pytest.raises(UserError, match="unknown input 'more'"):
        session.step(as_inputs(wrong, session.batch_inputs))


@pytest.mark.parametrize("prefetch", [1, 2, 5, None])
def test_training_is_bit_equal_with_it_and_without(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], prefetch: int | None, tmp_path: Path
) -> None:
    """Through epochs that end in the middle of the queue, a stop, a checkpoint and a second part."""
    (tmp_path / "data").mkdir()
    for shard in range(3):
        np.savez(tmp_path / "data" / f"{shard}.npz", **narrow(toy, 7 + shard))
    batches = Batches(tmp_path / "data", 4, seed=3)
    plain, ahead = open_toy(), open_toy()
    rows: list[list[Any]] = [[], []]
    plain.fit(batches, steps=20, prefetch=0, metrics=rows[0].append)
    ahead.fit(batches, steps=9, prefetch=prefetch, metrics=rows[1].append, checkpoint=tmp_path / "run.ckpt")
    assert ahead.position == 9
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1)
    assert resumed.position == 9  # what was consumed, not what was made ahead
    resumed.fit(batches, steps=11, prefetch=prefetch, metrics=rows[1].append)
    assert rows[0] == rows[1]
    for name, array in plain.states.items():
        assert array.tobytes() == resumed.states[name].tobytes(), name


def test_a_bad_batch_is_named_at_its_step(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    data = narrow(toy, 40)
    data["ids"][25] = 1000
    outcomes: list[tuple[str, int]] = []
    for prefetch in (0, 3):
        session = open_toy()
        with pytest.raises(UserError) as error:
            session.fit(Batches(data, 4), prefetch=prefetch)
        outcomes.append((str(error.value), session.position))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == 6


def test_what_a_user_gives_is_not_read_ahead_unasked(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    """A generator may fill one array again and again, or look at the session: it is asked when it is due."""
    session, seen = open_toy(), list[tuple[int, str]]()
    batches = toy.batches(5)

    def supply() -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            seen.append((session.position, threading.current_thread().name))
            yield batch

    session.fit(supply())
    assert seen == [(n, "MainThread") for n in range(5)]
    seen.clear()
    open_toy().fit(supply(), prefetch=2)
    assert all("prefetch" in name for _, name in seen)


def test_depths_below_zero_are_refused(open_toy: Callable[..., TrainingSession]) -> None:
    with pytest.raises(UserError) as error:
        open_toy().fit([], prefetch=-1)
    assert str(error.value) == "prefetch must be at least 0, got -1"
