"""Writes a table in each format that is read, without the readers."""

from __future__ import annotations

import csv
import importlib
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from kfac_onnx.data.readers import READERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Table = dict[str, Any]
"""Columns as lists of Python's values."""


def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def _parquet(path: Path, table: Table) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow().table(table), path / "t.parquet", row_group_size=7)
    return path / "t.parquet"


def _arrow_file(path: Path, table: Table) -> Path:
    pytest.importorskip("pyarrow.feather").write_feather(
        arrow().table(table), path / "t.feather", chunksize=7
    )
    return path / "t.feather"


def _stream(path: Path, table: Table) -> Path:
    data = arrow().table(table)
    with importlib.import_module("pyarrow.ipc").new_stream(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=7)
    return path


def _arrow_stream(path: Path, table: Table) -> Path:
    return _stream(path / "t.arrow", table)


def _text(mark: str, name: str) -> Callable[[Path, Table], Path]:
    def write(path: Path, table: Table) -> Path:
        arrow()
        with (path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=mark)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
        return path / name

    return write


def _json_lines(path: Path, table: Table) -> Path:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    (path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path / "t.jsonl"


def _npz(path: Path, table: Table) -> Path:
    np.savez(path / "t.npz", **{name: np.array(values) for name, values in table.items()})
    return path / "t.npz"


def _npy(path: Path, table: Table) -> Path:
    for name, values in table.items():
        np.save(path / f"{name}.npy", np.array(values))
    return path


def _hugging_face(path: Path, table: Table) -> Path:
    """What `Dataset.save_to_disk` of datasets 3 writes: streams of Arrow's, and a state that names them."""
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    half = len(next(iter(table.values()))) // 2
    for name, rows in zip(names, (slice(0, half), slice(half, None)), strict=True):
        _stream(path / name, {column: values[rows] for column, values in table.items()})
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")
    return path


WRITERS: Final[dict[str, Callable[[Path, Table], Path]]] = {
    "a Parquet file": _parquet,
    "an Arrow file": _arrow_file,
    "an Arrow stream": _arrow_stream,
    "an .npz file": _npz,
    "a table of comma-separated values": _text(",", "t.csv"),
    "a table of tab-separated values": _text("\t", "t.tsv"),
    "a file of JSON lines": _json_lines,
    "a Hugging Face data set": _hugging_face,
    "a folder of .npy files": _npy,
}
REFUSING: Final = {"an .npy file", "a folder of data sets"}
"""Readers that only say what to name instead."""
FORMATS: Final = [reader.name for reader in READERS if reader.name not in REFUSING]
HAVE_LISTS: Final = ["a Parquet file", "an Arrow file", "an Arrow stream", "a file of JSON lines"]
HAVE_TEXTS: Final = [name for name in FORMATS if name != "a folder of .npy files" and name != "an .npz file"]
