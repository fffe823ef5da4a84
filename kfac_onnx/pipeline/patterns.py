"""Patterns of parameter names, as `--rule` and the option `only` of inserting passes take them."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["chosen"]


def chosen(
    names: Iterable[str], patterns: Sequence[str], *, context: str, what: str = "trained parameter"
) -> set[str]:
    """Return the names that match one of the patterns (`*`, `?`, `[abc]`; a plain name matches itself).

    Raises UserError for a pattern that matches no name, with the nearest one.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        # A name may hold brackets of its own: as itself it comes before its meaning as a pattern.
        hits = [name for name in names if name == pattern] or [
            name for name in names if fnmatch.fnmatchcase(name, pattern)
        ]
        if not hits:
            raise UserError(
                f"'{pattern}' matches no {what}{did_you_mean(pattern, names)}",
                context=context,
                help="`scan MODEL` lists the trained parameters",
            )
        matched.update(hits)
    return matched
