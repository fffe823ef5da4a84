"""Metrics of predictions: accuracy, perplexity, AUC, RMSE, recall@k, NDCG@k.

With scores s and labels y, in float64 and over all examples of the held-out data:

    accuracy    share of examples whose largest score is the label's; of one score per example, of those
                where (s > threshold) = y
    perplexity  exp(-mean log softmax(s)[y])
    auc         P(s of a positive > s of a negative) + P(=)/2, by ranks (Mann & Whitney 1947,
                https://doi.org/10.1214/aoms/1177730491)
    rmse        sqrt(mean (s - y)^2)
    recall@k    mean share of an example's relevant items that are among its k largest scores
    ndcg@k      mean DCG/ideal DCG, DCG = sum of relevance/log2(rank + 1) over ranks 1 to k (Järvelin and
                Kekäläinen 2002, sec. 2.2, https://doi.org/10.1145/582415.582418)

Labels of the ranking metrics are one relevant item per example, or a matrix of relevances. Items of equal
scores take the mean of the ranks that they share (McSherry & Najork 2008, https://doi.org/10.1007/978-3-540-78646-7_38).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["METRICS", "Metric", "is_higher_better", "metric_of"]


class Metric(Protocol):
    """Takes the scores and labels of each batch, float64 and as they are, and gives one number."""

    def add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Take a batch; raises UserError for shapes and labels that the metric is not of."""
        ...

    def value(self) -> float:
        """Return the metric of all that were taken; NaN where it has none."""
        ...


class _Mean:
    """The mean of a number per example."""

    def __init__(
        self, each: Callable[[np.ndarray, np.ndarray], np.ndarray], end: Callable[[float], float]
    ) -> None:
        self._each, self._end = each, end
        self._total, self._count = 0.0, 0

    def add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        values = self._each(scores, labels)
        self._total += float(values.sum())
        self._count += values.size

    def value(self) -> float:
        return self._end(self._total / self._count) if self._count else math.nan


