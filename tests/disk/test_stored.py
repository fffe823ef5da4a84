"""Arrays in files: read piece by piece, and refused where the file does not hold what it says."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kfac_onnx.disk import stored
from kfac_onnx.disk.stored import npz_arrays, safetensors_arrays
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

VALUES = {
    "table": np.arange(42, dtype=np.float32).reshape(7, 6),
    "ids": np.array([3, -1], np.int64),
    "scalar": np.array(2.5),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float16),
}


def written(path: Path, kind: str) -> dict[str, Any]:
    if kind == "safetensors":
        save_file(VALUES, path)
        return safetensors_arrays(path)[0]
    (np.savez if kind == "npz" else np.savez_compressed)(path, **VALUES)
    return npz_arrays(path)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed"])
@pytest.mark.parametrize("piece", [5, 1 << 24])
def test_arrays_come_back(tmp_path: Path, kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE", piece)  # a piece may end within an entry
    arrays = written(tmp_path / f"w.{kind[:11].replace('compressed', 'npz')}", kind)
    assert arrays.keys() == VALUES.keys()
    for name, want in VALUES.items():
        array = arrays[name]
        assert (array.shape, array.dtype, array.nbytes, array.ndim) == (
            want.shape,
            want.dtype,
            want.nbytes,
            want.ndim,
        )
        target = np.full(want.shape, 9, want.dtype)
        array.read_into(target)
        np.testing.assert_array_equal(target, want)
        np.testing.assert_array_equal(np.asarray(array), want)
        assert b"".join(bytes(part) for part in array.pieces()) == want.tobytes()


def test_bfloat16(tmp_path: Path) -> None:
    bits = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    header = json.dumps({"b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "b.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    np.testing.assert_array_equal(np.asarray(safetensors_arrays(path)[0]["b"]), bits)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(VALUES, path)
    array = safetensors_arrays(path)[0]["table"]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError) as caught:
        np.asarray(array)
    assert caught.value.message == f"'{path}' is cut short: it ends within an array"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "tensor 'x' does not lie within the file"),
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, "tensor 'x' does not lie within the file"),
        (
            {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
            "tensor 'x' is of no shape that an array can have: it has a negative dimension",
        ),
        (
            {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]},
            "tensor 'x' is of no shape that an array can have: array is too big",
        ),
        (
            {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]},
            "tensor 'x' is of no shape that an array can have: maximum supported dimension",
        ),
        *(
            (
                {"dtype": "F32", "shape": [odd], "data_offsets": [0, 4]},
                "tensor 'x' is of no shape that an array can have: a dimension is no whole number",
            )
            for odd in (True, 1.0, "1", None)
        ),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "tensor 'x' does not lie within the file"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "the entry of tensor 'x' is not readable"),
        ({"shape": [2], "data_offsets": [0, 8]}, "the entry of tensor 'x' is not readable"),
        ([1, 2], "the entry of tensor 'x' is not readable"),
    ],
)
def test_entries_that_lie(tmp_path: Path, entry: Any, message: str) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=message):
        safetensors_arrays(path)


@pytest.mark.parametrize(
    "data", [b"", b"123", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", b"\xff" * 64]
)
def test_files_that_are_no_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"header|JSON|Expecting"):
        safetensors_arrays(path)


def test_npz_refuses_objects_and_reads_columns(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", o=np.array([{}], object))
    with pytest.raises(UserError, match=r"array 'o\.npy' holds Python objects"):
        npz_arrays(tmp_path / "o.npz")
    np.savez(tmp_path / "f.npz", f=np.asfortranarray(VALUES["table"]))
    np.testing.assert_array_equal(npz_arrays(tmp_path / "f.npz")["f"], VALUES["table"])
