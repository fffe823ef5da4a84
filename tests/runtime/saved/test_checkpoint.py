"""Checkpoints: a resumed run is the uninterrupted one; a damaged or foreign file is an error."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.schedules import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


def test_resuming_equals_not_stopping(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    batches = toy.batches(12)
    batches[2] = {**batches[2], "y": batches[2]["y"] * np.float32(np.nan)}
    whole = open_toy(schedule="cosine:steps=12,warmup=2", lr=0.03, rest_lr=0.02)
    stopped = open_toy(schedule="cosine:steps=12,warmup=2", lr=0.03, rest_lr=0.02)
    for batch in batches[:7]:
        whole.step(batch)
        stopped.step(batch)
    stopped.save(path)
    stopped.close()
    resumed = TrainingSession.resume(path, threads=1)
    assert (resumed.committed, resumed.skipped, resumed.position) == (6, 1, 7)
    for batch in batches[7:]:
        assert whole.step(batch) == resumed.step(batch)
    for name, array in whole.states.items():
        assert array.tobytes() == resumed.states[name].tobytes(), name


def test_a_resumed_run_can_be_saved_and_resumed_again(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    first, second = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    model = toy.whole_step()
    session = TrainingSession(model, parameters=toy.parameters())
    session.save(first)
    TrainingSession.resume(first, model=model).save(second)
    assert TrainingSession.resume(second, model=model).step(toy.batches(1)[0]) == session.step(
        toy.batches(1)[0]
    )


def test_constants_come_back(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    batch = toy.batches(1)[0]
    session = open_toy(parameters={**toy.parameters(), "y": batch["y"]})
    session.save(tmp_path / "run.ckpt")
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1)
    assert resumed.step({"ids": batch["ids"]}) == session.step({"ids": batch["ids"]})


def test_half_precision_comes_back(graph_case: Callable[..., Any], tmp_path: Path) -> None:
    case = graph_case("ortart_dyncore__nplm_bf16")
    session = case.open()
    session.step(case.batches[0])
    session.save(tmp_path / "run.ckpt")
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1, model=case.model)
    assert "bfloat16" in {str(array.dtype) for array in resumed.parameters.values()}
    assert resumed.step(case.batches[1]) == session.step(case.batches[1])
    for name, array in session.states.items():
        assert array.tobytes() == resumed.states[name].tobytes(), name


def test_a_save_replaces_the_file_whole(open_toy: Callable[..., TrainingSession], tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"old")
    open_toy().save(path)
    TrainingSession.resume(path).close()
    assert [item.name for item in tmp_path.iterdir()] == ["run.ckpt"]


def test_an_unwritable_place(open_toy: Callable[..., TrainingSession], tmp_path: Path) -> None:
    path = tmp_path / "missing" / "run.ckpt"
    with pytest.raises(UserError) as error:
        open_toy().save(path)
    assert str(error.value) == f"'{path}' cannot be written: No such file or directory"


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TrainingSession.resume(tmp_path / "run.ckpt")
    assert str(error.value) == f"there is no checkpoint '{tmp_path / 'run.ckpt'}'"


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_truncated_file(open_toy: Callable[..., TrainingSession], tmp_path: Path, part: float) -> None:
    path = tmp_path / "run.ckpt"
    open_toy().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=r"^checkpoint '.*run.ckpt' is damaged: "):
        TrainingSession.resume(path)


def test_every_flipped_byte_of_a_tensor_is_noticed(
    open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    open_toy().save(path)
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        broken = bytearray(data)
        broken[8 + size + entry["data_offsets"][0]] ^= 1
        path.write_bytes(broken)
        with pytest.raises(UserError) as error:
            TrainingSession.resume(path)
        assert str(error.value) == (
            f"checkpoint '{path}' is damaged: the checksum of tensor '{name}' is wrong\n  help: take an older one"
        )


def test_a_safetensors_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "run.ckpt"
    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(UserError) as error:
        TrainingSession.resume(path)
    assert str(error.value) == f"'{path}' is not a checkpoint of a training session"


def test_a_checkpoint_of_another_model(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    open_toy().save(path)
    TrainingSession.resume(path, model=toy.whole_step(with_values=True)).close()  # values make no other model
    with pytest.raises(UserError) as error:
        TrainingSession.resume(path, model=toy.whole_step(kfac=False))
    assert str(error.value) == (
        f"checkpoint '{path}' was made with another model\n"
        "  help: resume with the model that it was made with, or start without --resume"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "the seed must be at least 0, got -1"),
        ({"seed": True}, "seed of TrainingSession must be a whole number or None, got True"),
        ({"seed": 1.5}, "seed of TrainingSession must be a whole number or None, got 1.5"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"rest_lr": float("inf")}, "rest_lr must be a finite number, got inf"),
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": 10**400}, "lr must be a finite number, got a value of type int"),
        ({"lr": "0.1"}, "lr of TrainingSession must be a number or None, got '0.1'"),
        ({"schedule": 5}, "schedule of TrainingSession must be a Schedule, a text or None, got 5"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 100_000}, "threads must be at most 1024, got 100000"),
        ({"threads": 1.5}, "threads of TrainingSession must be a whole number or None, got 1.5"),
    ],
)
def test_what_no_checkpoint_can_hold_opens_no_session(
    toy: ModuleType, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        TrainingSession(toy.whole_step(), parameters=toy.parameters(), **settings)
    assert str(error.value) == message


def test_numbers_of_numpy_are_written_and_read(toy: ModuleType, tmp_path: Path) -> None:
    session = TrainingSession(
        toy.whole_step(),
        parameters=toy.parameters(),
        seed=np.int64(3),  # type: ignore[arg-type]
        lr=np.float32(0.25),  # type: ignore[arg-type]
        threads=np.int32(1),  # type: ignore[arg-type]
        schedule=Schedule("cosine", warmup=np.int16(2), steps=np.int64(9)),  # type: ignore[arg-type]
    )
    batches = toy.batches(4)
    data = Batches(
        {name: np.concatenate([b[name] for b in batches]) for name in batches[0]},
        np.int64(4),
        seed=np.int8(5),
    )  # type: ignore[arg-type]
    session.fit(data, checkpoint=tmp_path / "run.ckpt")
    session.learning_rates = {name: np.float32(rate) for name, rate in session.learning_rates.items()}  # type: ignore[misc]
    session.save(tmp_path / "run.ckpt")
    with TrainingSession.resume(tmp_path / "run.ckpt", threads=1) as resumed:
        assert resumed.learning_rates == session.learning_rates
        assert (str(resumed.schedule), resumed.data) == ("cosine:warmup=2,steps=9", data.describe())
        assert resumed.step(batches[0]) == session.step(batches[0])


def test_a_rate_that_was_changed_is_checked_at_the_next_step(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    session = open_toy()
    before = session.states
    session.learning_rates["kfac/lr"] = float("nan")
    with pytest.raises(UserError) as error:
        session.step(toy.batches(1)[0])
    assert str(error.value) == "the learning rate 'kfac/lr' must be a finite number, got nan"
    assert session.position == 0
    assert all(np.array_equal(array, before[name]) for name, array in session.states.items())
    with pytest.raises(UserError) as error:
        session.save(tmp_path / "run.ckpt")
    assert (
        error.value.message
        == "a checkpoint cannot hold the learning rates {'kfac/lr': nan, 'kfac/rest_lr': 0.01}"
    )
    assert list(tmp_path.iterdir()) == []


def test_data_that_no_checkpoint_can_hold_stops_before_the_first_step(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    class Odd(Batches):
        def describe(self) -> dict[str, int | bool | None]:
            return {"batches": 1.5}  # type: ignore[dict-item]

    session = open_toy()
    with pytest.raises(UserError) as error:
        session.fit(Odd(toy.batches(1)[0], 2), checkpoint=tmp_path / "run.ckpt")
    assert error.value.message == "a checkpoint cannot hold the data {'batches': 1.5}"
    assert session.position == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": 10**30}, f"prefetch must be at most 1024, got {10**30}"),
        ({"prefetch": -1}, "prefetch must be at least 0, got -1"),
        ({"steps": 2.0}, "steps of TrainingSession.fit must be a whole number or None, got 2.0"),
        ({"epochs": True}, "epochs of TrainingSession.fit must be a whole number or None, got True"),
        ({"skip_limit": 0}, "skip_limit must be at least 1, got 0"),
    ],
)
def test_counts_of_fit(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        open_toy().fit(toy.batches(1), **options)
    assert str(error.value) == message
