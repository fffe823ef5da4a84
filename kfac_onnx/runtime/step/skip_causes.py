"""A tensor of a skipped step that was not finite: what is wrong with it in words, and what to do about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Cause", "Kind", "advice", "look_at", "overflow", "reasons"]

Kind = Literal[
    "input",
    "constant",
    "parameter",
    "loss",
    "prediction",
    "gradient",
    "factor",
    "damping",
    "root",
    "update",
    "state",
]

PIECE: Final = 1 << 22
"""Entries that are looked at at once, so that a large table needs no mask of its own size."""

SHOWN: Final = 3
"""Causes in a line of the log."""

_WORDS: Final[Mapping[Kind, str]] = {
    "input": "batch input",
    "constant": "constant",
    "parameter": "parameter",
    "loss": "loss",
    "prediction": "prediction",
    "gradient": "gradient of",
    "factor": "new factor",
    "damping": "damping of the factor of",
    "root": "inverse root",
    "update": "update of",
    "state": "new state",
}


@dataclass(frozen=True)
class Cause:
    """One tensor that was not finite.

    `bad` of `total` entries (with `rows`: rows) are not; `index` is the first of them, `id` the table row
    that it belongs to. `what` is `NaN`, `infinite`, `not finite` (some of each), or `sum` where every entry
    is finite but their sum is beyond float32, which the step's check takes for the same.
    """

    kind: Kind
    name: str
    what: Literal["NaN", "infinite", "not finite", "sum"]
    bad: int
    total: int
    index: tuple[int, ...] = ()
    rows: bool = False
    id: int | None = None
    largest: float = 0.0

    def __str__(self) -> str:
        """Return the cause as part of a sentence, in the graph's own names."""
        subject = _WORDS[self.kind] + (f" '{self.name}'" if self.kind != "loss" else "")
        if self.what == "sum":
            return f"{subject}: entries up to {self.largest:.3g}, whose sum is beyond float32"
        if self.total == 1 and not self.rows:
            return f"{subject} is {self.what}"
        unit = ("row" if self.rows else "entry") if self.total == 1 else ("rows" if self.rows else "entries")
        verb = "is" if self.bad == 1 else "are"
        if self.rows:
            row = "" if self.id is None else f", id {self.id}"
            where = f"lookup {self.index[0]}{row}"
        else:
            where = f"[{', '.join(map(str, self.index))}]"
        first = "at" if self.bad == 1 else "the first at"
        return f"{subject}: {self.bad} of {self.total} {unit} {verb} {self.what}, {first} {where}"

    def to_json(self) -> dict[str, object]:
        """Return the cause as plain JSON data, with its sentence as `text`."""
        data: dict[str, object] = dataclasses.asdict(self)
        data["index"] = list(self.index)
        if not np.isfinite(self.largest):
            data["largest"] = None
        data["text"] = str(self)
        return data


def look_at(
    kind: Kind, name: str, array: np.ndarray, *, ids: np.ndarray | None = None, rows: bool = False
) -> Cause | None:
    """Return what is not finite in a floating-point array, or None; `rows` counts rows, each with its id."""
    if array.size == 0:
        return None
    flat = array.reshape(len(array), -1) if rows else array.reshape(-1, 1)
    width = max(1, flat.shape[1])
    step = max(1, PIECE // width)
    bad, first, any_nan, any_inf = 0, -1, False, False
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        finite = np.isfinite(piece).all(axis=1)
        if finite.all():
            continue
        wrong = piece[~finite]
        any_nan = any_nan or bool(np.isnan(wrong).any())
        any_inf = any_inf or bool(np.isinf(wrong).any())
        bad += len(wrong)
        first = first if first >= 0 else start + int(np.argmin(finite))
    if not bad:
        return None
    what = "not finite" if any_nan and any_inf else "NaN" if any_nan else "infinite"
    if rows:
        row = int(ids[first]) if ids is not None and len(ids) == len(flat) else None
        return Cause(kind, name, what, bad, len(flat), (first,), rows=True, id=row)
    index = tuple(int(i) for i in np.unravel_index(first, array.shape)) if array.ndim else ()
    return Cause(kind, name, what, bad, array.size, index)


def overflow(kind: Kind, name: str, array: np.ndarray) -> Cause | None:
    """Return a cause where finite entries have a sum that float32 cannot hold, in some order of adding."""
    size = np.abs(array.astype(np.float64))
    if size.size == 0 or not size.sum() > np.finfo(np.float32).max:
        return None
    return Cause(kind, name, "sum", 0, array.size, largest=float(size.max()))


def reasons(causes: Sequence[Cause]) -> str:
    """Return the first causes in words, those that lie earliest in the graph."""
    if not causes:
        return "something was not finite, and is not found again: random operators drew other values"
    more = f"; and {len(causes) - SHOWN} more" if len(causes) > SHOWN else ""
    return "; ".join(str(cause) for cause in causes[:SHOWN]) + more


def advice(causes: Sequence[Cause], rate: float) -> str:
    """Return what to do about steps that are skipped again and again, from the causes of the last one."""
    kinds = {cause.kind: cause for cause in reversed(causes)}
    if "input" in kinds:
        return f"clean the data: {kinds['input']}"
    given: tuple[Kind, ...] = ("parameter", "constant")
    for kind in given:
        if kind in kinds:
            return f"start from finite values: {kinds[kind]}"
    return (
        f"lower the learning rate (it is {rate:g}), raise the damping,"
        " or look for examples with extreme values in the data"
    )
