"""Watches the inverse roots at each refresh, and takes over where the graph's own cannot be trusted.

The graph hands out each root with its residual, max|R M R − I| (or max|M R − I| for an inverse), so a refresh
costs the host two comparisons. The graph's root is replaced by an eigendecomposition in float64 where

    residual > tolerance, or it is not a number     the iteration did not converge
    damping < 16·eps · trace(Ĝ)                     the factor's rounding is not small beside its damping:
                                                    negative eigenvalues of Ĝ do not show in a residual

A root that float64 cannot give either (a factor that is not finite, or singular without damping) becomes NaN,
so that the step is skipped instead of taking what missed its tolerance.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kfac_onnx.metadata import RootCheck
    from kfac_onnx.runtime.step.engine import Engine

__all__ = ["RootMonitor", "RootRecord", "eigen_power"]

_log = logging.getLogger(__name__)
ROUNDING: Final = 16 * float(np.finfo(np.float32).eps)
"""Of the trace: rounding in Ĝ moves its eigenvalues by at most a sixteenth of a damping of this size."""


@dataclass
class RootRecord:
    """What happened to one table's root since the session was opened.

    `refreshes` counts what was recomputed, `fallbacks` how often the host took over, `failures` how often it
    could not either. `residual` is the last one of the graph's own root, `worst` the largest one accepted.
    """

    refreshes: int = 0
    fallbacks: int = 0
    failures: int = 0
    residual: float = math.nan
    worst: float = 0.0


class RootMonitor:
    """Keeps a `RootRecord` for each root; `checks` are the step's."""

    def __init__(self, checks: Sequence[RootCheck]) -> None:
        self._checks = checks
        self.records = {check.parameter: RootRecord() for check in checks}
        self.restored = 0
        """Fallbacks before the session was opened (of a resumed run)."""

    @property
    def fallbacks(self) -> int:
        """How often the host took over in the whole run."""
        return self.restored + sum(record.fallbacks for record in self.records.values())

    def after_refresh(self, engine: Engine, outputs: Collection[str]) -> None:
        """Look at the roots among the values that a stage of refreshes has just made."""
        for check in self._checks:
            if check.root in outputs:
                self._look(check, engine)

    def _look(self, check: RootCheck, engine: Engine) -> None:
        record = self.records[check.parameter]
        residual = float(engine.read(check.residual).reshape(()))
        damping = float(engine.read(check.damping).reshape(()))
        factor = engine.read(check.factor)
        record.refreshes += 1
        record.residual = residual
        problem = _problem(residual, check.tolerance, damping, factor)
        if problem is None:
            record.worst = max(record.worst, residual)
            return
        root = eigen_power(factor, damping, check.exponent)
        if root is None:
            record.failures += 1
            engine.buffer(check.root).write(np.full(factor.shape, np.nan, np.float32))
            return
        engine.buffer(check.root).write(root)
        record.fallbacks += 1
        _log.info("the root of '%s' was computed on the host: %s", check.parameter, problem)


def _problem(residual: float, tolerance: float, damping: float, factor: np.ndarray) -> str | None:
    """Return why the graph's root cannot be trusted, or None."""
    if not residual <= tolerance:
        return f"residual {residual:.3g} above {tolerance:.3g}"
    trace = float(np.trace(factor, dtype=np.float64))
    if damping < ROUNDING * trace:
        return f"damping {damping:.3g} within the rounding of a factor of trace {trace:.3g}"
    return None


def eigen_power(factor: np.ndarray, damping: float, exponent: float) -> np.ndarray | None:
    """Return `(factor + damping I)^exponent` by eigendecomposition in float64, symmetric, float32[D, D].

    `root = Q (max(w, 0) + damping)^exponent Qᵀ` with `factor = Q w Qᵀ`: any exponent, also one that has no
    iteration. None where it is not finite: the factor holds NaN or infinities, or is singular without
    damping.
    """
    matrix = np.asarray(factor, np.float64)
    if not np.isfinite(matrix).all() or not np.isfinite(damping):
        return None
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        powers = (np.maximum(values, 0.0) + damping) ** exponent
        root = ((vectors * powers) @ vectors.T).astype(np.float32)
    root = (root + root.T) / np.float32(2)
    return root if np.isfinite(root).all() else None
