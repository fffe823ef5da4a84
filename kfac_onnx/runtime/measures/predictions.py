"""The scores and labels of held-out batches, as metrics take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.measures.metrics import metric_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kfac_onnx.metadata import IdCheck
    from kfac_onnx.runtime.measures.metrics import Metric

__all__ = ["Predictions"]


@dataclass(frozen=True)
class Predictions:
    """Which values are the scores and the labels, the label that does not count, and the metrics of them."""

    scores: str
    labels: str
    ignored: int | None
    metrics: dict[str, Metric]

    @classmethod
    def of(
        cls, checks: Iterable[IdCheck], metrics: Sequence[str], scores: str | None, labels: str | None
    ) -> Predictions:
        """Return the named values, or those that a loss over classes reads.

        Raises UserError for an unknown metric, and where the graph does not say which values they are.
        """
        made = {name: metric_of(name) for name in metrics}
        losses = [check for check in checks if check.kind == "labels"]
        if scores is not None and labels is not None:
            ignored = next((check.ignored for check in losses if check.ids == labels), None)
            return cls(scores, labels, ignored, made)
        if len(losses) != 1:
            count = "no loss over classes" if not losses else f"{len(losses)} losses over classes"
            raise UserError(
                f"the graph has {count}, so that it does not say which values its predictions are",
                help="name scores and labels: --scores VALUE --labels VALUE",
            )
        (check,) = losses
        return cls(scores or check.parameter, labels or check.ids, check.ignored, made)

    @property
    def names(self) -> tuple[str, str]:
        """The values of the graph that are read."""
        return self.scores, self.labels

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take a batch; raises UserError where scores and labels do not fit together."""
        scores = np.asarray(values[self.scores], np.float64)
        labels = np.asarray(values[self.labels])
        if scores.ndim == labels.ndim + 1 and scores.ndim > 2:
            scores, labels = self._flat(scores, labels)
        if self.ignored is not None and labels.ndim == 1:
            counted = labels != self.ignored
            scores, labels = scores[counted], labels[counted]
        for metric in self.metrics.values():
            metric.add(scores, labels)

    def _flat(self, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return positions of sequences as examples: classes are the last dimension, or the second (ONNX)."""
        last = scores.shape[:-1] == labels.shape
        second = (scores.shape[0], *scores.shape[2:]) == labels.shape
        if last and second:
            raise UserError(
                f"scores of shape {list(scores.shape)} do not tell which dimension the classes are",
                help="name scores of rank 2 by --scores, or batches of another length",
            )
        if second:
            scores = np.moveaxis(scores, 1, -1)
        return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)

    def values(self) -> dict[str, float]:
        """Return the metrics by their texts."""
        return {name: metric.value() for name, metric in self.metrics.items()}
