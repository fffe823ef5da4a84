"""What takes the numbers of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

__all__ = ["Log"]


class Log(Protocol):
    """A place for numbers; each belongs to a position of the run, in batches."""

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Take numbers by name, such as `loss` and `table/emb/update_norm`."""
        ...

    def histogram(self, name: str, values: np.ndarray, position: int) -> None:
        """Take the distribution of values."""
        ...

    def settings(self, text: str) -> None:
        """Take the settings of the run as TOML, once."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...
