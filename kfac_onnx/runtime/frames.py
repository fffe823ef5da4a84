"""Metrics of a run as a pandas frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from kfac_onnx.errors import UserError
from kfac_onnx.errors.signatures import checked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pandas import DataFrame

    from kfac_onnx.runtime.fitting import Row

__all__ = ["metrics_frame"]

_COLUMNS: Final = frozenset({"position", "step", "loss", "skipped", "lr", "held_out"})
"""What each row has; some have more."""


@checked
def metrics_frame(rows: Iterable[Row] | str | Path) -> DataFrame:
    """Return the metrics of a run as a frame with a row per step, indexed by `position`.

    Columns are those of `Row`: `step` int64, `loss`, `lr` and `held_out` float64 with NaN for null, `skipped`
    bool, `skip` a text with the causes of a skipped step, empty for others.

    Args:
        rows: what `fit(metrics=rows.append)` collected, or a file of JSON lines that a run wrote.

    Raises:
        UserError: pandas is missing, or a line of the file is no row of metrics.

    """
    try:
        import pandas as pd  # its stubs in typings/ name what is used here
    except ImportError as e:
        raise UserError("metrics_frame needs pandas", help="pip install 'kfac-onnx[pandas]'") from e
    rows = list(_lines(Path(rows))) if isinstance(rows, (str, Path)) else [_row(row) for row in rows]
    numbers = {name: [_number(cast("Any", row)[name]) for row in rows] for name in ("loss", "lr", "held_out")}
    return pd.DataFrame(
        {
            "step": pd.Series([row["step"] for row in rows], dtype="int64"),
            "loss": pd.Series(numbers["loss"], dtype="float64"),
            "skipped": pd.Series([row["skipped"] for row in rows], dtype="bool"),
            "lr": pd.Series(numbers["lr"], dtype="float64"),
            "held_out": pd.Series(numbers["held_out"], dtype="float64"),
            "skip": pd.Series(["; ".join(row.get("skip", ())) for row in rows], dtype="object"),
        }
    ).set_index(pd.Index([row["position"] for row in rows], dtype="int64", name="position"))


def _row(row: object) -> Row:
    """Return a row; UserError where it is none."""
    if not isinstance(row, dict) or not set(cast("dict[str, Any]", row)) >= _COLUMNS:
        kind = type(cast("object", row)).__name__
        raise UserError(
            f"rows of metrics are what fit(metrics=rows.append) collects, not {kind}",
            help=f"each is a dict with {', '.join(sorted(_COLUMNS))}",
        )
    return cast("Row", row)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _lines(path: Path) -> Iterator[Row]:
    """Return the rows of a file; UserError where a line is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        raise UserError(f"metrics cannot be read from '{path}': {reason or e}") from e
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(cast("dict[str, Any]", row)) >= _COLUMNS:
            raise UserError(
                f"line {number} of '{path}' is no row of metrics",
                help="a killed run may leave half a line: delete it",
            )
        yield cast("Row", row)
