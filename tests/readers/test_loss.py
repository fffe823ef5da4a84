from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.readers import emit_divisor
from kfac_onnx.readers.loss import choose_loss, find_reduction, loss_candidates

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

HEAD = '<ir_version: 10, opset_import: ["" : 18]> g '
INPUTS = "(float[n,5] x, int64[n] t, float[5] w)"
X = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
T = np.array([0, 3, 3, 1])
W = np.array([1, 2, 3, 4, 5], np.float32)
CROSS = "SoftmaxCrossEntropyLoss"
COUNT = "c = Shape <end = 1> (x)  d = Cast <to = 1> (c)  e = Squeeze (d)"

CASES = {
    "cross entropy": (f'l = {CROSS} <reduction = "mean"> (x, t)', "mean", 4),
    "cross entropy, default reduction": (f"l = {CROSS} (x, t)", "mean", 4),
    "ignored labels": (f"l = {CROSS} <ignore_index = 3> (x, t)", "mean", 2),
    "weighted labels": (f"l = {CROSS} (x, t, w)", "mean", 1 + 4 + 4 + 2),
    "weighted and ignored": (f"l = {CROSS} <ignore_index = 3> (x, t, w)", "mean", 1 + 2),
    "cross entropy sum": (f'l = {CROSS} <reduction = "sum"> (x, t)', "sum", 1),
    "mean of single losses": (
        f'p = {CROSS} <reduction = "none"> (x, t)  l = ReduceMean <keepdims = 0> (p)',
        "mean",
        4,
    ),
    "negative log likelihood": ("p = LogSoftmax (x)  l = NegativeLogLikelihoodLoss (p, t)", "mean", 4),
    "elements": ("s = Mul (x, x)  l = ReduceMean <keepdims = 0> (s)", "mean", 20),
    "mean over the batch of sums": (
        "a = Constant <value = int64[1] {1}> ()  s = ReduceSum <keepdims = 0> (x, a)"
        "l = ReduceMean <keepdims = 0> (s)",
        "mean",
        4,
    ),
    "views": (
        "s = ReduceMean <keepdims = 1> (x)  q = Squeeze (s)  r = Neg (q)  l = Cast <to = 1> (r)",
        "mean",
        20,
    ),
    "sum over a count": (f"{COUNT}  s = ReduceSum <keepdims = 0> (x)  l = Div (s, e)", "mean", 4),
    "negated sum over a count": (
        f"{COUNT}  s = ReduceSum <keepdims = 0> (x)  r = Neg (s)  q = Div (r, e)  l = Neg (q)",
        "mean",
        4,
    ),
    "sum": ("s = Mul (x, x)  l = ReduceSum <keepdims = 0> (s)", "sum", 1),
    "two losses added": (
        f"a = {CROSS} (x, t)  b = ReduceMean <keepdims = 0> (x)  l = Add (a, b)",
        "unknown",
        None,
    ),
    "mean over a count": (f"{COUNT}  s = ReduceMean <keepdims = 0> (x)  l = Div (s, e)", "unknown", None),
    "a maximum": ("l = ReduceMax <keepdims = 0> (x)", "unknown", None),
}


@pytest.mark.parametrize("name", CASES)
def test_reduction_and_divisor(
    name: str, build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    body, kind, expected = CASES[name]
    model = build(f"{HEAD} {INPUTS} => (float l) {{ {body} }}")
    assert find_reduction(model.graph.outputs[0]).kind == kind
    metadata.write(model, "loss", metadata.Loss("l", "unknown"))
    divisor = emit_divisor(model)
    if expected is None:
        assert divisor is None
        return
    assert divisor is not None
    model.graph.outputs.append(divisor)
    result = run(model, {"x": X, "t": T, "w": W})[str(divisor.name)]
    assert result == np.float32(expected)
    assert (result.dtype, result.shape) == (np.float32, ())


def test_a_divisor_of_one_entry_becomes_a_scalar(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build(
        f"{HEAD} (float[n,5] x, int64[1] d) => (float[1] l)"
        " { e = Cast <to = 1> (d)  s = ReduceSum <keepdims = 0> (x)  l = Div (s, e) }"
    )
    metadata.write(model, "loss", metadata.Loss("l", "mean"))
    divisor = emit_divisor(model)
    assert divisor is not None
    model.graph.outputs.append(divisor)
    assert run(model, {"x": X, "d": np.array([7])})["kfac/divisor"].shape == ()
    assert find_reduction(None).kind == "unknown"


FACTORS = {
    "one over all entries": (0.05, "mean", 20),
    "one over the examples": (0.25, "mean", 4),
    "negative": (-0.25, "mean", 4),
    "another factor": (0.5, "unknown", None),
    "one": (1.0, "unknown", None),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", FACTORS)
def test_a_constant_factor_says_a_mean_if_it_is_one_over_a_count(
    name: str, swapped: bool, build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    """For a batch of fixed size TensorFlow folds the division by its size into a factor."""
    number, kind, expected = FACTORS[name]
    operands = "k, s" if swapped else "s, k"
    model = build(
        f"{HEAD} (float[4,5] x) => (float l) <float k = {{{number}}}>"
        f" {{ s = ReduceSum <keepdims = 0> (x)  l = Mul ({operands}) }}"
    )
    assert find_reduction(model.graph.outputs[0]).kind == kind
    metadata.write(model, "loss", metadata.Loss("l", "unknown"))
    divisor = emit_divisor(model)
    assert (divisor is None) is (expected is None)
    if divisor is not None:
        model.graph.outputs.append(divisor)
        assert run(model, {"x": X})[str(divisor.name)] == np.float32(expected)


def test_candidates_are_scalars_that_are_no_gradients(build: Callable[[str], ir.Model]) -> None:
    model = build(
        f"{HEAD} (float[3] x) => (float a, float[1] b, float[3] c, int64 d, float e)"
        " { a = ReduceSum <keepdims = 0> (x)  b = ReduceSum (x)  c = Neg (x)  d = Size (x)"
        "e = ReduceMax <keepdims = 0> (x) }"
    )
    outputs = {str(value.name): value for value in model.graph.outputs}
    assert loss_candidates(model, ()) == [outputs["a"], outputs["e"]]
    assert loss_candidates(model, [outputs["e"]]) == [outputs["a"]]
    assert loss_candidates(model, [outputs["a"], outputs["e"]]) == [outputs["b"]]


def test_no_loss_or_several(build: Callable[[str], ir.Model]) -> None:
    model = build(
        f"{HEAD} (float[3] x) => (float a, float e)"
        " { a = ReduceSum <keepdims = 0> (x) e = ReduceMax <keepdims = 0> (x) }"
    )
    with pytest.raises(UserError) as caught:
        choose_loss(list(model.graph.outputs), boundary=False, place="m.onnx")
    assert str(caught.value) == (
        "2 outputs of the graph could be the loss: a, e\n  --> m.onnx\n  help: name it with --loss NAME"
    )
    with pytest.raises(UserError) as caught:
        choose_loss([], boundary=False, place=None)
    assert str(caught.value) == (
        "no output of the graph is a scalar that could be the loss\n"
        "  help: export the loss as an output of the training graph, or name it with --loss NAME"
    )
    assert choose_loss([], boundary=True, place=None) is None
