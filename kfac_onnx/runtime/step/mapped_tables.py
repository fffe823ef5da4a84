"""Tables that are trained in their files: the mapping of the file is the buffer that the commit stage writes.

A folder holds one safetensors file per table, whose data begin at a page, and `tables.json`, which says
whether the files are what a run left at its end (`closed`) or a run is changing them (`open`). All else of a
step (counts, factors, dense parameters) is in memory, so after a kill the tables alone are rows of different
steps and of no use: a folder that stands `open` without a run is refused, and written anew from a checkpoint.

Blocks of the disk are reserved when a file is opened: on a full disk a write to a mapping is a signal that
ends the process (SIGBUS), no error. https://man7.org/linux/man-pages/man2/mmap.2.html
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import numpy as np

from kfac_onnx.disk.atomic import atomic_path
from kfac_onnx.disk.memory import available_memory
from kfac_onnx.disk.stored import PIECE, StoredArray, bytes_of, safetensors_arrays
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.runtime.step.tensors import Buffer, host_value, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kfac_onnx.disk.stored import Array
    from kfac_onnx.metadata import State

__all__ = ["MARK", "MappedBuffer", "MappedTables", "TableOnDisk", "table_file", "tables_on_disk"]

MARK: Final = "tables.json"
_PAGE: Final = 4096
_MOST: Final = 1 << 30
"""Bytes of files that may be resident: beyond, pages are given back to the system, which caches them."""
_NAMES: Final = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}


def table_file(folder: str | Path, parameter: str) -> Path:
    """Return the file of a table: its name, with what no file may have in its name written as %XX."""
    return Path(folder) / f"{quote(parameter, safe='')}.safetensors"


@dataclass(frozen=True)
class TableOnDisk:
    """A table's file: its tensor, the bytes that it takes on the disk, and whether a run is changing it."""

    parameter: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    on_disk: int
    state: Literal["open", "closed"]

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        return {**asdict(self), "path": str(self.path), "shape": list(self.shape)}


