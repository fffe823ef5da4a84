"""Metrics against their definitions and, where it is installed, scikit-learn."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.metadata import IdCheck
from kfac_onnx.runtime.measures.metrics import METRICS, is_higher_better, metric_of
from kfac_onnx.runtime.measures.predictions import Predictions

RNG = np.random.default_rng(0)
CLASSES = RNG.normal(size=(60, 7))
TIES = RNG.integers(0, 4, (60, 7)).astype(np.float64)
TRUTH = RNG.integers(0, 7, 60)
BINARY, SCORES = RNG.integers(0, 2, 60), np.round(RNG.normal(size=60), 1)
GRADED = RNG.integers(0, 3, (60, 7)).astype(np.float64)


def value(name: str, scores: np.ndarray, labels: np.ndarray, parts: int = 3) -> float:
    """Return a metric of examples that come in several batches of unequal sizes."""
    metric = metric_of(name)
    cuts = [0, 11, 30, len(scores)] if parts == 3 else [0, len(scores)]
    for start, end in pairwise(cuts):
        metric.add(scores[start:end], labels[start:end])
    return metric.value()


def sklearn_values() -> dict[str, tuple[float, float]]:
    """Return ours and theirs by name."""
    metrics = pytest.importorskip("sklearn.metrics")
    truth = np.eye(7)[TRUTH]
    probabilities = np.exp(CLASSES) / np.exp(CLASSES).sum(axis=1, keepdims=True)
    return {
        "accuracy": (
            value("accuracy", CLASSES, TRUTH),
            metrics.accuracy_score(TRUTH, CLASSES.argmax(axis=1)),
        ),
        "accuracy@0": (value("accuracy@0", SCORES, BINARY), metrics.accuracy_score(BINARY, SCORES > 0)),
        "perplexity": (value("perplexity", CLASSES, TRUTH), math.exp(metrics.log_loss(TRUTH, probabilities))),
        "auc": (value("auc", SCORES, BINARY), metrics.roc_auc_score(BINARY, SCORES)),
        "rmse": (value("rmse", SCORES, BINARY), math.sqrt(metrics.mean_squared_error(BINARY, SCORES))),
        "recall@3": (value("recall@3", CLASSES, TRUTH), metrics.top_k_accuracy_score(TRUTH, CLASSES, k=3)),
        "ndcg@3": (value("ndcg@3", CLASSES, TRUTH), metrics.ndcg_score(truth, CLASSES, k=3)),
        "ndcg@4, ties": (value("ndcg@4", TIES, TRUTH), metrics.ndcg_score(truth, TIES, k=4)),
        "ndcg@5, graded": (value("ndcg@5", TIES, GRADED), metrics.ndcg_score(GRADED, TIES, k=5)),
        "ndcg@100": (value("ndcg@100", CLASSES, GRADED), metrics.ndcg_score(GRADED, CLASSES)),
    }


def test_they_are_those_of_scikit_learn() -> None:
    values = sklearn_values()
    assert {name.partition("@")[0] for name in values} == set(METRICS)
    for name, (ours, theirs) in values.items():
        assert ours == pytest.approx(theirs, rel=1e-12), name  # float64, 60 examples


def test_they_are_what_their_definitions_say() -> None:
    """By hand, so that they are tested where scikit-learn is missing."""
    scores, labels = np.array([[3.0, 1, 2], [1, 2, 3]]), np.array([2, 2])
    assert value("accuracy", scores, labels, 1) == 0.5
    assert value("recall@1", scores, labels, 1) == 0.5
    assert value("recall@2", scores, labels, 1) == 1.0
    assert value("ndcg@2", scores, labels, 1) == pytest.approx((1 / math.log2(3) + 1) / 2, rel=1e-15)
    relevant = np.array([[1.0, 0, 1], [0, 0, 0]])
    assert value("recall@1", scores, relevant, 1) == 0.5  # examples without a relevant item do not count
    assert value("recall@1", np.zeros((1, 4)), np.array([1]), 1) == 0.25
    assert value("auc", np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]), 1) == 0.875
    assert value("auc", np.array([[0.0, 1], [0, 2]]), np.array([0, 1]), 1) == 1.0
    assert math.isnan(value("auc", np.array([0.1, 0.4]), np.array([1, 1]), 1))
    assert value("perplexity", np.zeros((3, 5)), np.array([0, 1, 4]), 1) == pytest.approx(5, rel=1e-15)
    assert value("rmse", np.array([[1.0], [2.0]]), np.array([1.0, 4.0]), 1) == math.sqrt(2)


def test_which_is_better() -> None:
    better = {
        name: is_higher_better(f"{name}@3" if METRICS[name].number == "k" else name) for name in METRICS
    }
    assert better == {
        "accuracy": True, "perplexity": False, "auc": True, "rmse": False, "recall": True, "ndcg": True,
    }  # fmt: skip
    assert not is_higher_better("loss")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "unknown metric 'acuracy'; did you mean 'accuracy'?"),
        ("recall", "metric 'recall' wants a number of items, such as recall@10, not 'recall'"),
        ("ndcg@0", "metric 'ndcg' wants a number of items, such as ndcg@10, not 'ndcg@0'"),
        ("auc@3", "metric 'auc' has no option '3'"),
        ("accuracy@x", "metric 'accuracy' has no option 'x'"),
    ],
)
def test_metrics_that_there_are_not(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        metric_of(name)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("name", "scores", "labels", "message"),
    [
        ("accuracy", np.zeros(3), np.zeros(3), "accuracy of one score per example needs the score from which on it is a 1"),
        ("perplexity", np.zeros(3), np.zeros(3), "perplexity wants a score for each class and a label for each example, and there are [3] and [3]"),
        ("auc", np.zeros((3, 4)), np.zeros(3), "auc wants one score per example, and there are [3, 4]"),
        ("auc", np.zeros(3), np.full(3, 2), "auc wants labels 0 and 1"),
        ("rmse", np.zeros((3, 4)), np.zeros(3), "rmse wants one score per label, and there are [3, 4] and [3]"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(name: str, scores: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(UserError) as caught:
        metric_of(name).add(scores, labels)
    assert caught.value.message == message


def test_sequences_and_labels_that_do_not_count() -> None:
    check = IdCheck("scores", "y", 7, "reject", "labels", -100)
    labels = np.where(np.arange(60) % 5 == 0, -100, TRUTH)
    counted = labels >= 0
    expected = value("accuracy", CLASSES[counted], TRUTH[counted], 1)
    for scores, shape in (
        (CLASSES, (60,)),
        (CLASSES.reshape(12, 5, 7), (12, 5)),
        (CLASSES.reshape(12, 5, 7).transpose(0, 2, 1), (12, 5)),
    ):
        observed = Predictions.of([check], ["accuracy"], None, None)
        observed.add({"scores": scores, "y": labels.reshape(shape)})
        assert observed.values() == {"accuracy": expected}
    with pytest.raises(UserError) as caught:
        Predictions.of([check], ["accuracy"], None, None).add(
            {"scores": np.zeros((2, 3, 3)), "y": np.zeros((2, 3))}
        )
    assert caught.value.message == "scores of shape [2, 3, 3] do not tell which dimension the classes are"
    with pytest.raises(UserError) as caught:
        Predictions.of([], ["accuracy"], None, None)
    assert str(caught.value) == (
        "the graph has no loss over classes, so that it does not say which values its predictions are\n"
        "  help: name scores and labels: --scores VALUE --labels VALUE"
    )
