"""Buffers: in place without a copy, the copying form where that does not work, and interrupted steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.step import probe
from kfac_onnx.runtime.step.runner import StageError
from kfac_onnx.step.plan import Slot

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from kfac_onnx.runtime import TrainingSession


def runner_of(session: TrainingSession, slot: Slot):
    return next(runner for runner in session._open.engine.runners if runner.stage.slot == slot)


def test_tables_and_counts_are_updated_where_they_lie(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy()
    places = {name: session._holders[name].live.value.data_ptr() for name in ("emb.weight", "A")}
    for batch in toy.batches(4):
        session.step(batch)
    for name, slot in (("emb.weight", Slot.COMMIT), ("A", Slot.PRECONDITION)):
        bindings = list(runner_of(session, slot).bindings.values())
        assert len(bindings) in (1, 2)  # the root, which precondition reads, has two buffers
        for binding in bindings:
            assert places[name] in [value.data_ptr() for value in binding.get_outputs()]
        assert session._holders[name].live.value.data_ptr() == places[name]


def test_a_step_does_not_copy_a_large_table(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    vocab = 4_000_000  # 64 MB of table, 16 MB of counts
    session = open_toy(model={"vocab": vocab})
    batches = toy.batches(12, vocab=vocab)
    for batch in batches[:4]:
        session.step(batch)
    table = session.parameters["emb.weight"]

    def fastest(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    supply = iter(batches[4:])
    # Copying the table alone takes 10 ms and more; a whole step without copies about 0.3 ms.
    assert fastest(lambda: session.step(next(supply))) < fastest(table.copy) / 2


def test_bindings_are_few_however_long_the_run(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy()
    for batch in toy.batches(30):
        session.step(batch)
    # Two states of the swapped buffers, times two for the root, which is swapped at refreshes only.
    assert max(len(runner.bindings) for runner in session._open.engine.runners) <= 4


def test_outputs_are_bound_anew_only_for_other_shapes(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    bound: list[str] = []
    real = ort.IOBinding.bind_output

    def bind(self: ort.IOBinding, name: str, *rest: Any) -> None:
        bound.append(name)
        real(self, name, *rest)

    session, other = open_toy(), open_toy()
    loose = {name for _, name in runner_of(session, Slot.GRADIENTS).loose}
    assert loose
    batches = toy.batches(8)
    small = {name: array[:3] for name, array in batches[0].items()}
    for batch in batches[:4]:
        session.step(batch)
    monkeypatch.setattr(ort.IOBinding, "bind_output", bind)
    for batch in batches[4:]:
        session.step(batch)
    assert not loose & set(bound)
    session.step(small)
    assert loose <= set(bound)
    session.step(batches[0])
    monkeypatch.undo()
    for batch in (*batches, small, batches[0]):  # another session, which binds all anew, is at the same bits
        for runner in other._open.engine.runners:
            runner.keeps = False
        other.step(batch)
    assert {key: array.tobytes() for key, array in session.states.items()} == {
        key: array.tobytes() for key, array in other.states.items()
    }


def test_outputs_whose_shape_depends_on_values_are_not_kept(graph_case: Callable[..., Any]) -> None:
    case = graph_case("ortart_legcore__twotower", preset="adagrad", shape="dense")
    session, other = case.open(), case.open()
    assert runner_of(session, Slot.GRADIENTS).keeps
    other._open.engine.runners[0].keeps = False
    first = case.batches[0]
    same = {key: array * 0 if array.dtype.kind == "i" else array for key, array in first.items()}
    for batch in (first, first, first, same, first, same, same):  # as many merged rows as distinct ids
        assert session.step(batch)["loss"] == other.step(batch)["loss"]
    assert not runner_of(session, Slot.GRADIENTS).keeps
    for key, array in session.states.items():
        assert np.array_equal(array, other.states[key]), key


@pytest.mark.parametrize("model", [{}, {"renormalize_below": 0.9}])
def test_the_copying_form_gives_the_same_numbers(
    toy: ModuleType,
    open_toy: Callable[..., TrainingSession],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: dict[str, object],
) -> None:
    in_place = open_toy(model=model)
    monkeypatch.setattr(probe, "in_place_problem", lambda *_: "ScatterND was seen to copy")
    copying = open_toy(model=model)
    assert "tables are copied at every step: ScatterND was seen to copy" in caplog.text
    assert copying.describe()["states"]["emb.weight"] == "two buffers"
    assert copying.describe()["in_place_problem"] == "ScatterND was seen to copy"
    batches = toy.batches(8)
    batches[4] = {**batches[4], "y": batches[4]["y"] * np.float32(np.nan)}
    for batch in batches:
        one, other = in_place.step(batch), copying.step(batch)
        assert one == other or (np.isnan(one["loss"]) and np.isnan(other["loss"]))
    for name, array in in_place.states.items():
        assert array.tobytes() == copying.states[name].tobytes(), name


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_step_that_is_interrupted_is_undone(
    toy: ModuleType,
    open_toy: Callable[..., TrainingSession],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    session, plain = open_toy(), open_toy()
    batches = toy.batches(5)
    for batch in batches[:2]:
        session.step(batch)
        plain.step(batch)
    before = {name: array.tobytes() for name, array in session.states.items()}
    run = session._open.engine.run

    def interrupted(runner: object, batch: object) -> bool:
        if runner.stage.slot == Slot.PRECONDITION:  # type: ignore[attr-defined]
            raise error
        return run(runner, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(session._open.engine, "run", interrupted)
    with pytest.raises(type(error)):
        session.step(batches[2])
    monkeypatch.undo()
    assert {name: array.tobytes() for name, array in session.states.items()} == before
    for batch in batches[2:]:
        assert session.step(batch) == plain.step(batch)


def test_a_batch_the_graph_cannot_run_is_a_sentence(
    open_toy: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_toy()

    def fails(*_: object) -> bool:
        raise StageError("sizes 3 and 4 do not go together")

    monkeypatch.setattr(session._open.engine, "run", fails)
    with pytest.raises(UserError) as error:
        session.step({"ids": np.array([1]), "y": np.zeros(1, np.float32)})
    assert str(error.value) == (
        "the batch cannot be run through the graph: sizes 3 and 4 do not go together\n  help: nothing was written"
    )