def tables_on_disk(folder: str | Path) -> list[TableOnDisk]:
    """Return the tables that sessions train, or have trained, in the files of a folder; none elsewhere.

    Raises UserError where one of its files cannot be read.
    """
    place = Path(folder)
    if not (place / MARK).is_file():
        return []
    state: Literal["open", "closed"] = "open" if _state_of(place).get("state") == "open" else "closed"
    results: list[TableOnDisk] = []
    for path in sorted(place.glob("*.safetensors")):
        try:
            arrays = safetensors_arrays(path)[0]
        except (OSError, ValueError) as e:
            raise UserError(f"'{path}' is not a readable .safetensors file: {first_line(e)}") from e
        about = path.stat()
        on_disk = getattr(about, "st_blocks", about.st_size // 512) * 512
        for name, array in arrays.items():
            entry = TableOnDisk(name, path, array.shape, str(array.dtype), array.nbytes, on_disk, state)
            results.append(entry)
    return results


def _state_of(folder: Path) -> dict[str, Any]:
    """Return what a folder of tables says of its run; nothing where none says anything."""
    try:
        state = json.loads((folder / MARK).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(
            f"'{folder / MARK}' cannot be read: {first_line(e)}",
            help="delete the folder, or give another one",
        ) from e
    return state if isinstance(state, dict) else {}  # pyright: ignore[reportUnknownVariableType]  JSON


class MappedBuffer(Buffer):
    """A table's buffer on the CPU that is the mapping of its file."""

    def __init__(self, path: Path, stored: StoredArray, element: int) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
            self.mapping = mmap.mmap(descriptor, 0)
        except OSError as e:
            raise UserError(f"the table file '{path}' cannot be used: {e.strerror or e}") from e
        finally:
            os.close(descriptor)
        self.path, self.stored = path, stored
        self.element, self.shape = element, tuple(stored.shape)
        flat: np.ndarray = np.frombuffer(self.mapping, np.uint8, stored.nbytes, stored.offset)
        self.array: np.ndarray | None = flat.view(numpy_dtype(element)).reshape(self.shape)
        self.value = host_value(self.array, element)
        self.row_bytes = max(1, stored.nbytes // max(1, self.shape[0]))
        self.random = stored.nbytes > available_memory()
        self._advise("MADV_RANDOM" if self.random else "MADV_NORMAL")

    def _advise(self, name: str, start: int = 0, length: int | None = None) -> None:
        option = getattr(mmap, name, None)
        if option is not None:
            self.mapping.madvise(option, start, len(self.mapping) - start if length is None else length)

    def hint(self, ids: np.ndarray) -> None:
        """Have the system read the rows of some ids, in [-V, V), while other work is done."""
        rows = np.unique(np.where(ids < 0, ids + self.shape[0], ids).reshape(-1))
        rows = rows[(rows >= 0) & (rows < self.shape[0])]  # a wrong id is said by the step
        starts = (self.stored.offset + rows * self.row_bytes) // _PAGE
        ends = (self.stored.offset + (rows + 1) * self.row_bytes - 1) // _PAGE + 1
        if not len(starts):
            return
        breaks = np.flatnonzero(starts[1:] > ends[:-1]) + 1  # pages that touch are one request
        first = starts[np.concatenate(([0], breaks))]
        last = ends[np.concatenate((breaks - 1, [len(ends) - 1]))]
        size = len(self.mapping)
        for start, end in zip((first * _PAGE).tolist(), (last * _PAGE).tolist(), strict=True):
            self._advise("MADV_WILLNEED", start, min(end, size) - start)

    def give_back(self) -> None:
        """Let the pages of the mapping count as the system's: of a shared mapping nothing is lost."""
        self._advise("MADV_DONTNEED")

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        self.mapping.flush()


class MappedTables:
    """The tables of a session that are trained in the files of a folder.

    `replace` says that the given values are written over what is in the folder, as a resumed run does.
    """

    def __init__(self, folder: str | Path, *, replace: bool = False) -> None:
        self.folder = Path(folder)
        self.replace = replace
        self.buffers: dict[str, MappedBuffer] = {}
        self._new: list[Path] = []

    def require_usable(self) -> None:
        """Raise UserError for a folder that a killed run left."""
        state = _state_of(self.folder)
        if state.get("state") == "open" and not self.replace:
            raise UserError(
                f"the tables in '{self.folder}' are half trained: process {state.get('pid')} on "
                f"{state.get('host')} ended without closing them, with rows of different steps",
                help="go on from its checkpoint, which writes them anew: "
                "TrainingSession.resume(..., tables_in=...), or train --resume --tables-in; "
                "or delete the folder",
            )

        if self.replace:
            self.begin()

    def begin(self) -> None:
        """Mark the files as those of a run, before it changes them."""
        self._mark("open")

    def abandon(self) -> None:
        """Delete the files that were made, where the session could not be opened."""
        self.buffers.clear()
        for path in self._new:
            path.unlink(missing_ok=True)

    def open(
        self, state: State, given: Array | None, element: int, check: Callable[[np.ndarray], None]
    ) -> MappedBuffer:
        """Return the buffer of a table with the given value, or with that of its file where none is given.

        Raises UserError where there is neither, or both; where the file is another table's, or the disk full.
        """
        path = table_file(self.folder, state.input)
        if given is None and not path.exists():
            raise UserError(
                f"parameter '{state.input}' has no value",
                help=f"give it in parameters= (or --parameters FILE), or as the file '{path}'",
            )
        if given is not None:
            if path.exists() and not self.replace:
                raise UserError(
                    f"'{path}' is there already, and the table '{state.input}' is given a value as well",
                    help="resume the run that wrote it, delete the file, or give another folder",
                )
            if not path.exists():
                self._new.append(path)
            _write(path, state.input, given, element, check)
        try:
            stored = safetensors_arrays(path)[0].get(state.input)
        except (OSError, ValueError) as e:
            raise UserError(f"'{path}' is not a readable .safetensors file: {first_line(e)}") from e
        wanted = numpy_dtype(element)
        if stored is None or (tuple(stored.shape), stored.dtype) != (tuple(state.shape), wanted):
            what = (
                "holds no tensor of that name"
                if stored is None
                else f"holds {list(stored.shape)} {stored.dtype}"
            )
            raise UserError(
                f"'{path}' does not fit the table '{state.input}', {list(state.shape)} {wanted}: it {what}"
            )
        if stored.offset % wanted.itemsize:
            raise UserError(
                f"the data of '{path}' begin at byte {stored.offset}, which is no multiple of "
                f"{wanted.itemsize}",
                help="give its values in parameters= (or --parameters FILE) once, and an empty folder",
            )
        buffer = self.buffers[state.input] = MappedBuffer(path, stored, element)
        return buffer

    def _mark(self, state: str, **more: int) -> None:
        entry = {"state": state, "host": socket.gethostname(), "pid": os.getpid(), **more}
        with atomic_path(self.folder / MARK) as temporary:
            temporary.write_text(json.dumps(entry))

    def hint(self, ids: Mapping[str, np.ndarray]) -> None:
        """Have the rows of the next batch read, by table."""
        for name, array in ids.items():
            if name in self.buffers:
                self.buffers[name].hint(array)

    def after_step(self) -> None:
        """Give pages back where many files' are resident."""
        if sum(buffer.nbytes for buffer in self.buffers.values()) > _MOST and _resident_files() > _MOST:
            for buffer in self.buffers.values():
                buffer.give_back()

    def close(self, committed: int) -> None:
        """Write everything to the disk, and mark it as whole after so many steps."""
        for buffer in self.buffers.values():
            buffer.flush()
        if self.buffers:
            self._mark("closed", steps=committed)
        self.buffers.clear()


def _resident_files() -> int:
    """Return the bytes of files that are resident in this process; 0 where the system does not tell."""
    try:
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[2]) * _PAGE
    except OSError:
        return 0


def _write(path: Path, name: str, given: Array, element: int, check: Callable[[np.ndarray], None]) -> None:
    """Write a table's file in pieces, its data at the second page or later; holes of a file stay holes."""
    shape, dtype = tuple(given.shape), numpy_dtype(element)
    size = math.prod(shape) * dtype.itemsize
    entry = {name: {"dtype": _NAMES[str(dtype)], "shape": list(shape), "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    header += b" " * (-(8 + len(header)) % _PAGE)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        file.truncate(start + size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, start + size)
        place = 0
        pieces = given.pieces() if isinstance(given, StoredArray) else _pieces(np.asarray(given))
        for piece in pieces:
            check(np.frombuffer(piece, dtype))
            file.seek(start + place)
            file.write(piece)
            place += len(piece)


def _pieces(array: np.ndarray) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    count = PIECE // flat.dtype.itemsize
    return (bytes_of(flat[start : start + count]) for start in range(0, flat.size, count))
