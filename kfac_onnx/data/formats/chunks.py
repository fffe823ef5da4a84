"""Files of lines in pieces of some megabytes, each of whole records: found in one pass over the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Chunk", "chunks_of", "read_chunk"]

SIZE: Final = 1 << 22
"""Bytes after which a piece ends with its record."""
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


@dataclass(frozen=True)
class Chunk:
    """Bytes `start` to `end` of a file: `rows` records, the first of which begins in line `line` (from 1)."""

    start: int
    end: int
    rows: int
    line: int


def chunks_of(path: Path, *, quoted: bool, begin: int = 0, first_line: int = 1) -> list[Chunk]:
    """Return the pieces of a file of records, one per line; empty lines are none.

    With `quoted` a line's end between quotes is part of the record (RFC 4180, section 2.6,
    https://www.rfc-editor.org/rfc/rfc4180#section-2): a doubled quote opens and closes, so that parity tells.
    """
    chunks: list[Chunk] = []
    start = position = begin
    rows, line, lines = 0, first_line, 0
    open_quote = False
    length = 0  # of the record so far, without its line's end
    try:
        with path.open("rb") as file:
            file.seek(begin)
            while block := file.read(SIZE):
                data = np.frombuffer(block, np.uint8)
                newlines: np.ndarray[Any, np.dtype[np.bool_]] = np.equal(data, _NEWLINE)
                lines_here = np.flatnonzero(newlines)
                ends = lines_here
                if quoted:
                    odd: np.ndarray[Any, np.dtype[np.bool_]] = (
                        np.cumsum(np.equal(data, _QUOTE)) + open_quote
                    ) % 2 == 1
                    ends = np.flatnonzero(newlines & ~odd)
                    open_quote = bool(odd[-1])
                # A record is empty where nothing but a carriage return stands before its end.
                text: np.ndarray[Any, np.dtype[np.bool_]] = ~newlines & np.not_equal(data, _RETURN)
                solid = _running(text)
                if len(ends):
                    sizes = np.diff(solid[ends], prepend=0)
                    sizes[0] += length
                    rows += int(np.count_nonzero(sizes))
                    length = int(text[int(ends[-1]) + 1 :].sum())
                    end = position + int(ends[-1]) + 1
                    inside = len(lines_here[lines_here <= ends[-1]])
                    lines += inside
                    if rows:
                        chunks.append(Chunk(start, end, rows, line))
                    line, start, rows = line + lines, end, 0
                    lines = len(lines_here) - inside
                else:
                    length += int(text.sum())
                    lines += len(lines_here)
                position += len(block)
    except OSError as e:
        raise _unreadable(path, e) from e
    if length:
        chunks.append(Chunk(start, position, 1, line))
    if open_quote:
        raise UserError(f"a quote that opens in '{path}' never closes", place=f"{path}, from line {line} on")
    return chunks


def _running(true: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return how many are true up to each place."""
    return np.cumsum(true, dtype=np.int64)


def read_chunk(path: Path, chunk: Chunk) -> bytes:
    """Return the bytes of a piece; raises UserError where the file has become shorter."""
    try:
        with path.open("rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.end - chunk.start)
    except OSError as e:
        raise _unreadable(path, e) from e
    if len(data) < chunk.end - chunk.start:
        raise UserError(f"'{path}' has become shorter while it was read")
    return data


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"'{path}' cannot be read: {first_line(error)}")
