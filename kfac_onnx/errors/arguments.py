"""Numbers that users pass as arguments, as plain Python values; NumPy's scalars are taken.

What ends in a checkpoint must be of Python's own types, and so is made one where it comes in.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Final

from kfac_onnx.errors import UserError

__all__ = [
    "LARGEST",
    "LARGEST_RATE",
    "LARGEST_SEED",
    "MOST_THREADS",
    "finite_number",
    "plain",
    "shown",
    "thread_count",
    "truth",
    "whole_number",
]

LARGEST: Final = (1 << 63) - 1
"""The largest count: it fits into int64."""
LARGEST_SEED: Final = (1 << 128) - 1
"""NumPy's own seeds have 128 bits; Python's JSON reads no number of more than 4,300 digits."""
LARGEST_RATE: Final = 3.4028235e38
"""The largest learning rate: it is handed to the graph as float32, whose largest number rounds to this."""
MOST_THREADS: Final = 1024
"""Threads of a session: ONNX Runtime starts them all at once, and 100,000 of them never end."""


def whole_number(
    value: object,
    what: str,
    *,
    least: int = -LARGEST,
    most: int = LARGEST,
    help: str | None = None,  # noqa: A002
) -> int:
    """Return a whole number as an `int`; `what` is the subject of the sentence, such as `the seed`.

    Raises UserError for everything else, truth values included, and for a number out of range.
    """
    if isinstance(value, bool):
        raise UserError(f"{what} must be a whole number, got {value!r}", help=help)
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]  what has no index raises
    except TypeError as e:
        raise UserError(f"{what} must be a whole number, got {shown(value)}", help=help) from e
    if number < least:
        raise UserError(f"{what} must be at least {least}, got {number}", help=help)
    if number > most:
        raise UserError(f"{what} must be at most {most}, got {shown(number)}", help=help)
    return number


def finite_number(
    value: object,
    what: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    help: str | None = None,  # noqa: A002
) -> float:
    """Return a number as a `float`; raises UserError for everything else, NaN and infinity included."""
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):  # float() would read them
            raise TypeError
        number = float(value)  # pyright: ignore[reportArgumentType]  what is no number raises
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{what} must be a finite number, got {shown(value)}", help=help) from e
    if not math.isfinite(number):
        raise UserError(f"{what} must be a finite number, got {number}", help=help)
    if number < least:
        raise UserError(f"{what} must be at least {least:g}, got {number:g}", help=help)
    if number > most:
        raise UserError(f"{what} must be at most {most:g}, got {number:g}", help=help)
    return number


def plain(value: Any) -> Any:
    """Return a scalar of NumPy's as Python's, and everything else as it is."""
    numpy_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if numpy_scalar else value


def truth(value: object, what: str) -> bool:
    """Return a truth value as a `bool`, NumPy's too; raises UserError for everything else."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise UserError(f"{what} must be True or False, got {shown(value)}")


def thread_count(value: object, what: str = "threads") -> int | None:
    """Return how many threads a session takes, None for all cores; raises UserError for anything else."""
    return None if value is None else whole_number(value, what, least=1, most=MOST_THREADS)


def shown(value: object) -> str:
    """Return a value as a sentence quotes it: short, on one line, and never raising."""
    try:
        text = repr(value)
    except Exception:  # a __repr__ of the user's, or a number of too many digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 and "\n" not in text else f"a value of type {type(value).__name__}"
