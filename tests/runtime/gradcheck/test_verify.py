from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kfac_onnx import metadata
from kfac_onnx.api import scan
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import Parameter
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime.gradcheck import derivative
from kfac_onnx.runtime.gradcheck.float_type import narrowest, only_for, widened
from kfac_onnx.runtime.gradcheck.verify import GradientCheck, verify_gradients

GRAPHS = Path(__file__).parents[2] / "data" / "graphs"
Arrays = dict[str, np.ndarray[Any, Any]]


def given(name: str, model: ir.Model) -> tuple[Arrays, Arrays]:
    """Return the batch and the parameters that come with a graph of the test data."""
    trained = {item.name for item in metadata.read_list(model, "parameters", Parameter)}
    inputs = {value.name for value in model.graph.inputs}
    with np.load(GRAPHS / f"{name}.npz") as file:
        arrays = {key[3:]: file[key] for key in file.files if key.startswith("in:")}
    batch = {key: array for key, array in arrays.items() if key in inputs and key not in trained}
    return batch, {key: array for key, array in arrays.items() if key in trained}


def check(name: str, model: ir.Model | None = None) -> dict[str, GradientCheck]:
    path = GRAPHS / f"{name}.onnx"
    model = model if model is not None else read_training_graph(path)
    batch, parameters = given(name, model)
    found = verify_gradients(model, batch, parameters=parameters, sites=scan(path).sites)
    return {item.parameter: item for item in found}


@pytest.mark.parametrize(
    "name",
    [
        "ortart_dyncore__nplm",
        "ortart_dynloss__nplm_ignore",
        "ortart_leg14loss__nplm_pad0",  # the padding row is meant to have no gradient
        "ortart_legcore__lookup_transpose",
        "torchjoint_in__dlrm_offsets_mean",
        "torchjoint_in__lookup_onehot",  # has a kink where ReLU is 0
        "torchjoint_in__nplm_fp16",
        "torchjoint_in__gru_lm",
    ],
)
def test_right_gradients_pass(name: str) -> None:
    found = check(name)
    assert found
    assert {item.status for item in found.values()} == {"ok"}
    assert {item.arithmetic for item in found.values()} == {"float64"}


def test_an_operator_without_float64_is_run_by_the_slow_evaluator() -> None:
    found = check("torchjoint_in__gpt_tied")  # Gelu
    assert {item.status for item in found.values()} == {"ok"}
    # float32 gradients agree with float64 differences to rounding of the graph itself
    assert max(item.error or 0.0 for item in found.values()) < 1e-4


def scaled(model: ir.Model, gradient: str, factor: float) -> ir.Model:
    """Return the model with one gradient multiplied by a factor, under its own name."""
    proto = ir.to_proto(model)
    graph = proto.graph
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == gradient:
                node.output[index] = "unscaled"
        for index, name in enumerate(node.input):
            if name == gradient:
                node.input[index] = "unscaled"
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(factor), "factor"))
    graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "factor"], [gradient]))
    return ir.from_proto(proto)


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0, 0.0])
@pytest.mark.parametrize("parameter", ["emb.weight", "fc.bias"])
def test_a_gradient_off_by_a_hundredth_is_wrong(parameter: str, factor: float) -> None:
    model = read_training_graph(GRAPHS / "ortart_dyncore__nplm.onnx")
    pair = next(p for p in metadata.read_list(model, "parameters", Parameter) if p.name == parameter)
    found = check("ortart_dyncore__nplm", scaled(model, str(pair.gradient), factor))
    assert found[parameter].status == "wrong"
    assert found[parameter].why == "it is not the gradient of the loss"
    assert {item.status for name, item in found.items() if name != parameter} == {"ok"}


def test_a_parameter_that_an_exporter_merged_with_another_is_found() -> None:
    # two tables began with equal values, the exporter kept one, and its gradient is that of one use only
    path = GRAPHS / "torchjoint_initopt__identical_init.onnx"
    model = read_training_graph(path)
    batch, parameters = given("torchjoint_initopt__identical_init", model)
    found = {item.parameter: item for item in verify_gradients(model, batch, parameters=parameters)}
    assert found["m.emb_a.weight"].status == "wrong"


def test_a_random_loss_cannot_be_checked() -> None:
    with pytest.raises(UserError) as caught:
        check("ortart_dyncore__nplm_dropout")
    assert str(caught.value) == (
        "the graph's loss is random, so its gradients cannot be checked\n  help: export it without dropout"
    )


