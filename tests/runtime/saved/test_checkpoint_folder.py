"""A folder of checkpoints: the newest few, the last whole one, nobody else's."""

from __future__ import annotations

import json
import logging
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.disk import atomic
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.saved import checkpoint, checkpoint_folder
from kfac_onnx.runtime.saved.saved_run import read_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    Open = Callable[..., TrainingSession]


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(toy: ModuleType, open_toy: Open, tmp_path: Path) -> Path:
    """Three checkpoints of one run: after batch 2, 4 and 6."""
    place = tmp_path / "run"
    open_toy().fit(toy.batches(6), checkpoint=place, checkpoint_every=2)
    return place


def test_a_run_keeps_its_newest(toy: ModuleType, open_toy: Open, tmp_path: Path) -> None:
    place = tmp_path / "a" / "run"
    open_toy().fit(toy.batches(9), checkpoint=place, checkpoint_every=2, keep=2)
    assert names(place) == ["step-0000000008.ckpt", "step-0000000009.ckpt"]
    with TrainingSession.resume(place) as session:
        assert session.position == 9
        assert session.save(place, keep=1).name == "step-0000000009.ckpt"
    assert names(place) == ["step-0000000009.ckpt"]


def test_three_are_kept_unless_asked(folder: Path, toy: ModuleType) -> None:
    assert names(folder) == [f"step-000000000{n}.ckpt" for n in (2, 4, 6)]
    with TrainingSession.resume(folder) as session:
        session.fit(toy.batches(1), checkpoint=folder)
    assert names(folder) == [f"step-000000000{n}.ckpt" for n in (4, 6, 7)]


def rename_entry(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"kfac_onnx"', b'"kfac_onny"', 1))


@pytest.mark.parametrize("harm", [truncate, flip, rename_entry, lambda path: path.write_bytes(b"")])
def test_the_last_whole_one_is_taken_with_a_warning(
    folder: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    harm(folder / "step-0000000006.ckpt")
    with TrainingSession.resume(folder) as session:
        assert session.position == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert f"'{folder}/step-0000000006.ckpt' is " in text
    assert text.endswith("; 'step-0000000004.ckpt' is taken instead")


def test_a_damaged_one_is_set_aside_when_the_run_has_saved_again(folder: Path, toy: ModuleType) -> None:
    """With keep=1 the number of the damaged one must not push the new one out."""
    truncate(folder / "step-0000000006.ckpt")
    with TrainingSession.resume(folder) as session:
        session.fit(toy.batches(1), checkpoint=folder, keep=1)
    assert names(folder) == ["step-0000000005.ckpt", "step-0000000006.ckpt.damaged"]
    with TrainingSession.resume(folder) as session:
        assert session.position == 5


def test_a_damaged_one_is_written_anew(folder: Path, toy: ModuleType) -> None:
    truncate(folder / "step-0000000006.ckpt")
    with TrainingSession.resume(folder) as session:
        session.fit(toy.batches(2), checkpoint=folder)
    assert names(folder) == [f"step-000000000{n}.ckpt" for n in (2, 4, 6)]
    with TrainingSession.resume(folder) as session:
        assert session.position == 6


def test_none_that_is_whole(folder: Path) -> None:
    for path in folder.iterdir():
        flip(path)
    with pytest.raises(UserError) as error:
        TrainingSession.resume(folder)
    lines = str(error.value).replace(str(folder), "DIR").splitlines()
    assert lines[0] == "no checkpoint in 'DIR' is whole"
    assert [line.split(" is damaged: ")[0] for line in lines[1:-1]] == [
        f"  tried: checkpoint 'DIR/step-000000000{n}.ckpt'" for n in (6, 4, 2)
    ]
    assert lines[-1] == "  help: start anew in another folder"


def test_an_empty_folder_and_files_of_other_names(tmp_path: Path) -> None:
    for name in (
        "step-6.ckpt",
        "step-0000000006.ckpt.damaged",
        "run.ckpt",
        ".step-0000000006.ckpt.abcdefgh.tmp",
    ):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError) as error:
        TrainingSession.resume(tmp_path)
    assert str(error.value) == f"there is no checkpoint in '{tmp_path}'"


def header_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    outer = json.loads(data[8 : 8 + size])
    return outer, json.loads(outer["__metadata__"]["kfac_onnx"]), data[8 + size :]


def rewrite(path: Path, *, honest: bool = True, **fields: Any) -> None:
    """Change fields of a checkpoint's header; an honest writer renews its checksum."""
    import hashlib

    outer, header, rest = header_of(path)
    text = json.dumps(header | fields)
    outer["__metadata__"]["kfac_onnx"] = text
    if honest:
        outer["__metadata__"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    inner = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(inner)) + inner + rest)


