"""Gradients of normalizations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kfac_onnx.frontends.autodiff.backward import Rule

__all__ = ["RULES"]

RULES: Final[dict[str | tuple[str, str], Rule]] = {}
