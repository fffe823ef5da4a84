"""Losses appended to logits: values and gradients against their formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from autodiff_graphs import run_gradients

from kfac_onnx.autodiff import append_gradients
from kfac_onnx.autodiff.losses import append_loss
from kfac_onnx.canonical.pipelines import CANONICAL
from kfac_onnx.errors import UserError
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.readers.loss import find_reduction

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 2e-6  # a float32 softmax over 5 classes and a mean of up to 30 terms


def logits_model(dims: str, kind: str = "float") -> tuple[ir.Model, ir.Value]:
    text = f'<ir_version: 10, opset_import: ["" : 18]>\ng ({kind}[{dims}] x) => ({kind}[{dims}] logits) {{ logits = Identity(x) }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    parse_pipeline(CANONICAL).run(model)
    return model, model.graph.outputs[0]


def results(
    dims: str, x: np.ndarray, target: np.ndarray, kind: str, **settings: Any
) -> tuple[float, np.ndarray, str]:
    """Return the loss, dloss/dlogits and the reduction that the frontends read off the graph."""
    model, logits = logits_model(dims)
    loss = append_loss(model, logits, kind, **settings)
    (gradient,) = append_gradients(model, loss, [model.graph.inputs[0]]).values()
    node = ir.node("Identity", [gradient])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        "g",
        ir.TensorType(ir.DataType.FLOAT),
        logits.shape,
    )
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    found = run_gradients(model, {"x": x, settings.get("labels", "labels"): target})
    return float(found[str(loss.name)]), found["g"], find_reduction(loss).kind


def cross_entropy(
    x: np.ndarray, labels: np.ndarray, axis: int, reduction: str, ignored: int | None
) -> tuple[float, np.ndarray]:
    z = np.moveaxis(x.astype(np.float64), axis, -1)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    kept = np.ones(labels.shape) if ignored is None else (labels != ignored).astype(np.float64)
    known = np.where(kept > 0, labels, 0)
    divisor = kept.sum() if reduction == "mean" else 1.0
    loss = -(np.take_along_axis(log_p, known[..., None], -1)[..., 0] * kept).sum() / divisor
    one_hot = np.eye(z.shape[-1])[known]
    return loss, np.moveaxis((np.exp(log_p) - one_hot) * kept[..., None] / divisor, -1, axis)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [None, -100, 2])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), None), ((6, 5), 0), ((2, 3, 5), None), ((2, 5, 3), 1), ((5, 2, 3), 0), ((2, 2, 3, 5), -1), ((2, 2, 5, 3), -2)]
)  # fmt: skip
def test_cross_entropy(
    shape: tuple[int, ...], axis: int | None, ignored: int | None, reduction: str, symbolic: bool
) -> None:
    rng = np.random.default_rng(len(shape))
    place = len(shape) - 1 if axis is None else axis % len(shape)
    x = rng.standard_normal(shape).astype(np.float32)
    labels = rng.integers(0, 5, [dim for index, dim in enumerate(shape) if index != place])
    if ignored is not None:
        labels.reshape(-1)[::2] = ignored
    dims = ", ".join(f"D{index}" if symbolic else str(dim) for index, dim in enumerate(shape))
    loss, gradient, told = results(
        dims, x, labels, "cross-entropy", class_axis=axis, reduction=reduction, ignore_index=ignored
    )
    expected = cross_entropy(x, labels, place, reduction, ignored)
    assert told == reduction
    np.testing.assert_allclose(loss, expected[0], rtol=TOLERANCE)
    np.testing.assert_allclose(gradient, expected[1], atol=TOLERANCE * np.abs(expected[1]).max())


TORCH = np.load(DATA / "autodiff" / "cross_entropy.npz")


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["axis1", "last"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignoring", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["matrix", "batch_of_one", "sequence", "image"])
def test_cross_entropy_is_that_of_torch(
    name: str, smoothing: float, weighted: bool, ignoring: bool, reduction: str, last: bool, symbolic: bool
) -> None:
    x, labels = TORCH[f"{name}/x"], TORCH[f"{name}/{'ignored' if ignoring else 'labels'}"]
    key = f"{name}/{smoothing}/{weighted:d}/{ignoring:d}/{reduction}"
    expected_loss, expected = TORCH[f"{key}/loss"], TORCH[f"{key}/gradient"]
    if last:
        x, expected = (np.ascontiguousarray(np.moveaxis(array, 1, -1)) for array in (x, expected))
    dims = ", ".join(f"D{index}" if symbolic else str(dim) for index, dim in enumerate(x.shape))
    loss, gradient, told = results(
        dims,
        x,
        labels,
        "cross-entropy",
        class_axis=None if last else 1,
        reduction=reduction,
        ignore_index=-100 if ignoring else None,
        label_smoothing=smoothing,
        class_weights=TORCH["weights"].tolist() if weighted else (),
    )
    assert told == reduction
    np.testing.assert_allclose(loss, expected_loss, rtol=TOLERANCE)
    np.testing.assert_allclose(gradient, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("dims", ["4, 3", "N, M", "N, 3"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_losses_of_elements(kind: str, reduction: str, dims: str) -> None:
    rng = np.random.default_rng(1)
    x = (5 * rng.standard_normal((4, 3))).astype(np.float32)
    x[0, 0], x[0, 1] = 60.0, -60.0  # where a sigmoid is 1 or 0 in float32, the loss must not be infinite
    labels = rng.random((4, 3)).astype(np.float32)
    z, y = x.astype(np.float64), labels.astype(np.float64)
    scale = 12 if reduction == "mean" else 1
    if kind == "mse":
        expected, slope = ((z - y) ** 2).sum() / scale, 2 * (z - y) / scale
    else:
        sigmoid = 1 / (1 + np.exp(-z))
        expected, slope = (np.logaddexp(0, z) - y * z).sum() / scale, (sigmoid - y) / scale
    loss, gradient, told = results(dims, x, labels, kind, reduction=reduction, labels="target")
    assert told == reduction
    np.testing.assert_allclose(loss, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(gradient, slope, atol=TOLERANCE * np.abs(slope).max())


def test_labels_have_the_logits_shape_without_classes_and_its_names() -> None:
    model, logits = logits_model("B, T, 5")
    append_loss(model, logits, "cross-entropy", labels="y")
    labels = model.graph.inputs[-1]
    assert (labels.name, labels.dtype, [str(dim) for dim in labels.shape or ()]) == (
        "y",
        ir.DataType.INT64,
        ["B", "T"],
    )
    model, logits = logits_model("B, 1")
    append_loss(model, logits, "bce")
    labels = model.graph.inputs[-1]
    assert (labels.name, labels.dtype, [str(dim) for dim in labels.shape or ()]) == (
        "labels",
        ir.DataType.FLOAT,
        ["B", "1"],
    )


def test_a_loss_of_half_precision_logits_is_float32() -> None:
    model, logits = logits_model("4, 5", "float16")
    loss = append_loss(model, logits, "cross-entropy")
    assert loss.dtype == ir.DataType.FLOAT
    assert loss.name == "loss"


@pytest.mark.parametrize(
    ("dims", "kind", "settings", "message"),
    [
        ("5", "cross-entropy", {}, "the logits 'logits' have 1 dimensions; cross-entropy needs examples and classes"),
        ("4, 5", "cross-entropy", {"class_axis": 2}, "the logits 'logits' have 2 dimensions, so 2 cannot be the axis of the classes"),
        ("4, 5", "mse", {"class_axis": 1}, "--class-axis belongs to the loss cross-entropy, not to mse"),
        ("4, 5", "bce", {"ignore_index": 0}, "--ignore-index belongs to the loss cross-entropy, not to bce"),
        ("4, 5", "bce", {"label_smoothing": 0.1}, "--label-smoothing belongs to the loss cross-entropy, not to bce"),
        ("4, 5", "mse", {"class_weights": [1.0]}, "--class-weights belongs to the loss cross-entropy, not to mse"),
        ("4, 5", "cross-entropy", {"class_weights": [1.0, 2.0]}, "2 weights of classes are given, and the logits 'logits' have 5 classes"),
        ("4, 5", "mse", {"labels": "x"}, "the graph already has a value 'x', so the labels cannot be called that"),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_fit_is_refused(
    dims: str, kind: str, settings: dict[str, Any], message: str
) -> None:
    model, logits = logits_model(dims)
    with pytest.raises(UserError) as caught:
        append_loss(model, logits, kind, **settings)
    assert caught.value.message == message


def test_logits_that_are_no_numbers_are_refused() -> None:
    model, logits = logits_model("4", "int64")
    with pytest.raises(UserError, match="the logits 'logits' are of type int64, not floating-point numbers"):
        append_loss(model, logits, "mse")