def test_a_newer_format_is_an_error_and_no_fall_back(folder: Path) -> None:
    path = folder / "step-0000000006.ckpt"
    rewrite(path, version=99, something="new")
    for place in (folder, path):
        with pytest.raises(UserError) as error:
            TrainingSession.resume(place)
        assert str(error.value) == (
            f"checkpoint '{path}' has version 99, this program reads {checkpoint.VERSION}\n"
            "  help: install the kfac-onnx that wrote it, or a newer one"
        )


def test_another_model_is_an_error_and_no_fall_back(folder: Path, toy: ModuleType) -> None:
    with pytest.raises(UserError, match=r"step-0000000006.ckpt' was made with another model"):
        TrainingSession.resume(folder, model=toy.whole_step(kfac=False))


@pytest.mark.parametrize(
    "fields",
    [
        {"position": 5}, {"committed": 7}, {"seed": 1}, {"learning_rates": {"kfac/lr": 0.5}}, {"version": 4},
        {"schedule": "cosine"}, {"tensors": {}},
    ],
)  # fmt: skip
def test_a_changed_header_is_damage(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / "step-0000000006.ckpt"
    rewrite(path, honest=False, **fields)
    with pytest.raises(checkpoint.DamagedError) as error:
        checkpoint.read_checkpoint(path)
    assert error.value.message == f"checkpoint '{path}' is damaged: the checksum of its header is wrong"


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"position": -1}, "its header has no right 'position'"),
        ({"position": "5"}, "its header has no right 'position'"),
        ({"committed": True}, "its header has no right 'committed'"),
        ({"learning_rates": {"lr": float("nan")}}, "its header has no right 'learning_rates'"),
        ({"learning_rates": [0.1]}, "its header has no right 'learning_rates'"),
        ({"learning_rates": {"kfac/lr": 10**400}}, "its header has no right 'learning_rates'"),
        ({"learning_rates": {"kfac/lr": True}}, "its header has no right 'learning_rates'"),
        ({"learning_rates": {}}, "the learning rate 'kfac/lr' is missing"),
        ({"position": 2**63}, "its header has no right 'position'"),
        ({"seed": 2**128}, "its header has no right 'seed'"),
        ({"seed": 1.5}, "its header has no right 'seed'"),
        ({"data": {"batches": "many"}}, "its header has no right 'data'"),
        ({"tensors": {"model": ["uint8", [1]]}}, "its header has no right 'tensors'"),
        ({"tensors": {}}, "tensor 'model' is not in its header"),
        ({"model_hash": "0"}, "the hash of its model is wrong"),
    ],
)
def test_a_header_that_lies(folder: Path, fields: dict[str, Any], detail: str) -> None:
    path = folder / "step-0000000006.ckpt"
    rewrite(path, **fields)
    with pytest.raises(checkpoint.DamagedError) as error:
        checkpoint.read_checkpoint(path)
    assert error.value.message == f"checkpoint '{path}' is damaged: {detail}"


def test_every_flipped_bit_of_the_file_is_noticed(folder: Path) -> None:
    """Wherever it is: length, names, offsets, metadata, tensors; or it is a space of the outer JSON."""
    path = folder / "step-0000000006.ckpt"
    data = path.read_bytes()
    want = checkpoint.read_checkpoint(path)
    end = 8 + struct.unpack_from("<Q", data)[0]
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, end, 300).tolist(), *rng.integers(end, len(data), 100).tolist()]
    for place in places:
        harmed = bytearray(data)
        harmed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(harmed)
        try:
            found = checkpoint.read_checkpoint(path)
        except UserError:
            continue
        assert place < end, place
        assert found == want, place


def test_something_behind_the_tensors(folder: Path) -> None:
    path = folder / "step-0000000006.ckpt"
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(checkpoint.DamagedError, match="something lies behind its tensors"):
        checkpoint.read_checkpoint(path)


def test_a_state_that_is_missing(folder: Path, toy: ModuleType) -> None:
    path = folder / "step-0000000006.ckpt"
    found = checkpoint.read_checkpoint(path)
    states = {name: np.asarray(array) for name, array in found.states.items()}
    lost = next(name for name in states if "readout" not in name and name != "emb")
    import dataclasses

    for changed, detail in (
        ({n: a for n, a in states.items() if n != lost}, "is missing"),
        (states | {lost: np.zeros(99, np.float32)}, "has another type or shape than in its model"),
    ):
        checkpoint.write_checkpoint(path, dataclasses.replace(found, states=changed))
        with pytest.raises(checkpoint.DamagedError) as error:
            TrainingSession.resume(path)
        assert error.value.message == f"checkpoint '{path}' is damaged: the state '{lost}' {detail}"


