"""The formats that are read, and how the one of a file is told: by its first bytes, else by its name."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.data.formats.arrays import open_npy_folder, open_npz, refuse_single_npy
from kfac_onnx.data.formats.delimited import open_csv, open_tsv
from kfac_onnx.data.formats.ipc import open_arrow, open_saved_dataset, open_splits, open_stream
from kfac_onnx.data.formats.json_rows import open_json_lines
from kfac_onnx.data.formats.parquet import open_parquet
from kfac_onnx.data.source import Joined, Reader
from kfac_onnx.disk.conversions import conversion_of
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.data.source import Source, Types

__all__ = ["READERS", "files_of", "is_npz", "is_typed", "open_files", "reader_of"]

READERS: Final = (
    Reader("a Parquet file", (".parquet", ".pq"), open_parquet, beginning=b"PAR1", extra="data"),
    Reader("an Arrow file", (".arrow", ".feather"), open_arrow, beginning=b"ARROW1", extra="data"),
    Reader("an Arrow stream", (".arrows",), open_stream, beginning=b"\xff\xff\xff\xff", extra="data"),
    Reader("an .npz file", (".npz",), open_npz, beginning=b"PK\x03\x04"),
    Reader("an .npy file", (".npy",), refuse_single_npy, beginning=b"\x93NUMPY"),
    Reader("a table of comma-separated values", (".csv",), open_csv, extra="data", typed=True),
    Reader("a table of tab-separated values", (".tsv", ".tab"), open_tsv, extra="data", typed=True),
    Reader("a file of JSON lines", (".jsonl", ".ndjson"), open_json_lines),
    Reader("a folder of data sets", (), open_splits, marker="dataset_dict.json"),
    Reader("a Hugging Face data set", (), open_saved_dataset, marker="state.json", extra="data"),
    Reader("a folder of .npy files", (), open_npy_folder, marker="*.npy"),
)
"""Beginnings come before names: the first that fits is taken."""

_SUFFIXES: Final = {suffix: reader for reader in READERS for suffix in reader.suffixes}
_ZIP: Final = next(reader for reader in READERS if reader.name == "an .npz file")


def reader_of(path: Path) -> Reader | None:
    """Return the reader of a file, or of a folder that is one data set; None where there is none."""
    if path.is_dir():
        return next(
            (item for item in READERS if item.marker is not None and any(path.glob(item.marker))), None
        )
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return None
    told = next((item for item in READERS if item.beginning and start.startswith(item.beginning)), None)
    named = _SUFFIXES.get(path.suffix.lower())
    # Many formats are zip archives: the name decides among them.
    return named if told is None or (told is _ZIP and named is not None) else told


def files_of(text: str | Path) -> list[Path]:
    """Return the files that a path or a pattern names, in the order of their names; a data set's own folder.

    Raises UserError where nothing is there, or a folder holds nothing that can be read.
    """
    path = Path(text)
    if path.is_dir() and reader_of(path) is None:
        # Such as `_SUCCESS` and `.part-0.parquet.crc` beside what Spark writes.
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] not in "._")
        files = [file for file in files if file.suffix.lower() in _SUFFIXES]
        if not files:
            raise _nothing_in(path)
        return files
    if path.exists():
        return [path]
    files = sorted(Path(name) for name in glob.glob(str(text), recursive=True))  # noqa: PTH207  absolute patterns
    if not files:
        raise UserError(f"there is no file '{text}'")
    return files


def _nothing_in(folder: Path) -> UserError:
    other = conversion_of(folder)
    if other is not None:
        return UserError(f"'{folder}' is {other[0]}, which is not read", help=f"convert it: {other[1]}")
    suffixes = ", ".join(suffix for reader in READERS for suffix in reader.suffixes)
    return UserError(
        f"the folder '{folder}' holds no file of a format that is read", help=f"they are {suffixes}"
    )


def is_npz(files: Sequence[Path]) -> bool:
    """Say whether all files are `.npz` files."""
    return all(reader_of(file) is _ZIP for file in files)


def is_typed(file: Path) -> bool:
    """Say whether the types of a file's columns are those of the inputs that they fill."""
    reader = reader_of(file)
    return reader is not None and reader.typed


def open_files(files: Sequence[Path], types: Types) -> Source:
    """Return the rows of files of one format.

    Raises UserError for formats that are not read, with the line that converts them, and for several formats.
    """
    readers = {file: _required(file) for file in files}
    first = readers[files[0]]
    for file, reader in readers.items():
        if reader is not first:
            raise UserError(
                f"'{files[0]}' is {first.name} and '{file}' is {reader.name}: data are of one format",
                help=f"give a pattern: --data '{files[0].parent / ('*' + files[0].suffix)}'",
            )
    if len(files) == 1:
        return first.open(files[0], types)
    return Joined({str(file): first.open(file, types) for file in files})


def _required(path: Path) -> Reader:
    reader = reader_of(path)
    if reader is not None:
        return reader
    other = conversion_of(path)
    if other is not None:
        raise UserError(f"'{path}' is {other[0]}, which is not read", help=f"convert it: {other[1]}")
    suffixes = ", ".join(suffix for reader in READERS for suffix in reader.suffixes)
    raise UserError(f"the format of '{path}' cannot be told", help=f"what is read ends in {suffixes}")
