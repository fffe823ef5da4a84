"""What an input of a batch takes, as far as data are concerned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["InputKind"]


@dataclass(frozen=True)
class InputKind:
    """An input: its dtype and dimensions (a number, a shared name, or None); `texts`: it takes those."""

    name: str
    dtype: np.dtype[np.generic]
    dims: tuple[int | str | None, ...] | None
    texts: bool = False
