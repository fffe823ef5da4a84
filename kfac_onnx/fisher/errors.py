"""Errors of the block's interface: sentences for the user that are also Python's usual kinds.

Callers of the original catch `ValueError`, `KeyError`, `TypeError` or `IndexError`; the command line
catches `UserError`.
"""

from __future__ import annotations

from kfac_onnx.errors import UserError

__all__ = ["FisherIndexError", "FisherKeyError", "FisherTypeError", "FisherValueError"]


class FisherValueError(UserError, ValueError):
    """An argument that this call cannot take."""


class FisherKeyError(UserError, KeyError):
    """Something that was never registered."""


class FisherTypeError(UserError, TypeError):
    """A tensor or argument of the wrong type."""


class FisherIndexError(UserError, IndexError):
    """A list that is too short, such as gradients without a source."""
