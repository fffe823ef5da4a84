"""Training sessions on a toy step: the numbers, determinism, skipped steps, and bad models and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import Schedule, TrainingSession
from kfac_onnx.step import plan as partition
from kfac_onnx.step import protos as partition_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

Open = "Callable[..., TrainingSession]"

# float32 against float64 over 20 steps: weights of size 1, rounding 6e-8 per operation, and inverse roots with
# condition up to 1/rho = 100 that enlarge it; measured 7e-6. Scaling anything by 1.01 misses by 1e-3 and more.
TOLERANCE = 5e-5


@pytest.mark.parametrize(
    "model",
    [{}, {"renormalize_below": 0.9}, {"kfac": False}],
    ids=["kfac", "kfac-renormalized", "plain"],
)
def test_twenty_steps_equal_numpy(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], model: dict[str, Any]
) -> None:
    session = open_toy(model=model)
    twin = toy.Twin.start(toy.parameters(), kfac=model.get("kfac", True))
    for batch in toy.batches(20):
        metrics = session.step(batch)
        assert metrics["loss"] == pytest.approx(twin.step(batch), rel=TOLERANCE)
    np.testing.assert_allclose(session.parameters["emb.weight"], twin.emb, atol=TOLERANCE)
    np.testing.assert_allclose(session.parameters["readout"], twin.readout, atol=TOLERANCE)
    assert metrics["step"] == 20


def test_the_comparison_sees_one_percent(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    session = open_toy(lr=0.05 * 1.01)
    twin = toy.Twin.start(toy.parameters())
    for batch in toy.batches(20):
        session.step(batch)
        twin.step(batch)
    assert np.abs(session.parameters["emb.weight"] - twin.emb).max() > 10 * TOLERANCE


@pytest.mark.parametrize("threads", [1, 4])
def test_the_same_run_twice_is_bit_equal(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], threads: int
) -> None:
    model = {"vocab": 10}  # many repeated rows: racing scatters would show
    batches = toy.batches(10, vocab=10, size=4096)
    runs = []
    for _ in range(2):
        session = open_toy(model=model, threads=threads)
        losses = [session.step(batch)["loss"] for batch in batches]
        runs.append((losses, {name: array.tobytes() for name, array in session.states.items()}))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("model", [{}, {"renormalize_below": 0.9}, {"kfac": False}])
def test_a_step_that_is_not_finite_changes_no_state(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], model: dict[str, Any]
) -> None:
    session = open_toy(model=model)
    good = toy.batches(4)
    for batch in good[:2]:
        session.step(batch)
    before = {name: array.tobytes() for name, array in session.states.items()}
    bad = {**good[2], "y": np.full_like(good[2]["y"], np.nan)}
    metrics = session.step(bad)
    assert np.isnan(metrics["loss"])
    assert (metrics["skipped"], metrics["step"]) == (True, 2)
    assert {name: array.tobytes() for name, array in session.states.items()} == before
    assert (session.committed, session.skipped, session.position) == (2, 1, 3)


def test_training_after_a_skipped_step_goes_on_as_if_it_had_not_been(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    batches = toy.batches(6)
    bad = {**batches[0], "y": np.full_like(batches[0]["y"], np.inf)}
    disturbed, plain = open_toy(), open_toy()
    for index, batch in enumerate(batches):
        plain.step(batch)
        if index == 3:
            assert disturbed.step(bad)["skipped"]
        disturbed.step(batch)
    for name, array in plain.states.items():
        assert array.tobytes() == disturbed.states[name].tobytes(), name


def test_a_skipped_step_advances_the_schedule(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy(schedule=Schedule("linear", steps=4))
    batch = toy.batches(1)[0]
    rates = [session.step(batch)["lr"], session.step({**batch, "y": batch["y"] * np.float32(np.nan)})["lr"]]
    rates.append(session.step(batch)["lr"])
    np.testing.assert_allclose(rates, [0.05, 0.05 * 0.75, 0.05 * 0.5], rtol=1e-12)


def test_learning_rates_and_schedule_multiply(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy(lr=0.02, rest_lr=0.03, schedule="linear:steps=10,warmup=2")
    twin = toy.Twin.start(toy.parameters(), lr=0.02, rest_lr=0.03)
    schedule = Schedule("linear", warmup=2, steps=10)
    for position, batch in enumerate(toy.batches(10)):
        session.step(batch)
        twin.step(batch, schedule.factor(position))
    np.testing.assert_allclose(session.parameters["emb.weight"], twin.emb, atol=TOLERANCE)
    np.testing.assert_allclose(session.parameters["readout"], twin.readout, atol=TOLERANCE)


def test_a_batch_of_one_and_a_row_never_looked_up(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session, twin = open_toy(), toy.Twin.start(toy.parameters())
    batch = {"ids": np.array([3]), "y": np.array([0.5], np.float32)}
    for _ in range(3):
        session.step(batch)
        twin.step(batch)
    trained = session.parameters["emb.weight"]
    np.testing.assert_allclose(trained, twin.emb, atol=TOLERANCE)
    untouched = np.delete(trained, 3, axis=0)
    assert untouched.tobytes() == np.delete(toy.parameters()["emb.weight"], 3, axis=0).tobytes()


def test_parameters_are_copies_of_the_trained_ones(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy()
    assert list(session.parameters) == ["emb.weight", "readout"]
    taken = session.parameters["emb.weight"]
    taken[...] = 0
    assert session.parameters["emb.weight"].tobytes() == toy.parameters()["emb.weight"].tobytes()


def test_the_users_arrays_are_left_alone(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    values = toy.parameters()
    session = open_toy(parameters=values)
    session.step(toy.batches(1)[0])
    assert values["emb.weight"].tobytes() == toy.parameters()["emb.weight"].tobytes()


def test_assign_replaces_parameters(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    session, other = open_toy(), toy.parameters(seed=5)
    session.step(toy.batches(1)[0])
    session.assign(other)
    assert session.parameters["readout"].tobytes() == other["readout"].tobytes()
    with pytest.raises(UserError) as error:
        session.assign({"readout": np.zeros(3, np.float32)})
    assert str(error.value) == "the value of parameter 'readout' must have shape [4], got [3]"


def test_a_model_that_brings_its_values_needs_none(toy: ModuleType) -> None:
    session = TrainingSession(toy.whole_step(with_values=True))
    assert session.parameters["readout"].tobytes() == toy.parameters()["readout"].tobytes()


def test_a_batch_input_given_as_parameter_leaves_the_batch(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    batch = toy.batches(1)[0]
    session, plain = open_toy(parameters={**toy.parameters(), "y": batch["y"]}), open_toy()
    assert [item.name for item in session.batch_inputs] == ["ids"]
    assert session.step({"ids": batch["ids"]}) == plain.step(batch)


def test_describe_says_what_runs_where(open_toy: Callable[..., TrainingSession]) -> None:
    described = open_toy().describe()
    assert described["stages"] == ["gradients", "refresh", "precondition", "commit", "undo"]
    assert described["in_place"]
    assert described["device"] == "cpu:0"
    assert described["states"]["emb.weight"] == "in-place"
    assert described["states"]["G"] == "two buffers"


def test_a_closed_session_says_so(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    with open_toy() as session:
        session.step(toy.batches(1)[0])
    with pytest.raises(UserError) as error:
        session.step(toy.batches(1)[0])
    assert str(error.value) == (
        "the training session is closed\n  help: open a new one, or resume a checkpoint"
    )


def test_an_untransformed_graph_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "train.onnx"
    ir.save(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
        ),
        path,
    )
    with pytest.raises(UserError) as error:
        TrainingSession(path)
    assert str(error.value) == (
        f"'{path}' is not a training step: it has no 'kfac.step' entry\n"
        "  help: make one from a training graph first: `kfac-onnx transform MODEL -o OUT`,"
        " or `kfac_onnx.transform(...)`"
    )


def test_a_parameter_without_a_value(toy: ModuleType) -> None:
    with pytest.raises(UserError) as error:
        TrainingSession(toy.whole_step(), parameters={"readout": toy.parameters()["readout"]})
    assert str(error.value) == (
        "parameter 'emb.weight' has no value\n"
        "  help: the model file holds none: give it in parameters= (or --parameters FILE)"
    )


def test_a_value_for_an_unknown_parameter(toy: ModuleType) -> None:
    with pytest.raises(UserError) as error:
        TrainingSession(toy.whole_step(), parameters={**toy.parameters(), "readouts": np.zeros(4)})
    assert str(error.value) == "there is no parameter 'readouts' in the model; did you mean 'readout'?"


def test_a_value_for_a_state_that_is_no_parameter(toy: ModuleType) -> None:
    with pytest.raises(UserError) as error:
        TrainingSession(toy.whole_step(), parameters={**toy.parameters(), "root": np.zeros((4, 4))})
    assert str(error.value) == "there is no parameter 'root' in the model"


def test_a_value_of_another_dtype(toy: ModuleType) -> None:
    values = {**toy.parameters(), "readout": np.zeros(4)}
    with pytest.raises(UserError) as error:
        TrainingSession(toy.whole_step(), parameters=values)
    assert str(error.value) == (
        "the value of parameter 'readout' must be float32, got float64\n"
        "  help: convert it: array.astype('float32')"
    )


def test_an_unknown_provider(toy: ModuleType) -> None:
    with pytest.raises(UserError, match=r"^there is no execution provider 'Abacus'"):
        TrainingSession(toy.whole_step(), parameters=toy.parameters(), providers=["Abacus"])


def test_no_threads(toy: ModuleType) -> None:
    with pytest.raises(UserError) as error:
        TrainingSession(toy.whole_step(), parameters=toy.parameters(), threads=0)
    assert str(error.value) == "threads must be at least 1, got 0"


def test_dropout_follows_the_seed(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    batches = toy.batches(3)

    def losses(seed: int) -> list[float]:
        session = open_toy(model={"dropout": True}, seed=seed)
        assert session.describe()["random_operators"] == 1
        return [session.step(batch)["loss"] for batch in batches]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_constants_are_given_once(toy: ModuleType) -> None:
    model = toy.whole_step(with_values=True)
    step = metadata.read(model, "step", metadata.Step)
    assert step is not None
    metadata.write(model, "step", replace(step, batch=("ids",), constants=("y",)))
    batch = toy.batches(1)[0]
    session = TrainingSession(model, parameters={"y": batch["y"]}, threads=1)
    plain = TrainingSession(toy.whole_step(with_values=True), threads=1)
    assert session.step({"ids": batch["ids"]}) == plain.step(batch)
    with pytest.raises(UserError) as error:
        TrainingSession(model)
    assert str(error.value) == (
        "input 'y' has no value\n"
        "  help: it is a constant of the graph: give it in parameters= (or --parameters FILE)"
    )


def test_large_initializers_are_bound_once(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, batches = open_toy(), toy.batches(2)
    first, loss, second = plain.step(batches[0]), plain.evaluate(batches), plain.step(batches[1])
    monkeypatch.setattr(partition_graph, "FROZEN_BYTES", 3)  # every constant of the toy is larger
    monkeypatch.setattr(partition, "FROZEN_BYTES", 3)
    session = open_toy()
    assert "axis1" in session._open.constants
    assert not session._plan.stages[0].model.graph.initializer
    assert session.step(batches[0]) == first
    assert session.evaluate(batches) == loss
    session.save(tmp_path / "run.ckpt")
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1)
    assert resumed.step(batches[1]) == second
    resumed.export(tmp_path / "trained.onnx")
    assert ir.load(tmp_path / "trained.onnx").graph.inputs[0].name == "ids"


def test_assign_takes_trained_parameters_only(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy()
    for name, message in (
        ("ids", "'ids' is not a trained parameter"),
        ("read", "there is no parameter 'read' in the model; did you mean 'readout'?"),
    ):
        with pytest.raises(UserError) as error:
            session.assign({"readout": np.zeros(4, np.float32), name: np.zeros(4, np.float32)})
        assert str(error.value) == message
    assert session.parameters["readout"].tobytes() == toy.parameters()["readout"].tobytes()
