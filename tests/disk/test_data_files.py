"""A model and its data are replaced as a pair, and data files are inputs too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx.disk import atomic
from kfac_onnx.disk import models as files
from kfac_onnx.disk.data_files import belonging, data_names
from kfac_onnx.disk.models import load_model, refuse_overwrite, save_model
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def model(value: float) -> ir.Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1000] x) => (float[1000] y) <float[1000] w> { y = Add(x, w) }'
    )
    weight = onnx.numpy_helper.from_array(np.full(1000, value, np.float32), "w")
    del proto.graph.initializer[:], proto.graph.input[1:]
    proto.graph.initializer.append(weight)
    return ir.from_proto(proto)


def weight_of(path: Path) -> float:
    tensor = load_model(path).graph.initializers["w"].const_value
    assert tensor is not None
    (value,) = set(tensor.numpy().tolist())
    return value


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "LARGEST_FILE", 1000)
    return tmp_path / "big.onnx"


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_pairs_take_turns(big: Path) -> None:
    for number, data in enumerate(["big.onnx.data", "big.onnx.data2", "big.onnx.data"]):
        save_model(model(number), big)
        assert weight_of(big) == number
        assert names(big.parent) == ["big.onnx", data]
        assert data_names(big) == {data}


def test_a_small_model_takes_the_place_of_a_pair(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(model(1), big)
    monkeypatch.setattr(files, "LARGEST_FILE", 10_000)
    save_model(model(2), big)
    assert weight_of(big) == 2
    assert names(big.parent) == ["big.onnx"]


@pytest.mark.parametrize("moves", [0, 1])
def test_whenever_it_is_killed_there_is_a_whole_pair(
    big: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """The renames are all that happens in the folder: stop before each of them."""
    save_model(model(1), big)
    replace, done = os.replace, list[object]()

    def stops(source: object, target: object) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic.os, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        save_model(model(2), big)
    monkeypatch.setattr(atomic.os, "replace", replace)
    assert weight_of(big) == 1
    save_model(model(3), big)
    assert weight_of(big) == 3
    assert data_names(big) <= {*names(big.parent)}


def test_data_of_others_is_not_deleted(big: Path) -> None:
    proto = ir.to_proto(model(1))
    onnx.save_model(proto, str(big), save_as_external_data=True, location="weights.bin", size_threshold=0)
    save_model(model(2), big)
    assert weight_of(big) == 2
    assert names(big.parent) == ["big.onnx", "big.onnx.data", "weights.bin"]


def test_the_data_of_an_input_is_an_input(big: Path) -> None:
    save_model(model(1), big)
    data = big.with_name("big.onnx.data")
    assert belonging(big) == {data}
    before = data.read_bytes()
    link = big.with_name("link")
    link.symlink_to(data)
    hard = big.with_name("hard.onnx.data")
    hard.hardlink_to(data)
    for output in (data, link, big.parent / "." / "big.onnx.data", hard, big.with_name("hard.onnx")):
        with pytest.raises(
            UserError, match=r"belongs to the input '.*big\.onnx' and will not be overwritten"
        ):
            refuse_overwrite(output, big)
    refuse_overwrite(big.with_name("other.onnx"), big)
    assert data.read_bytes() == before


def test_a_file_of_an_input_folder_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    with pytest.raises(UserError, match=r"belongs to the input"):
        refuse_overwrite(tmp_path / "a.npz", tmp_path)
    refuse_overwrite(tmp_path / "b.onnx", tmp_path)
    refuse_overwrite(tmp_path / "a.npz", "-")


def test_the_data_of_a_training_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "p.checkpoint").write_bytes(b"x")
    assert belonging(tmp_path / "p.checkpoint") == set()
    (tmp_path / "p.checkpoint.data").write_bytes(b"x")
    assert belonging(tmp_path / "p.checkpoint") == {tmp_path / "p.checkpoint.data"}
    assert belonging(tmp_path / "none.onnx") == set()
