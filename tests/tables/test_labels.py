"""Labels that are no classes, and batches without examples, get a sentence before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

NUMBERS = ", ".join(str(number / 10) for number in range(20))
BEFORE = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (int64[N] ids) => (float[N, 4] z) <float[5, 4] table = {{{NUMBERS}}}> {{ z = Gather(table, ids) }}"""
IDS = np.array([1, 2, 0])
LARGEST = "labels from 0 to 3 are allowed"
HINT = "; --ignore-index of `differentiate` names a label that does not count"


def own_loss(labels: str, kind: str) -> ir.Model:
    """Return a graph that computes its loss itself, from int32[N, 1] labels that it views and masks."""
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
        g (int64[N] ids, int32[N, 1] y) => (float loss)
        <float[5, 4] table = {{{NUMBERS}}}, int64[1] last = {{-1}}, int64 gone = {{-7}}, int64 zero = {{0}}> {{
            z = Gather(table, ids) w = Cast<to: int = 7>(y)
            {labels}
            {kind}
        }}"""
    return kx.differentiate(onnx.parser.parse_model(text), loss_output="loss")


ENTROPY = "t = Reshape(v, last) loss = SoftmaxCrossEntropyLoss(z, t)"
LIKELIHOOD = "t = Reshape(v, last) l = LogSoftmax<axis: int = 1>(z) loss = NegativeLogLikelihoodLoss(l, t)"
GATHERED = "l = LogSoftmax<axis: int = 1>(z) p = GatherElements<axis: int = 1>(l, v) m = Neg(p) loss = ReduceMean<keepdims: int = 0>(m)"
IGNORING = "t = Reshape(v, last) loss = SoftmaxCrossEntropyLoss<ignore_index: int = -7>(z, t)"
PLAIN, MASKED = "v = Identity(w)", "o = Equal(w, gone) v = Where(o, zero, w)"


def refusal(session: kx.TrainingSession, batch: dict[str, np.ndarray]) -> UserError:
    """Check that a step and an evaluation refuse a batch alike, and that a step changes nothing."""
    before = session.parameters["table"].copy()
    with pytest.raises(UserError) as stepped:
        session.step(batch)
    with pytest.raises(UserError) as evaluated:
        session.evaluate([batch])
    assert evaluated.value.message == stepped.value.message
    np.testing.assert_array_equal(session.parameters["table"], before)
    return stepped.value


@pytest.mark.parametrize("label", [4, -1, 100, -100])
def test_a_label_that_is_no_class(label: int) -> None:
    model = kx.transform(kx.differentiate(onnx.parser.parse_model(BEFORE)))
    with kx.TrainingSession(model) as session:
        error = refusal(session, {"ids": IDS, "labels": np.array([0, label, 3])})
        assert error.message == (
            f"label {label} in input 'labels' is no class of the scores 'z', which have 4 classes"
        )
        assert error.help == f"{LARGEST}{HINT if label < 0 else ''}; nothing was written"
        assert np.isfinite(session.step({"ids": IDS, "labels": np.array([0, 2, 3])})["loss"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_ignored_label_is_allowed(smoothing: float) -> None:
    made = kx.differentiate(onnx.parser.parse_model(BEFORE), ignore_index=-100, label_smoothing=smoothing)
    with kx.TrainingSession(kx.transform(made)) as session:
        assert np.isfinite(session.step({"ids": IDS, "labels": np.array([-100, 2, 3])})["loss"])
        error = refusal(session, {"ids": IDS, "labels": np.array([-100, 2, -1])})
        assert (
            error.message == "label -1 in input 'labels' is no class of the scores 'z', which have 4 classes"
        )
        assert error.help == f"{LARGEST}, and -100, which is ignored; nothing was written"


@pytest.mark.parametrize("label", [4, -1])
@pytest.mark.parametrize(
    "kind", [ENTROPY, LIKELIHOOD, GATHERED, IGNORING], ids=["entropy", "likelihood", "gathered", "ignoring"]
)
@pytest.mark.parametrize("labels", [PLAIN, MASKED], ids=["views", "masks"])
def test_through_views_and_masks(labels: str, kind: str, label: int) -> None:
    with kx.TrainingSession(kx.transform(own_loss(labels, kind))) as session:
        allowed = -7 if labels == MASKED or kind == IGNORING else 1
        good = np.array([[0], [allowed], [3]], np.int32)
        assert np.isfinite(session.step({"ids": IDS, "y": good})["loss"])
        error = refusal(session, {"ids": IDS, "y": np.array([[0], [label], [3]], np.int32)})
        assert (
            error.message == f"label {label} in input 'y' is no class of the scores 'z', which have 4 classes"
        )


def test_a_batch_without_examples() -> None:
    text = BEFORE.replace("int64[N] ids", "int64[N, T] ids").replace(
        "z = Gather(table, ids)", "h = Gather(table, ids) z = ReduceMean<keepdims: int = 0>(h, one)"
    )
    text = text.replace("> { h =", ", int64[1] one = {1}> { h =")
    model = kx.transform(kx.differentiate(onnx.parser.parse_model(text), reduction="sum"))
    with kx.TrainingSession(model) as session:
        empty = {"ids": np.zeros((0, 5), np.int64), "labels": np.zeros(0, np.int64)}
        error = refusal(session, empty)
        assert error.message == "the batch holds no examples: 'ids' has shape [0, 5]"
        assert error.help == "leave such batches out; nothing was written"
        assert np.isfinite(
            session.step({"ids": np.ones((3, 5), np.int64), "labels": np.array([0, 2, 3])})["loss"]
        )
