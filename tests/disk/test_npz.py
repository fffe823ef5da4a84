"""Archives of arrays: pickles, lying headers and bombs are refused before anything of their size is made."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.disk import memory
from kfac_onnx.disk.npz import npz_headers, read_npz
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.saved.weights import stored_weights

if TYPE_CHECKING:
    from pathlib import Path

READERS = (
    npz_headers,
    read_npz,
    stored_weights,
    lambda path: Batches(path, 1),
    lambda path: Batches(path.parent, 1),
)


def archive(folder: Path, header: str, data: bytes = b"", name: str = "ids.npy") -> Path:
    text = header.encode()
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, member)
    return folder / "a.npz"


def described(shape: str, descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("header", "said"),
    [
        (described("(1099511627776, 1024)"), "holds 8 bytes instead of 4503599627370496"),
        (described("(1099511627776, 4)", order="True"), "holds 8 bytes instead of"),
        (described("(3,)"), "array 'ids.npy' of shape [3] holds 8 bytes instead of 12"),
        (described("(-1, 4)"), "negative dimension"),
        (
            described("(4611686018427387904, 0)"),
            "array 'ids.npy' is of no shape that an array can have: array is too big",
        ),
        (described("(0, 4611686018427387904, 4611686018427387904)"), "is of no shape that an array can have"),
        (described("(0, 9223372036854775808)"), "is of no shape that an array can have: "),
        (described(f"({'1,' * 70})"), "is of no shape that an array can have: maximum supported dimension"),
        (described("(True,)"), "is of no shape that an array can have: a dimension is no whole number"),
        (
            described("(2, True)", "'|i1'"),
            "is of no shape that an array can have: a dimension is no whole number",
        ),
        (described("(1,)", "'|O'"), "array 'ids.npy' holds Python objects"),
        (described("(1,)", "[('a', '|O')]"), "array 'ids.npy' holds Python objects"),
        ("__import__('os').abort()", ""),
        ("(" * 9000, "header"),
        ("{" * 9000, "header"),
        ("[" * 900 + "]" * 900, "header"),
    ],
)
def test_a_lying_header(tmp_path: Path, read: object, header: str, said: str) -> None:
    path = archive(tmp_path, header, b"\0" * 8)
    with pytest.raises(UserError) as caught:
        read(path)  # type: ignore[operator]
    assert caught.value.message.startswith(f"'{path}' is not a readable .npz file: ")
    assert said in caught.value.message


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    np.savez(tmp_path / "a.npz", ids=np.array([Trap()], object))
    for read in READERS:
        with pytest.raises(UserError, match="Python objects"):
            read(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.array([Trap()], object))
    (tmp_path / "b.npy").rename(tmp_path / "a.npz")
    for read in READERS:
        with pytest.raises(UserError, match=r"is a single array, and arrays are read from \.npz files"):
            read(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", ids=np.zeros((1000, 1000), np.float32))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    assert read_npz(tmp_path / "a.npz")["ids"].shape == (1000, 1000)
    monkeypatch.setattr(memory, "machine_memory", lambda: 3_999_999)
    with pytest.raises(UserError, match="needs 4,000,000 bytes of memory, and this machine has 3,999,999"):
        read_npz(tmp_path / "a.npz")


def test_an_archive_that_lies_about_its_entry(tmp_path: Path) -> None:
    path = archive(tmp_path, described("(100000,)"), b"\0" * 400_000)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)
    assert read_npz(path)["ids"].shape == (100_000,)  # what it holds, however much it claims
    data[entry + 24 : entry + 28] = struct.pack("<I", 150)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"CRC|holds \d+ bytes instead of 400000"):
        read_npz(path)


def test_sound_archives_are_read(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.ones((2, 3))), "c": np.array(1)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    (tmp_path / "a.npz").write_bytes(file.getvalue())
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