def test_the_versions_and_the_data_are_kept(
    toy: ModuleType,
    open_toy: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    import kfac_onnx

    batches = Batches(toy.batches(1, size=10)[0], 4, seed=3)
    open_toy().fit(batches, steps=2, checkpoint=tmp_path / "a.ckpt")
    found = checkpoint.read_checkpoint(tmp_path / "a.ckpt")
    assert found.versions == {
        "kfac_onnx": kfac_onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
    }  # fmt: skip
    want = {"batches": 3, "examples": 10, "batch_size": 4, "seed": 3, "drop_last": False}
    assert found.data is not None
    assert {name: value for name, value in found.data.items() if name != "content"} == want
    assert found.data["content"] == batches.content
    with TrainingSession.resume(tmp_path / "a.ckpt") as session:
        session.fit(batches, steps=1)
        assert caplog.messages == []
        session.fit(Batches(toy.batches(1, size=10)[0], 5), steps=1)
    assert caplog.messages == [
        "the data are not those of the run so far: batches 3 is now 2, batch_size 4 is now 5, seed 3 is now None;"
        " it goes on with other batches"
    ]
    caplog.clear()
    monkeypatch.setattr(onnxruntime, "__version__", "9.9")
    TrainingSession.resume(tmp_path / "a.ckpt").close()
    assert caplog.messages == [
        f"checkpoint '{tmp_path / 'a.ckpt'}' was written with onnxruntime {found.versions['onnxruntime']},"
        " this is 9.9: numbers may differ in their last bits"
    ]


def test_another_runs_folder_is_left_alone(folder: Path, toy: ModuleType, open_toy: Open) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    session = open_toy()
    for save in (lambda: session.save(folder), lambda: session.fit(toy.batches(1), checkpoint=folder)):
        with pytest.raises(UserError) as error:
            save()
        assert str(error.value) == (
            f"the folder '{folder}' holds checkpoints of another run\n"
            "  help: go on from them (resume, `train --resume`), or give another folder"
        )
    assert session.position == 0  # before the first step
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_going_back_does_not_delete_what_is_later(folder: Path, toy: ModuleType) -> None:
    with TrainingSession.resume(folder / "step-0000000004.ckpt") as session:
        with pytest.raises(UserError) as error:
            session.fit(toy.batches(1), checkpoint=folder)
        assert str(error.value) == (
            f"the folder '{folder}' holds checkpoints of later steps: 'step-0000000006.ckpt' is newer than batch 4,"
            " where this run is\n  help: go on from the newest, or save into another folder"
        )
        session.fit(toy.batches(1), checkpoint=folder.with_name("other"))
    assert names(folder) == [f"step-000000000{n}.ckpt" for n in (2, 4, 6)]


def test_a_full_disk_leaves_the_older_ones(
    folder: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    session = TrainingSession.resume(folder)

    def full(place: Path) -> None:
        raise OSError(28, "No space left on device", str(place))

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(UserError) as error:
        session.fit(toy.batches(2), checkpoint=folder, keep=1)
    file = folder / "step-0000000008.ckpt"
    assert str(error.value) == f"'{file}' cannot be written: No space left on device"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_safetensors_errors_are_the_systems(
    tmp_path: Path, open_toy: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.numpy
    from safetensors import SafetensorError

    for text, message in (
        ("Error while serializing: I/O error: No space left on device (os error 28)", os.strerror(28)),
        ("Error while serializing: something", "Error while serializing: something"),
    ):

        def fails(*_: object, text: str = text, **__: object) -> None:
            raise SafetensorError(text)

        monkeypatch.setattr(safetensors.numpy, "save_file", fails)
        with pytest.raises(UserError) as error:
            open_toy().save(tmp_path / "a.ckpt")
        assert str(error.value) == f"'{tmp_path / 'a.ckpt'}' cannot be written: {message}"
    assert names(tmp_path) == []


def test_what_killed_runs_left_is_removed(folder: Path, toy: ModuleType) -> None:
    for name in (".step-0000000005.ckpt.abcdefgh.tmp", ".step-0000000007.ckpt.01234567.tmp"):
        (folder / name).mkdir()
        (folder / name / "half").write_text("x")
    with TrainingSession.resume(folder) as session:
        session.save(folder)
    assert names(folder) == [f"step-000000000{n}.ckpt" for n in (2, 4, 6)]


def test_one_that_cannot_be_deleted_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pathlib import Path as AnyPath

    def refused(self: AnyPath, *, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(AnyPath, "unlink", refused)
    with TrainingSession.resume(folder) as session:
        session.save(folder, keep=1)
    assert caplog.messages == [
        f"an old checkpoint cannot be deleted: [Errno 13] Permission denied: '{folder}/step-0000000004.ckpt'"
    ]


def test_files_and_folders(open_toy: Open, tmp_path: Path) -> None:
    session = open_toy()
    assert session.save(tmp_path / "a.ckpt") == tmp_path / "a.ckpt"
    assert session.save(tmp_path / "b.safetensors") == tmp_path / "b.safetensors"
    assert session.save(tmp_path / "c.d") == tmp_path / "c.d" / "step-0000000000.ckpt"
    (tmp_path / "e.ckpt").mkdir()
    assert session.save(tmp_path / "e.ckpt") == tmp_path / "e.ckpt" / "step-0000000000.ckpt"
    assert checkpoint_folder.numbered(tmp_path / "none") == []
    for keep, place, message in (
        (2, "a.ckpt", f"keep is for a folder of checkpoints, and '{tmp_path / 'a.ckpt'}' is a file"),
        (0, "c.d", "keep must be at least 1, got 0"),
    ):
        with pytest.raises(UserError) as error:
            session.save(tmp_path / place, keep=keep)
        assert str(error.value) == message


def test_a_header_that_is_nested_without_end(folder: Path) -> None:
    import hashlib

    path = folder / "step-0000000006.ckpt"
    outer, _, rest = header_of(path)
    text = "[" * 100_000 + "]" * 100_000
    outer["__metadata__"] = {"kfac_onnx": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    inner = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(inner)) + inner + rest)
    with pytest.raises(checkpoint.DamagedError) as error:
        checkpoint.read_checkpoint(path)
    assert error.value.message == f"checkpoint '{path}' is damaged: it is nested too deeply"


def test_a_rate_that_is_none_of_the_models(folder: Path) -> None:
    path = folder / "step-0000000006.ckpt"
    rewrite(path, learning_rates={**header_of(path)[1]["learning_rates"], "bogus": 0.1})
    for read in (checkpoint.read_checkpoint, read_run, TrainingSession.resume):
        with pytest.raises(checkpoint.DamagedError) as error:
            read(path)
        assert error.value.message == (
            f"checkpoint '{path}' is damaged: the learning rate 'bogus' is none of its model's"
        )
    with TrainingSession.resume(folder) as session:
        assert session.position == 4


@pytest.mark.parametrize(
    ("model", "detail"),
    [
        (b"\xff\xff", "Error parsing message"),
        (b"", "its model is no training step"),
        (None, "its model cannot be read: the ONNX model is malformed: tensor 'w' is of no shape"),
    ],
)
def test_a_model_inside_that_is_none(folder: Path, model: bytes | None, detail: str) -> None:
    import dataclasses

    import onnx

    path = folder / "step-0000000006.ckpt"
    written = checkpoint.read_checkpoint(path)
    if model is None:
        proto = checkpoint.proto_of(written)
        proto.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2**62, 0])
        model = proto.SerializeToString()
    states = {name: np.asarray(array) for name, array in written.states.items()}
    checkpoint.write_checkpoint(path, dataclasses.replace(written, model=model, states=states))
    with pytest.raises(checkpoint.DamagedError) as error:
        checkpoint.read_checkpoint(path)
    assert error.value.message.startswith(f"checkpoint '{path}' is damaged: ")
    assert detail in error.value.message


def test_what_may_not_be_read_is_not_called_damaged(
    folder: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "step-0000000006.ckpt"
    real = checkpoint.safetensors_arrays

    def locked(place: Path) -> object:
        if place == path:
            raise PermissionError(13, "Permission denied")
        return real(place)

    monkeypatch.setattr(checkpoint, "safetensors_arrays", locked)
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    for place in (path, folder):
        with pytest.raises(checkpoint.UnreadableError) as error:
            TrainingSession.resume(place)
        assert str(error.value) == (
            f"checkpoint '{path}' cannot be read: Permission denied\n"
            "  help: mend its rights or its disk, or go on from an older one by its own name"
        )
    with (
        TrainingSession.resume(folder / "step-0000000004.ckpt") as session,
        pytest.raises(UserError) as error,
    ):
        session.fit(toy.batches(1), checkpoint=folder)
    assert error.value.message == (
        f"the folder '{folder}' holds checkpoints of later steps: '{path.name}' is newer than batch 4,"
        " where this run is"
    )
    assert {item.name: item.read_bytes() for item in folder.iterdir() if item.name in before} == before
