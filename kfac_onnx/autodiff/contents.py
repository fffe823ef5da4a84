"""What the numbers of an initializer show: masks, positional cosines and sines, usual factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.disk.mapped import all_same, greatest, windows

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["are_cosine_and_sine", "are_waves", "is_mask", "is_positions", "is_uniform", "is_usual_factor"]

MASKED: Final = -1e3
"""Added to scores, numbers below this switch them off."""
GELU: Final = (0.044715, math.sqrt(2 / math.pi), 1.702)
LARGEST: Final = 16_384
"""Largest n of a usual factor √n or n^(1/4): beyond, any number is near one."""
EXACT: Final = 1e-6
"""Relative error of the fourth power of a float32 number."""
FEWEST: Final = 5
"""Rows from which columns are compared with waves: fewer fit any."""
VARIED: Final = 0.1
"""How far some column must move for its numbers to say anything."""
FIRST: Final = 1024
"""Rows that are tried before a whole table is."""
UNIT: Final = 1e-4
"""How far cos² + sin² may be from 1 where the angle was rounded to float32 (positions up to a thousand)."""


def is_uniform(array: np.ndarray, values: Sequence[float]) -> bool:
    """Say whether all entries are equal, to one of `values`."""
    return array.size > 0 and array.reshape(-1)[0] in values and all_same(array)


def is_mask(array: np.ndarray) -> bool:
    """Say whether there are two different entries at most, which switch scores off, or are zero and one."""
    entries = array.reshape(-1)
    values = np.unique(entries[:64].astype(np.float32))
    if not 0 < len(values) <= 2:
        return False
    for (piece,) in windows(entries):
        values = np.union1d(values, piece.astype(np.float32, copy=False))
        if len(values) > 2:
            return False
    if not np.all(np.isfinite(values)) or values.min() < MASKED:
        return True
    return array.ndim > 1 and values.tolist() == [0.0, 1.0]


def is_positions(array: np.ndarray) -> bool:
    """Say whether rows hold the sine and cosine of the same angles, in turn or in halves, or just one."""
    if array.ndim < 2 or not _may_be_angles(array):
        return False
    if are_waves(array):
        return True
    if array.shape[-1] < 4 or array.shape[-1] % 2:
        return False
    half = array.shape[-1] // 2
    pairs = ((array[..., ::2], array[..., 1::2]), (array[..., :half], array[..., half:]))
    return any(are_cosine_and_sine(*pair) for pair in pairs)


def are_waves(array: np.ndarray) -> bool:
    """Say whether each column of [.., T, D] is a sine or cosine of its row's number: cos(kθ) or sin(kθ).

    Both obey x[k−1] + x[k+1] = 2 cos θ x[k], which columns of weights do not.
    """
    if array.ndim < 2 or array.shape[-2] < FEWEST or array.shape[-1] < 2:
        return False
    if array.size != array.shape[-2] * array.shape[-1]:
        return False
    table = array.reshape(array.shape[-2:])
    if len(table) > 2 * FIRST and not _obey(table[:FIRST].astype(np.float64), 10 * UNIT):
        return False
    table = table.astype(np.float64)
    return float(np.max(np.ptp(table, axis=0))) > VARIED and _obey(table, UNIT)


def _obey(table: np.ndarray, error: float) -> bool:
    """Say whether the columns of a table [T, D] obey the equation of waves up to an error."""
    middle, around = table[1:-1], table[:-2] + table[2:]
    scale = np.sum(middle * middle, axis=0)
    factor = np.sum(middle * around, axis=0) / np.maximum(scale, 1e-30)
    errors = np.abs(around - factor * middle).max(axis=0)
    return bool(np.all(errors < error) and np.all(np.abs(factor) <= 2 + error))


def are_cosine_and_sine(one: np.ndarray, other: np.ndarray) -> bool:
    """Say whether two arrays are the cosine and the sine of the same angles."""
    if one.shape != other.shape or one.size < 2 or not (_may_be_angles(one) or _may_be_angles(other)):
        return False
    for first, second in windows(one, other):
        total = np.square(first.astype(np.float64)) + np.square(second.astype(np.float64))
        if not np.all(np.abs(total - 1) < UNIT):
            return False
    return len(np.unique(one)) > 2


def _may_be_angles(array: np.ndarray) -> bool:
    """Say whether entries lie within ±1 and reach it, as the cosine does at position 0."""
    largest = greatest(array)
    return 0.999 < largest <= 1.001


def is_usual_factor(number: float) -> bool:
    """Say whether a number is −1, 10ⁿ, √n, n^(1/4), one of their reciprocals, or a constant of Gelu.

    0 and 1 are not among them: weights start there.
    """
    size = abs(number)
    if number == -1.0 or any(math.isclose(size, known, rel_tol=EXACT) for known in GELU):
        return True
    if size in (0.0, 1.0) or not math.isfinite(size):
        return False
    if math.isclose(math.log10(size), round(math.log10(size)), abs_tol=1e-7):
        return True
    above = size if size > 1 else 1 / size
    powers = (above**2, above**4)
    return any(power <= LARGEST and math.isclose(power, round(power), rel_tol=EXACT) for power in powers)