class _Auc:
    """Keeps all scores: ranks are of all examples."""

    def __init__(self) -> None:
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        if scores.ndim == 2 and scores.shape[1] == 2 and labels.shape != scores.shape:
            scores = scores[:, 1] - scores[:, 0]
        flat, truth = scores.reshape(-1), labels.reshape(-1)
        if flat.size != truth.size:
            raise UserError(f"auc wants one score per example, and there are {list(scores.shape)}")
        if not np.isin(truth, (0, 1)).all():
            raise UserError("auc wants labels 0 and 1")
        self._scores.append(flat)
        self._labels.append(truth)

    def value(self) -> float:
        if not self._scores:
            return math.nan
        scores, positive = np.concatenate(self._scores), np.concatenate(self._labels) == 1
        _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks = (ends - (counts - 1) / 2)[inverse]  # from 1, the mean of those that are equal
        ones = int(positive.sum())
        zeros = positive.size - ones
        if not ones or not zeros:
            return math.nan
        return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def _classes(scores: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scores [examples, classes] and labels [examples], of a sequence all positions."""
    if scores.ndim < 2 or scores.shape[-1] < 2 or scores.size // scores.shape[-1] != labels.size:
        raise UserError(
            f"{name} wants a score for each class and a label for each example, and there are"
            f" {list(scores.shape)} and {list(labels.shape)}"
        )
    return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).astype(np.int64)


def _right(scores: np.ndarray, labels: np.ndarray, threshold: float | None) -> np.ndarray:
    if scores.size == labels.size:
        if threshold is None:
            raise UserError(
                "accuracy of one score per example needs the score from which on it is a 1",
                help="accuracy@0 for logits, accuracy@0.5 for probabilities",
            )
        return (scores.reshape(-1) > threshold) == (labels.reshape(-1) == 1)
    table, truth = _classes(scores, labels, "accuracy")
    return table.argmax(axis=1) == truth


def _surprise(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    table, truth = _classes(scores, labels, "perplexity")
    top = table.max(axis=1)
    return top + np.log(np.exp(table - top[:, None]).sum(axis=1)) - table[np.arange(len(table)), truth]


def _squares(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if scores.size != labels.size:
        raise UserError(
            f"rmse wants one score per label, and there are {list(scores.shape)} and {list(labels.shape)}"
        )
    return (scores.reshape(-1) - labels.reshape(-1)) ** 2


def _shares(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the weight of each item's rank, [examples, items]; equal scores share the mean of theirs."""
    result = np.empty_like(scores)
    for row, values in enumerate(scores):
        _, inverse, counts = np.unique(-values, return_inverse=True, return_counts=True)
        sums = np.add.reduceat(weights, np.cumsum(counts) - counts)
        result[row] = (sums / counts)[inverse]
    return result


def _relevances(scores: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    if labels.shape == scores.shape and scores.ndim == 2:
        return scores, labels.astype(np.float64)
    table, truth = _classes(scores, labels, name)
    relevant = np.zeros_like(table)
    relevant[np.arange(len(table)), truth] = 1.0
    return table, relevant


def _recall(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    table, relevant = _relevances(scores, labels, "recall")
    inside = np.zeros(table.shape[1])
    inside[:k] = 1.0
    truth = relevant > 0
    counts = truth.sum(axis=1)
    hits = (_shares(inside, table) * truth).sum(axis=1)
    return hits[counts > 0] / counts[counts > 0]


def _ndcg(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    table, relevant = _relevances(scores, labels, "ndcg")
    discounts = np.zeros(table.shape[1])
    discounts[:k] = 1 / np.log2(np.arange(2, min(k, table.shape[1]) + 2, dtype=np.float64))
    gained = (_shares(discounts, table) * relevant).sum(axis=1)
    ideal = (np.sort(relevant, axis=1)[:, ::-1] * discounts).sum(axis=1)
    return np.divide(gained, ideal, out=np.zeros_like(gained), where=ideal > 0)


@dataclass(frozen=True)
class Kind:
    """A metric: what makes it, whether more is better, and what stands behind its `@`, if anything."""

    make: Callable[[float | None], Metric]
    higher: bool
    number: str = ""


def _same(value: float) -> float:
    return value


METRICS: Final[dict[str, Kind]] = {
    "accuracy": Kind(lambda t: _Mean(lambda s, y: _right(s, y, t), _same), higher=True, number="threshold"),
    "perplexity": Kind(lambda _: _Mean(_surprise, _exponential), higher=False),
    "auc": Kind(lambda _: _Auc(), higher=True),
    "rmse": Kind(lambda _: _Mean(_squares, math.sqrt), higher=False),
    "recall": Kind(lambda k: _Mean(lambda s, y: _recall(s, y, int(k or 0)), _same), higher=True, number="k"),
    "ndcg": Kind(lambda k: _Mean(lambda s, y: _ndcg(s, y, int(k or 0)), _same), higher=True, number="k"),
}


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _parsed(text: str) -> tuple[Kind, float | None]:
    name, at, number = text.partition("@")
    kind = METRICS.get(name)
    if kind is None:
        raise UserError(
            f"unknown metric '{name}'{did_you_mean(name, METRICS)}",
            help="metrics are accuracy, perplexity, auc, rmse, recall@K, ndcg@K",
        )
    if kind.number == "k":
        if not re.fullmatch("[1-9][0-9]{0,8}", number):
            raise UserError(f"metric '{name}' wants a number of items, such as {name}@10, not '{text}'")
        return kind, float(number)
    if not at:
        return kind, None
    try:
        value = float(number) if kind.number else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"metric '{name}' has no option '{number}'")
    return kind, value


def metric_of(text: str) -> Metric:
    """Return a new metric by its text, such as `auc` or `recall@10`; raises UserError for another one."""
    kind, number = _parsed(text)
    return kind.make(number)


def is_higher_better(text: str) -> bool:
    """Say whether more of a metric is better; of the loss less is. Raises UserError for an unknown one."""
    return text != "loss" and _parsed(text)[0].higher
