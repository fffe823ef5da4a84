"""JSON lines that are added to a file one by one: a line is whole, or it is not there.

JSON (RFC 8259, section 6, https://www.rfc-editor.org/rfc/rfc8259#section-6) has no NaN and no infinity: such
numbers are null.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["json_lines", "plain_json"]


def plain_json(data: Any) -> Any:
    """Return data as JSON has them: keys are texts, numbers that are not finite are null."""
    if isinstance(data, Mapping):
        return {str(key): plain_json(value) for key, value in data.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  any JSON object
    if isinstance(data, (list, tuple)):
        return [plain_json(value) for value in data]  # pyright: ignore[reportUnknownVariableType]  any JSON list
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


@contextlib.contextmanager
def json_lines(path: str | Path, what: str) -> Generator[Callable[[Mapping[str, object]], None]]:
    """Yield what adds a line to a file, at once: what a full disk does not take shows at its step.

    Lines that are there stay; after one that a killed run left without its end, a new line is begun. Half a
    line that a full disk took is removed. `what` is the subject of the errors' sentences, in the plural.

    Raises UserError when the file cannot be written.
    """

    def refusal(error: OSError) -> UserError:
        return UserError(f"{what} cannot be written to '{path}': {error.strerror or error}")

    try:
        file = Path(path).open("ab", buffering=0)  # noqa: SIM115  closed below
    except OSError as e:
        raise refusal(e) from e
    with file:

        def write(row: Mapping[str, object]) -> None:
            try:
                _add(file, f"{json.dumps(plain_json(row), allow_nan=False)}\n".encode())
            except OSError as e:
                raise refusal(e) from e

        try:
            if _ends_within_a_line(Path(path), file):
                _add(file, b"\n")
        except OSError as e:
            raise refusal(e) from e
        yield write


def _add(file: BinaryIO, line: bytes) -> None:
    taken = file.write(line)
    if taken < len(line):
        if file.seekable():
            file.truncate(file.tell() - taken)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _ends_within_a_line(path: Path, file: BinaryIO) -> bool:
    if not path.is_file() or file.seek(0, os.SEEK_END) == 0:
        return False
    with path.open("rb") as reader:
        reader.seek(-1, os.SEEK_END)
        return reader.read(1) != b"\n"
