"""Which column fills which input: `user_id=users,history=items{pad=0},bags=values+offsets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kfac_onnx.data.batch_input import InputKind

__all__ = ["Filling", "fillings", "parse_columns"]

_ENTRY: Final = re.compile(
    r"\s*([^={}]+?)\s*=\s*([^={}+,]+?)\s*(?:\+\s*([^={}+,]+?)\s*)?(?:\{([^{}]*)\}\s*)?"
)
_LARGEST: Final = 1 << 31


@dataclass(frozen=True)
class Filling:
    """A column and the input that it fills; with `offsets` the lists of the column fill a bag's two inputs.

    Args:
        column: its name in the data.
        input: the input of its values.
        offsets: the input of where each bag begins among the values; with
        last: it ends with the number of values (`include_last_offset` of PyTorch's EmbeddingBag).
        pad: what stands behind lists that are shorter than others of a batch.
        length: of every list, in place of the longest of a batch.
        keep: which end of a longer list is kept; None refuses it.

    """

    column: str
    input: str
    offsets: str | None = None
    last: bool = False
    pad: float | None = None
    length: int | None = None
    keep: Literal["first", "last"] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that it fills."""
        return (self.input,) if self.offsets is None else (self.input, self.offsets)

    def __str__(self) -> str:
        target = self.input if self.offsets is None else f"{self.input}+{self.offsets}"
        options = [
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name in ("last", "pad", "length", "keep")
            if (value := getattr(self, name)) is not None and value is not False
        ]
        return f"{self.column}={target}" + (f"{{{','.join(options)}}}" if options else "")


def parse_columns(text: str) -> tuple[Filling, ...]:
    """Return what a text says of columns; raises UserError where it is none or names an input twice."""
    found: list[Filling] = []
    for part in re.split(r",(?![^{]*\})", text):
        if not part.strip():
            continue
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise UserError(
                f"--columns wants COLUMN=INPUT, not '{part.strip()}'",
                help="such as user_id=users,history=items{pad=0},bag=values+offsets",
            )
        found.append(_filling(match[1], match[2], match[3], match[4] or ""))
    names = [name for filling in found for name in filling.inputs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--columns fills the input '{twice}' twice")
    return tuple(found)


def _filling(column: str, target: str, offsets: str | None, options: str) -> Filling:
    values: dict[str, str] = {}
    known = ["pad", "length", "keep"] if offsets is None else ["last"]
    for word in filter(None, map(str.strip, options.split(","))):
        name, equals, value = (part.strip() for part in word.partition("="))
        if name not in known:
            raise UserError(
                f"unknown option '{name}' of column '{column}'{did_you_mean(name, known)}",
                help=f"options are {', '.join(known)}",
            )
        if not equals or not value:
            raise UserError(f"option '{name}' of column '{column}' wants {name}=VALUE")
        values[name] = value
    keep = values.get("keep")
    if keep not in (None, "first", "last"):
        raise UserError(f"option 'keep' of column '{column}' is first or last, not '{keep}'")
    last = values.get("last", "false")
    if last not in ("true", "false"):
        raise UserError(f"option 'last' of column '{column}' is true or false, not '{last}'")
    return Filling(
        column,
        target,
        offsets,
        last=last == "true",
        pad=None if "pad" not in values else _number(column, "pad", values["pad"]),
        length=None if "length" not in values else _length(column, values["length"]),
        keep=keep,
    )


def _number(column: str, name: str, text: str) -> float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as e:
        raise UserError(f"option '{name}' of column '{column}' is a number, not '{text}'") from e


def _length(column: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < _LARGEST:
        raise UserError(f"option 'length' of column '{column}' is a number of entries, not '{text}'")
    return int(text)


def fillings(
    chosen: Iterable[Filling], inputs: Sequence[InputKind], columns: Sequence[str], place: str
) -> tuple[Filling, ...]:
    """Return a filling for each input: the chosen one, else the column of its name.

    Raises UserError for an input that no column fills, and for columns and inputs that are not there; `place`
    is what the data are called.
    """
    names = [item.name for item in inputs]
    if not columns:
        raise UserError(f"{place} holds no columns")
    by_input = {name: filling for filling in chosen for name in filling.inputs}
    for name, filling in by_input.items():
        if name not in names:
            raise UserError(
                f"--columns fills '{name}', which is no batch input{did_you_mean(name, names)}",
                help=f"the graph's batch inputs are {_listed(names)}",
            )
        if filling.column not in columns:
            raise UserError(
                f"{place} has no column '{filling.column}'{did_you_mean(filling.column, columns)}",
                help=f"its columns are {_listed(columns)}",
            )
    for name in names:
        if name in by_input:
            continue
        if name not in columns:
            free = [column for column in columns if column not in names] or list(columns)
            raise UserError(
                f"{place} has no column '{name}', and no other fills that input",
                help=f"name one of {_listed(columns)}: --columns '{free[0]}={name}'",
            )
        by_input[name] = Filling(name, name)
    return tuple(dict.fromkeys(by_input[name] for name in names))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:16])
    return f"{shown} and {len(names) - 16} more" if len(names) > 16 else shown
