"""What `scan` finds in every model of a folder: one row per graph."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.api import Report, scan
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Row", "scan_folder"]

LOG: Final = logging.getLogger(__name__)
PATIENCE: Final = 2.0
"""Seconds after which what has been done is said again."""


@dataclass(frozen=True)
class Row:
    """One graph: its report, or the sentence that says why it cannot be read; `bug` if that is our fault."""

    graph: str
    report: Report | None
    error: str | None = None
    bug: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON data: the report's, with the graph's path and the error."""
        data: dict[str, Any] = {"graph": self.graph, "error": self.error}
        return data if self.report is None else {**data, **self.report.to_json()}


def scan_folder(folder: str | Path) -> list[Row]:
    """Scan every `*.onnx` in a folder and the folders in it, in the order of their paths.

    A file that cannot be read is a row with its error.

    Raises UserError when there is no model in it.
    """
    root = Path(folder)
    files = sorted(path for path in root.rglob("*.onnx") if path.is_file())
    if not files:
        raise UserError(
            f"the folder '{folder}' has no model", help="models are files with the ending .onnx, at any depth"
        )
    return list(_rows(root, files))


def _rows(root: Path, files: list[Path]) -> Iterator[Row]:
    said = time.monotonic()
    for done, path in enumerate(files):
        if time.monotonic() - said > PATIENCE:
            LOG.info("scanned %d of %d graphs", done, len(files))
            said = time.monotonic()
        yield _row(str(path.relative_to(root)), path)


def _row(name: str, path: Path) -> Row:
    try:
        return Row(name, scan(path))
    except UserError as error:
        return Row(name, None, error.message)
    except Exception as error:  # a bug of ours in one graph does not hide what holds for the others
        LOG.exception("scanning '%s' failed", name)
        return Row(name, None, f"{type(error).__name__}: {error}", bug=True)
