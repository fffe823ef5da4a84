"""Reverse-mode differentiation of ONNX graphs: one table of rules, one rule per operator.

Source: Griewank & Walther, Evaluating Derivatives, 2nd ed., ch. 3 (reverse mode by accumulation of adjoints).
"""

from __future__ import annotations

from kfac_onnx.autodiff.engine import append_gradients, differentiate, propagate

__all__ = ["append_gradients", "differentiate", "propagate"]
