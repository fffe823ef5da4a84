"""Outputs that are probabilities already: the loss is of what is before, or is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.errors import UserError

RNG = np.random.default_rng(2)
TABLE = RNG.standard_normal((7, 3)).astype(np.float32)
IDS = np.array([[1, 2], [6, 0], [3, 3], [2, 5]])
SUMS = TABLE[IDS].astype(np.float64).sum(axis=1)


def model_of(nodes: str, dims: str = "float[N, 3] p", more: str = "") -> onnx.ModelProto:
    numbers = ", ".join(f"{number:.9g}" for number in TABLE.reshape(-1))
    return onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (int64[N, 2] ids) => ({dims})
        <float[7, 3] table = {{{numbers}}}, int64[1] at = {{1}}, float one = {{1}}, float low = {{1e-7}},
         float high = {{0.9999999}}, int64[1] last = {{-1}}, int64[2] flat = {{-1, 3}}{more}> {{
            h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, at)
            {nodes}
        }}""")


def loss_of(model: ir.Model, labels: np.ndarray) -> float:
    import onnxruntime as ort

    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return float(session.run(["loss"], {"ids": IDS, "labels": labels})[0])


SIGMOIDS = {
    "plain": "p = Sigmoid(s)",
    "clipped": "q = Sigmoid(s) p = Clip(q, low, high)",
    "squeezed": "u = Unsqueeze(s, last) q = Sigmoid(u) p = Squeeze(q, last)",
    "cast": "q = Sigmoid(s) d = Cast<to: int = 11>(q) p = Cast<to: int = 1>(d)",
    "divided": "n = Neg(s) e = Exp(n) b = Add(one, e) p = Div(one, b)",
    "reciprocal": "n = Neg(s) e = Exp(n) b = Add(e, one) p = Reciprocal(b)",
}


@pytest.mark.parametrize("nodes", SIGMOIDS.values(), ids=SIGMOIDS)
def test_bce_is_of_what_is_before_the_sigmoid(nodes: str) -> None:
    labels = RNG.integers(0, 2, SUMS.shape).astype(np.float32)
    made = kx.differentiate(model_of(nodes), loss="bce")
    p = 1 / (1 + np.exp(-SUMS))
    expected = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    np.testing.assert_allclose(loss_of(made, labels), expected, rtol=3e-6)  # float32 over 12 terms
    (note,) = metadata.read_strings(made, "notes")
    assert note.startswith("the output 'p' holds probabilities: the loss is of '")
    assert note.endswith("', before the Sigmoid")


SOFTMAXES = {
    "plain": ("p = Softmax<axis: int = -1>(s)", "probabilities", "Softmax"),
    "log": ("p = LogSoftmax<axis: int = 1>(s)", "log probabilities", "LogSoftmax"),
    "log_of": (
        "q = Softmax<axis: int = 1>(s) c = Clip(q, low, high) p = Log(c)",
        "log probabilities",
        "LogSoftmax",
    ),
    "divided": (
        "e = Exp(s) t = ReduceSum<keepdims: int = 1>(e, last) p = Div(e, t)",
        "probabilities",
        "Softmax",
    ),
    "reshaped": ("q = Softmax<axis: int = -1>(s) p = Reshape(q, flat)", "probabilities", "Softmax"),
}


@pytest.mark.parametrize(("nodes", "name", "kind"), SOFTMAXES.values(), ids=SOFTMAXES)
def test_cross_entropy_is_of_what_is_before_the_softmax(nodes: str, name: str, kind: str) -> None:
    labels = np.array([0, 2, 1, 1])
    made = kx.differentiate(model_of(nodes))
    logs = SUMS - np.log(np.exp(SUMS).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(loss_of(made, labels), -logs[np.arange(4), labels].mean(), rtol=3e-6)
    assert metadata.read_strings(made, "notes") == [
        f"the output 'p' holds {name}: the loss is of 's', before the {kind}"
    ]


REFUSED = {
    "softmax_for_bce": (
        "p = Softmax<axis: int = -1>(s)",
        "bce",
        "probabilities of a Softmax",
        "cross-entropy",
    ),
    "logs_for_bce": (
        "p = LogSoftmax<axis: int = 1>(s)",
        "bce",
        "logarithms of probabilities",
        "cross-entropy",
    ),
    "sigmoid_for_ce": ("p = Sigmoid(s)", "cross-entropy", "probabilities of a Sigmoid", "bce"),
    "product": ("a = Sigmoid(s) b = Sigmoid(h0) p = Mul(a, b)", "bce", "probabilities", "mse"),
    "mean": ("a = Sigmoid(s) b = Sigmoid(h0) p = Mean(a, b)", "bce", "probabilities", "mse"),
    "complement": ("a = Sigmoid(s) p = Sub(one, a)", "bce", "probabilities", "mse"),
    "hard": ("p = HardSigmoid(s)", "bce", "probabilities", "mse"),
}


@pytest.mark.parametrize(("nodes", "loss", "what", "other"), REFUSED.values(), ids=REFUSED)
def test_other_probabilities_are_refused(nodes: str, loss: str, what: str, other: str) -> None:
    model = model_of("h0 = Neg(s) " + nodes)
    with pytest.raises(UserError) as error:
        kx.differentiate(model, loss=loss)
    assert (
        error.value.message
        == f"'p' holds {what}, and {loss} takes logits: it would squash them a second time"
    )
    assert error.value.help == (
        "name the value before with --logits NAME, a loss that the graph computes with --loss-output NAME, "
        f"or another loss: --loss {other}"
    )


def test_a_softmax_along_another_axis_is_refused() -> None:
    with pytest.raises(UserError) as error:
        kx.differentiate(model_of("p = Softmax<axis: int = 0>(s)"))
    assert error.value.message == "the Softmax that 'p' ends in is not taken along the axis of the classes"
    assert error.value.help == "name the value before it: --logits s, or the axis: --class-axis N"


@pytest.mark.parametrize(
    ("nodes", "loss"),
    [
        ("p = Identity(s)", "bce"),
        ("p = Sigmoid(s)", "mse"),
        ("q = Sigmoid(s) p = Add(q, s)", "bce"),
        ("q = Sigmoid(s) p = Mul(q, s)", "cross-entropy"),
        ("p = Tanh(s)", "cross-entropy"),
    ],
)
def test_what_is_no_probability_is_taken_as_it_is(nodes: str, loss: str) -> None:
    assert metadata.read_strings(kx.differentiate(model_of(nodes), loss=loss), "notes") == []
