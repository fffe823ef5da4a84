"""Values of parameters from the files that people have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import pytest
from corpus_cases import Case, MarkedGraph

from kfac_onnx.api import transform
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.saved.weights import read_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

DATA = Path(__file__).parents[2] / "data"
VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.float16)}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].tobytes() == other[k].tobytes() for k in one
    )


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **VALUES)
    assert same(read_weights(tmp_path / "w.npz"), VALUES)


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(VALUES, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), VALUES)


def test_initializers_of_a_model(tmp_path: Path) -> None:
    values = {**VALUES, "c": np.array([1.5], ml_dtypes.bfloat16)}
    graph = onnx.helper.make_graph(
        [], "w", [], [], [onnx.numpy_helper.from_array(array, name) for name, array in values.items()]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "w.onnx")
    assert same(read_weights(tmp_path / "w.onnx"), values)


def test_a_checkpoint_of_onnx_runtime() -> None:
    values = read_weights(DATA / "weights" / "ortart_legcore__nplm.checkpoint")
    with np.load(DATA / "graphs" / "ortart_legcore__nplm.npz") as case:
        assert len(values) == 5
        for name, array in values.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, case[f"in:{name}"])


@pytest.mark.parametrize("name", ["checkpoint", "run.5", "weights.bin"])
def test_a_checkpoint_is_known_by_its_contents(name: str, tmp_path: Path) -> None:
    source = DATA / "weights" / "ortart_legcore__nplm.checkpoint"
    path = tmp_path / name
    path.write_bytes(source.read_bytes())
    assert same(read_weights(path), read_weights(source))


@pytest.mark.parametrize("name", ["weights", "weights.bin"])
def test_other_files_are_known_by_their_contents(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(VALUES, tmp_path / name)
    assert same(read_weights(tmp_path / name), VALUES)
    with (tmp_path / name).open("wb") as file:
        np.savez(file, **VALUES)
    assert same(read_weights(tmp_path / name), VALUES)


def test_a_damaged_checkpoint_of_onnx_runtime(tmp_path: Path) -> None:
    data = (DATA / "weights" / "ortart_legcore__nplm.checkpoint").read_bytes()
    path = tmp_path / "w.checkpoint"
    path.write_bytes(data[:3000])
    with pytest.raises(UserError, match="is a damaged ONNX Runtime training checkpoint"):
        read_weights(path)
    path.write_bytes(b"0123456789abcdef")
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value) == f"'{path}' is not an ONNX Runtime training checkpoint"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".onnx", ".checkpoint"])
def test_missing_and_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value) == f"there is no file '{path}'"
    path.write_bytes(b"\x93 this is nothing of the kind")
    with pytest.raises(UserError, match=f"^'.*w{suffix}' is not "):
        read_weights(path)


def test_a_kind_of_file_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "w.pt")
    assert str(error.value) == (
        f"parameters cannot be read from '{tmp_path / 'w.pt'}'\n"
        "  help: give a file ending in .npz, .safetensors, .onnx, .checkpoint"
    )


def test_a_session_takes_a_file(toy: ModuleType, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **toy.parameters())
    session = TrainingSession(toy.whole_step(), parameters=tmp_path / "w.npz")
    assert session.parameters["readout"].tobytes() == toy.parameters()["readout"].tobytes()


def test_a_session_reads_its_model_from_a_file(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    from kfac_onnx.disk.models import save_model

    save_model(toy.whole_step(with_values=True), tmp_path / "step.onnx")
    session = TrainingSession(tmp_path / "step.onnx", threads=1)
    batch = toy.batches(1)[0]
    assert session.step(batch) == open_toy().step(batch)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    case = Case("torchjoint_in__nplm")
    values = MarkedGraph(case).initial(case)
    table = values["m.emb.weight"].copy()
    table[99, 15] = bad
    with pytest.raises(UserError) as caught:
        TrainingSession(transform(case.path), parameters={**values, "m.emb.weight": table})
    assert str(caught.value) == "the value of parameter 'm.emb.weight' holds entries that are not finite"


@pytest.mark.parametrize("dims", [[2**62, 0], [0, 2**62, 2**62], [1] * 70])
def test_shapes_that_no_array_has(tmp_path: Path, dims: list[int]) -> None:
    graph = onnx.helper.make_graph([], "w", [], [])
    tensor = graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=dims)
    tensor.raw_data = bytes(4 if 0 not in dims else 0)
    path = tmp_path / "w.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert caught.value.message.startswith(
        "the ONNX model is malformed: tensor 'w' is of no shape that an array can have: "
    )
