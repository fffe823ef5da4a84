"""Weights beside a model stay in their file: equal results, a file streamed, memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from kfac_onnx.disk import mapped, models, streamed
from kfac_onnx.disk.mapped import MappedTensor, all_same, digest, equal, greatest, windows
from kfac_onnx.disk.models import load_model, load_proto, save_model
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

ROWS, WIDTH = 5000, 64
"""Of a table of 1.28 MB: above the size from which tensors stay in their file."""

VERBS = """
import re, sys
from kfac_onnx.cli.main import main
from kfac_onnx.disk import models
models.LARGEST_FILE = 1 << 20
for line in sys.argv[1:]:
    code = main(line.split())
    assert code == 0, (line, code)
# Not getrusage: its peak counts the process that this one was forked from.
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def forward(folder: Path, rows: int, array: Any = None) -> Path:
    """Write a forward model whose table lies beside it, sparse where there is no array."""
    dtype = TensorProto.FLOAT if array is None else helper.np_dtype_to_tensor_dtype(array.dtype)
    table = TensorProto(name="table", data_type=dtype, dims=[rows, WIDTH])
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="table.data")
    with (folder / "table.data").open("wb") as file:
        file.truncate(rows * WIDTH * 4) if array is None else file.write(array.tobytes())
    weight = onnx.numpy_helper.from_array(np.linspace(-1, 1, WIDTH, dtype=np.float32)[:, None], "w")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Cast", ["x"], ["f"], to=1),
    ]
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["f", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [table, weight],
    )
    path = folder / "forward.onnx"
    opset = [helper.make_opsetid("", 18)]
    path.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())
    return path


def table_of(model: ir.Model) -> MappedTensor:
    tensor = model.graph.initializers["table"].const_value
    assert isinstance(tensor, MappedTensor)
    return tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("beside", [False, True])
def test_a_model_is_written_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, beside: bool
) -> None:
    array: Any = np.random.default_rng(0).normal(size=(2 * ROWS, WIDTH)).astype(dtype)
    model = load_model(forward(tmp_path, len(array), array))
    assert np.array_equal(table_of(model).numpy().view(np.uint8), array.view(np.uint8))
    assert table_of(model).tobytes() == array.tobytes()
    if beside:
        monkeypatch.setattr(models, "LARGEST_FILE", 1000)
    save_model(model, tmp_path / "copy.onnx")
    copy = load_proto(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx.data").exists() == beside
    original = load_proto(tmp_path / "forward.onnx")
    for item, other in zip(copy.graph.initializer, original.graph.initializer, strict=True):
        assert (item.name, item.data_type, item.dims) == (other.name, other.data_type, other.dims)
        assert item.raw_data == other.raw_data
    assert copy.graph.node == original.graph.node
    onnx.checker.check_model(str(tmp_path / "copy.onnx"), full_check=True)  # pyright: ignore[reportUnknownMemberType]  its PathLike has no parameter
    assert list(model.graph.initializers) == ["table", "w"]


def test_a_streamed_file_holds_the_message_that_protobuf_would_write(tmp_path: Path) -> None:
    path = forward(tmp_path, ROWS)
    save_model(load_model(path), tmp_path / "copy.onnx")
    written = onnx.ModelProto.FromString((tmp_path / "copy.onnx").read_bytes())
    assert written == ir.to_proto(load_model(path))


def test_a_full_disk_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(forward(tmp_path, ROWS))
    monkeypatch.setattr(models, "LARGEST_FILE", 1000)
    save_model(model, tmp_path / "copy.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed, "write_external", full)
    with pytest.raises(UserError) as caught:
        save_model(model, tmp_path / "copy.onnx")
    assert caught.value.message == f"'{tmp_path / 'copy.onnx'}' cannot be written: No space left on device"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_windows_say_is_what_numpy_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_WINDOW", 10_000)
    array = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
    tensor = table_of(load_model(forward(tmp_path, ROWS, array)))
    held = tensor.numpy()
    assert sum(len(piece) for (piece,) in windows(held)) == ROWS
    assert greatest(held) == np.max(np.abs(array))
    assert greatest(held.T) == greatest(array)
    assert equal(held, array)
    assert equal(held.T, array.T)
    other = array.copy()
    other[-1, -1] += 1
    assert not equal(held, other)
    assert not equal(held, array[1:])
    assert not all_same(held)
    other[:] = 3
    assert all_same(other)
    other[-1, -1] = 4
    assert not all_same(other)
    other[0, 0] = np.nan
    assert np.isnan(greatest(other))
    assert digest(tensor) == digest(ir.tensor(array))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux tells it")
def test_verbs_hold_no_weights(tmp_path: Path) -> None:
    """Before, one of 268 MB took 1.2 GB."""
    path, train, step = forward(tmp_path, 1 << 20), tmp_path / "train.onnx", tmp_path / "step.onnx"
    lines = [
        f"differentiate {path} --loss mse -o {train}",
        f"scan {train}",
        f"check {train}",
        f"why {train} table",
        f"transform {train} -o {step}",
        f"inspect {step}",
    ]
    run = subprocess.run(  # noqa: S603  this Python
        [sys.executable, "-c", VERBS, *lines], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "step.onnx.data").stat().st_size >= 1 << 28
    assert int(run.stdout.split()[-1]) < 240 << 10, run.stdout
