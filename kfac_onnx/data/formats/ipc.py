"""Arrow's files (also called Feather, version 2) and streams, and Hugging Face's folders of them.

A piece of a file is a record batch; a stream has no index, so each is one piece.

Source: Apache Arrow IPC, https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
Source: `Dataset.save_to_disk`, https://huggingface.co/docs/datasets/package_reference/main_classes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kfac_onnx.data.arrow import DAMAGE, block_of, pyarrow
from kfac_onnx.data.source import Joined
from kfac_onnx.disk.records import parse
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source, Types

__all__ = ["open_arrow", "open_saved_dataset", "open_splits", "open_stream"]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' is not a readable Arrow file: {first_line(error)}")


class ArrowFile:
    """A file of record batches with an index."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with pyarrow("pyarrow.ipc").open_file(str(path)) as reader:
                self.names: tuple[str, ...] = tuple(reader.schema.names)
            # One column tells the number of rows; the others need not be decompressed.
            with self._opened(self.names[:1]) as reader:
                count = reader.num_record_batches
                self.rows: list[int] = [reader.get_batch(index).num_rows for index in range(count)]
        except DAMAGE as e:
            raise _unreadable(path, e) from e

    def _opened(self, columns: Sequence[str]) -> Any:
        ipc = pyarrow("pyarrow.ipc")
        fields = sorted(self.names.index(name) for name in columns)
        return ipc.open_file(str(self._path), options=ipc.IpcReadOptions(included_fields=fields))

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield a record batch."""
        try:
            with self._opened(columns) as reader:
                batch = reader.get_batch(piece)
                batch.validate(full=True)  # offsets of a damaged file may lie outside of it
                yield block_of(batch, columns, f"'{self._path}'")
        except DAMAGE as e:
            raise _unreadable(self._path, e) from e


class ArrowStream:
    """A stream of record batches in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with pyarrow("pyarrow.ipc").open_stream(str(path)) as reader:
                self.names: tuple[str, ...] = tuple(reader.schema.names)
                self.rows: list[int] = [sum(batch.num_rows for batch in reader)]
        except DAMAGE as e:
            raise _unreadable(path, e) from e

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the record batches."""
        try:
            with pyarrow("pyarrow.ipc").open_stream(str(self._path)) as reader:
                for batch in reader:
                    batch.validate(full=True)
                    yield block_of(batch, columns, f"'{self._path}'")
        except DAMAGE as e:
            raise _unreadable(self._path, e) from e


def open_arrow(path: Path, types: Types) -> Source:
    """Return the source of an Arrow file; its types are its own."""
    return ArrowFile(path)


def open_stream(path: Path, types: Types) -> Source:
    """Return the source of an Arrow stream in a file."""
    return ArrowStream(path)


def open_saved_dataset(path: Path, types: Types) -> Source:
    """Return the source of a folder that Hugging Face's `Dataset.save_to_disk` wrote.

    Raises UserError where it does not say its files, or one of them lies elsewhere.
    """
    state = path / "state.json"
    try:
        data: Any = parse(state.read_text(encoding="utf-8"))
        files = [str(entry["filename"]) for entry in data["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"'{state}' does not say which files the data set is made of: {first_line(e)}") from e
    for file in files:
        if (path / file).resolve().parent != path.resolve():
            raise UserError(f"'{state}' names a file outside of its folder: '{file}'")
    if not files:
        raise UserError(f"the data set '{path}' holds no rows")
    return Joined({str(path / file): ArrowStream(path / file) for file in files})


def open_splits(path: Path, types: Types) -> Source:
    """Raise UserError about a folder of several data sets, which names them."""
    splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
    names = ", ".join(f"'{name}'" for name in splits) or "none"
    raise UserError(
        f"'{path}' is a folder of data sets ({names})",
        help=f"name one of them: --data {path / splits[0]}" if splits else None,
    )