def test_missing_values_are_named() -> None:
    model = read_training_graph(GRAPHS / "ortart_dyncore__nplm.onnx")
    batch, parameters = given("ortart_dyncore__nplm", model)
    del parameters["fc.bias"]
    with pytest.raises(UserError) as caught:
        verify_gradients(model, batch, parameters=parameters)
    assert str(caught.value) == (
        "the parameter 'fc.bias' has no value\n  help: give it with --parameters FILE"
    )
    with pytest.raises(UserError) as caught:
        verify_gradients(model, batch, parameters=parameters | {"fc.bias": np.zeros(3, np.float32)})
    assert str(caught.value) == ("the value of parameter 'fc.bias' has shape [3], but the graph wants [16]")


def test_a_graph_without_loss_has_nothing_to_check() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1] x) => (float[1] y) { y = Neg(x) }'
    )
    with pytest.raises(UserError) as caught:
        verify_gradients(model, {})
    assert str(caught.value) == (
        "the graph has no loss, so its gradients cannot be checked\n  help: name it with --loss"
    )


MIXED = """<ir_version: 10, opset_import: ["" : 18]>
g (float16[2] x, bool c) => (float[2] y, float[2] unused) <float[2] w = {1, 2}> {
  half = Constant <value_float = 0.1> ()
  wide = Cast <to = 1> (x)
  z = If (c) <
    then_branch = a () => (float[2] p) { k = Constant <value_floats = [0.1, 0.2]> () p = Add(wide, k) },
    else_branch = b () => (float[2] q) { q = Identity(wide) }
  >
  scaled = Mul(z, half)
  y = Mul(scaled, w)
  unused = Neg(w)
}
"""


def test_a_widened_graph_has_no_narrow_float() -> None:
    proto = widened(only_for(onnx.parser.parse_model(MIXED), ["y"]), np.float64)
    assert [value.name for value in proto.graph.output] == ["y"]
    assert all(node.op_type != "Neg" for node in proto.graph.node)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.array([1.0, 2.0]), "c": np.array(True)}
    (found,) = session.run(None, feeds)
    assert found.dtype == np.float64
    # 0.1 was float32 in the graph, and stays that number or becomes the exact one; both to 1e-7
    np.testing.assert_allclose(found, [1.1 * 0.1, 2.2 * 0.1 * 2], rtol=1e-7)
    assert narrowest(onnx.parser.parse_model(MIXED)) == "FLOAT16"
    assert narrowest(proto) == "DOUBLE"


def test_a_one_hot_of_tensorflow_is_run_in_float64() -> None:
    found = check("tf2onnx_in__nplm")  # its depth has shape [1], and ONNX Runtime has no float64 OneHot
    assert {(item.status, item.arithmetic) for item in found.values()} == {("ok", "float64")}


@pytest.mark.parametrize(
    "name",
    [
        "tf2onnx_in__nplm",  # the loss bends within the first step
        "tf2onnx_in__bag_sum",
        "tf2onnx_sparse__twotower",  # ReLU's kinks
        "ortart_dyncore__lookup_index",
    ],
)
def test_float32_never_calls_a_right_gradient_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivative, "_WAYS", [way for way in derivative._WAYS if way[0] == "float32"])  # pyright: ignore[reportPrivateUsage]  no public graph is slow enough
    found = check(name)
    assert {item.arithmetic for item in found.values()} == {"float32"}
    assert {item.status for item in found.values()} <= {"ok", "unclear"}
    assert sum(item.status == "ok" for item in found.values()) >= len(found) / 2


@pytest.mark.parametrize("gradient", ["emb_grad", "fc_w_grad", "out_b_grad"])
def test_float32_finds_a_scaled_gradient(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivative, "_WAYS", [way for way in derivative._WAYS if way[0] == "float32"])  # pyright: ignore[reportPrivateUsage]  as above
    name = "tf2onnx_in__nplm"
    # 1.05: beyond the tolerance of float32, 5e-3 and rounding
    model = scaled(read_training_graph(GRAPHS / f"{name}.onnx"), gradient, 1.05)
    found = check(name, model)
    wrong = {item.gradient for item in found.values() if item.status == "wrong"}
    assert wrong == {gradient}
