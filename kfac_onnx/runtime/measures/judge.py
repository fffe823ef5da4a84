"""Held-out data judge a run: its metrics, the best checkpoint by one of them, and when to stop."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Protocol

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.runtime.measures.metrics import is_higher_better, metric_of
from kfac_onnx.runtime.saved.checkpoint_folder import is_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

__all__ = ["Judge", "Judged"]

_log = logging.getLogger(__name__)


class Judged(Protocol):
    """What a judge needs of a session."""

    best: dict[str, float] | None

    @property
    def position(self) -> int:
        """How many batches were consumed."""
        ...

    def measure(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        metrics: Sequence[str] = (),
        *,
        scores: str | None = None,
        labels: str | None = None,
    ) -> dict[str, float]:
        """Return the loss and metrics."""
        ...

    def save(self, path: str | Path, *, keep: int | None = None) -> Path:
        """Write a checkpoint."""
        ...


class Judge:
    """Evaluates a session, keeps its best checkpoint, and says when nothing gets better any more.

    Args:
        session: what is evaluated.
        held_out: batches to evaluate on.
        metrics: besides the loss.
        scores, labels: which values of the graph they are of; None takes those of its loss.
        monitor: what is best by: `loss`, or one of the metrics.
        patience: so many evaluations without a better one stop the run.
        best: the file of the best checkpoint.

    """

    def __init__(
        self,
        session: Judged,
        held_out: Iterable[Mapping[str, np.ndarray]],
        metrics: Sequence[str],
        *,
        scores: str | None,
        labels: str | None,
        monitor: str,
        patience: int | None,
        best: str | Path | None,
    ) -> None:
        self._session, self._held_out, self._metrics = session, held_out, tuple(metrics)
        self._scores, self._labels = scores, labels
        self._monitor, self._patience, self._file = monitor, patience, best
        for name in metrics:
            metric_of(name)
        known = ("loss", *metrics)
        if monitor not in known:
            raise UserError(
                f"the best is wanted by '{monitor}', which is not measured{did_you_mean(monitor, known)}",
                help=f"add it to the metrics: --metric {monitor}",
            )
        self._sign = 1.0 if is_higher_better(monitor) else -1.0
        if best is not None and is_folder(best):
            raise UserError(
                f"the best checkpoint is a file, and '{best}' is a folder", help="name a FILE.ckpt"
            )
        self.stop = False

    def measure(self) -> dict[str, float]:
        """Return the loss and the metrics now; save the session if it is the best so far."""
        values = self._session.measure(
            self._held_out, self._metrics, scores=self._scores, labels=self._labels
        )
        value = values[self._monitor]
        before = self._session.best or {}
        least = before.get(self._monitor)
        if math.isfinite(value) and (least is None or self._sign * (value - least) > 0):
            position = float(self._session.position)
            self._session.best = {self._monitor: value, "position": position, "waited": 0.0}
            if self._file is not None:
                self._session.save(self._file)
            return values
        waited = before.get("waited", 0.0) + 1
        if least is not None:
            self._session.best = {**before, "waited": waited}
        if self._patience is not None and waited >= self._patience:
            self.stop = True
            _log.info(
                "stopped after batch %d: %s has not become better in %d evaluations",
                self._session.position,
                self._monitor,
                self._patience,
            )
        return values
