"""What the case tables cannot say of neural-network operators: randomness, half types, old forms, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from autodiff_graphs import append_gradients, run_gradients

from kfac_onnx.autodiff import differentiate
from kfac_onnx.autodiff.decompose import has_body
from kfac_onnx.autodiff.table import RULES
from kfac_onnx.errors import UserError
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

RNG = np.random.default_rng(5)


def model_of(text: str, opset: int = 18) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}'))
    infer_shapes(model)
    return model


def gradients_of(
    model: ir.Model, feeds: Mapping[str, np.ndarray], *names: str, checked: bool = True
) -> dict[str, np.ndarray]:
    """Return outputs, and gradients of Σ first output · w (an input of the graph)."""
    values = {str(value.name): value for value in model.graph.inputs}
    seed = values["w"]
    outputs = append_gradients(model, {model.graph.outputs[0]: seed}, [values[name] for name in names])
    if checked:
        results = run_gradients(model, feeds)
    else:
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
        found = session.run(None, dict(feeds))
        results = dict(zip([item.name for item in session.get_outputs()], found, strict=True))
    return {**results, **{f"d{name}": results[output] for name, output in outputs.items()}}


DROPOUT = """g (float[20,30] x, float[20,30] w) => (float[20,30] z)
    <float ratio = {0.25}, bool training = {1}> { %s = Dropout%s(x, ratio, training) }"""


@pytest.mark.parametrize("outputs", ["z", "z, mask"])
@pytest.mark.parametrize("seed", ["", "<seed = 3>"])
def test_dropout_masks_its_gradient_by_the_forward_mask(outputs: str, seed: str) -> None:
    x = RNG.standard_normal((20, 30)).astype(np.float32)
    x[:, ::3] = 0  # the mask cannot be told from the output there
    w = RNG.standard_normal((20, 30)).astype(np.float32)
    model = model_of(DROPOUT % (outputs, seed))
    mask = next(node for node in model.graph if node.op_type == "Dropout")
    found = gradients_of(model, {"x": x, "w": w}, "x")
    assert len(mask.outputs) == 2
    kept = found["dx"] != 0
    assert 0.6 < kept.mean() < 0.9
    assert np.array_equal(kept[x != 0], (found["z"] != 0)[x != 0])
    np.testing.assert_allclose(found["dx"], np.where(kept, w / 0.75, 0), rtol=1e-6)  # one rounding
    assert kept[:, ::3].any()
    assert not kept[:, ::3].all()


def test_dropout_decided_at_run_time() -> None:
    text = """g (float[20,30] x, float[20,30] w, bool training, float ratio) => (float[20,30] z)
        { z = Dropout(x, ratio, training) }"""
    x = np.ones((20, 30), np.float32)
    for training, ratio in ((True, 0.5), (False, 0.5), (True, 0.0)):
        feeds = {"x": x, "w": x, "training": np.array(training), "ratio": np.array(ratio, np.float32)}
        found = gradients_of(model_of(text), feeds, "x")
        np.testing.assert_array_equal(found["dx"], found["z"])  # 0 or 1 / (1 − ratio), exact numbers


@pytest.mark.parametrize("kept", ["keepdims = 0", "keepdims = 1"])
def test_a_node_outside_training_is_not_given_a_mask(kept: str) -> None:
    model = model_of(
        f"g (float[2,3] x) => (float l) {{ d = Dropout(x) a = ReduceSum<{kept}>(d) l = Squeeze(a) }}"
    )
    differentiate(model, model.graph.outputs[0], list(model.graph.inputs))
    assert all(len(node.outputs) == 1 for node in model.graph)


def test_group_normalization_before_opset_21_scales_groups() -> None:
    """ONNX calls this form deprecated and does not check it; onnxruntime runs it."""
    x, w = (RNG.standard_normal((2, 6, 3)).astype(np.float32) for _ in range(2))
    scale, bias = (RNG.standard_normal(2).astype(np.float32) for _ in range(2))
    text = """g (float[2,6,3] x, float[%d] s, float[%d] b, float[2,6,3] w) => (float[2,6,3] z)
        { z = GroupNormalization<num_groups = 2>(x, s, b) }"""
    old = gradients_of(
        model_of(text % (2, 2)), {"x": x, "s": scale, "b": bias, "w": w}, "x", "s", "b", checked=False
    )
    each = {"x": x, "s": scale.repeat(3), "b": bias.repeat(3), "w": w}
    new = gradients_of(model_of(text % (6, 6), 21), each, "x", "s", "b")
    # float32 sums of 18 terms, in another order
    np.testing.assert_allclose(old["dx"], new["dx"], atol=1e-5)
    for name in ("ds", "db"):
        np.testing.assert_allclose(old[name], new[name].reshape(2, 3).sum(1), rtol=1e-4, atol=1e-5)


TYPED = [
    "Relu(x)",
    "Gelu(x)",
    "Softmax(x)",
    "LayerNormalization(x, s, s)",
    "RMSNormalization(x, s)",
    "ReduceLogSumExp(x)",
    "HardSwish(x)",
    "Attention(q, q, q)",
    "Swish(x)",
]


@pytest.mark.parametrize("op", TYPED)
def test_half_types_round_only_what_they_must(op: str) -> None:
    """The float16 gradient is the float32 one up to a few roundings of float16 (2⁻¹¹ each)."""
    x, w = (RNG.uniform(-1, 1, (3, 8)).astype(np.float16) for _ in range(2))
    scale = RNG.uniform(0.5, 1, 8).astype(np.float16)
    results: dict[str, np.ndarray] = {}
    for kind, dtype in (("float16", np.float16), ("float", np.float32)):
        text = f"""g ({kind}[3,8] x, {kind}[8] s, {kind}[3,8] w) => ({kind}[3,8] z) {{
            shape = Constant<value_ints = [1, 1, 3, 8]>()
            back = Constant<value_ints = [3, 8]>()
            q = Reshape(x, shape) y = {op} e = Shape(x)
            {"r = Reshape(y, back) z = Identity(r)" if "Attention" in op else "z = Expand(y, e)"} }}"""
        feeds = {"x": x.astype(dtype), "s": scale.astype(dtype), "w": w.astype(dtype)}
        found = gradients_of(model_of(text, 24), feeds, "x", checked=False)
        results[kind] = found["dx"]
    assert results["float16"].dtype == np.float16
    off = np.abs(results["float16"].astype(np.float32) - results["float"]).max()
    assert off <= 3e-3 * np.abs(results["float"]).max()


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (
            'y = LSTM<hidden_size = 2, activations = ["Relu", "Tanh", "Tanh"]>(x, w, r)',
            "activations other than sigmoid, tanh, tanh are not supported",
        ),
        ("y = LSTM<hidden_size = 2, clip = 1.0>(x, w, r)", "clip is not supported"),
        (
            "y = LSTM<hidden_size = 2>(x, w, r, , , , , p)",
            "peephole weights are not supported",
        ),
        ("y = LSTM<hidden_size = 2, layout = 1>(x, w, r)", "layout=1 is not supported"),
        (
            "y = ReduceL2<noop_with_empty_axes = 1>(x)",
            "noop_with_empty_axes without axes is not supported",
        ),
        (
            "y, m, i = LayerNormalization(x, s) z = Add(m, i) y2 = Identity(z)",
            "the loss depends on its saved mean or deviation, which is not supported",
        ),
        ("y = LpPool<kernel_shape = [1]>(x)", "no rule for ai.onnx::LpPool"),
    ],
)
def test_what_is_not_covered_is_said(nodes: str, reason: str) -> None:
    last = "y2" if "y2" in nodes else "y"
    model = model_of(f"""g (float[4,3,2] x, float[1,8,2] w, float[1,8,2] r, float[1,6] p, float[2] s) => (float l)
        {{ {nodes} l = ReduceSum<keepdims = 0>({last}) }}""")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(UserError) as caught:
        differentiate(model, model.graph.outputs[0], [model.graph.inputs[0]])
    (tried,) = caught.value.tried
    assert tried.partition(": ")[2] == reason
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_class_weights_are_refused() -> None:
    text = "g (float[4,3] x, int64[4] t, float[3] w) => (float l) { l = %s(x, t, w) }"
    for op in ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"):
        model = model_of(text % op)
        with pytest.raises(UserError) as caught:
            differentiate(model, model.graph.outputs[0], [model.graph.inputs[2]])
        assert caught.value.tried[0].endswith("its class weights are trained, which is not supported")


def test_every_label_ignored_gives_no_gradient() -> None:
    text = """g (float[4,3] x, int64[4] t, float w) => (float z)
        { z = SoftmaxCrossEntropyLoss<ignore_index = 1>(x, t) }"""
    feeds = {"x": np.ones((4, 3), np.float32), "t": np.ones(4, np.int64), "w": np.array(1, np.float32)}
    assert not gradients_of(model_of(text), feeds, "x")["dx"].any()


def test_random_operators_are_not_written_out_again() -> None:
    assert has_body("Swish")
    assert not has_body("Bernoulli")
    assert not has_body("MatMul")
    assert not has_body("NoSuchOperator")


def test_a_body_that_cannot_be_differentiated_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "Sigmoid")
    model = model_of("g (float[3] x) => (float l) { y = Swish(x) l = ReduceSum<keepdims = 0>(y) }", 24)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(UserError) as caught:
        differentiate(model, model.graph.outputs[0], [model.graph.inputs[0]])
    assert list(caught.value.tried) == ["Swish 'y': no rule for ai.onnx::Sigmoid"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert len(list(model.graph.inputs[0].uses())) == 1
