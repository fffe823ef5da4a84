"""How much was changed in a model: what a pass returns and the emitter counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["NO_CHANGES", "Changes"]


@dataclass(frozen=True)
class Changes:
    """How much a pass changed: things added, removed and edited (nodes, values, inputs, metadata).

    A pass counts everything: the written file differs exactly when `total` is above 0.
    """

    added: int = 0
    removed: int = 0
    edited: int = 0

    @property
    def total(self) -> int:
        """All changes together."""
        return self.added + self.removed + self.edited

    def __add__(self, other: Changes) -> Changes:
        return Changes(
            self.added + other.added,
            self.removed + other.removed,
            self.edited + other.edited,
        )

    def __bool__(self) -> bool:
        return self.total > 0


NO_CHANGES: Final = Changes()
