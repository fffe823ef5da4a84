"""ModelProto.training_info: graphs joined, Gradient nodes differentiated as the standard says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from update_graphs import gradients, run_canonical, values

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.errors import UserError
from kfac_onnx.readers import initial_values, read_training_graph
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DOMAIN = "ai.onnx.preview.training"
HEAD = f'<ir_version: 9, opset_import: ["" : 18, "{DOMAIN}" : 1]>'
INFERENCE = f"""{HEAD}
inference (int64[N] ids) => (float[N, 1] p) <float[5, 3] W, float[3, 1] v> {{
    h = Gather<axis: int = 0>(W, ids)
    p = MatMul(h, v)
}}"""
LOSS = "e = Sub(p, y) s = Mul(e, e) loss = ReduceMean<keepdims: int = 0>(s)"
SGD = "aW = Mul(lr, dW) W_new = Sub(W, aW) av = Mul(lr, dv) v_new = Sub(v, av)"
GRADIENT = f'dW, dv = {DOMAIN}.Gradient<xs: strings = ["W", "v"], zs: strings = ["ids", "y"], y: string = "loss">(W, v, ids, y)'
BOTH = {"W": "W_new", "v": "v_new"}


def graph_of(body: str, outputs: str, inputs: str = "float[N, 1] y", held: str = "float lr = {0.1}"):
    text = f"{HEAD}\nalgorithm ({inputs}) => ({outputs}) <{held}> {{ {body} }}"
    return onnx.parser.parse_model(text).graph


def model_with(
    body: str = f"{LOSS} {GRADIENT} {SGD}",
    outputs: str = "float loss, float[5, 3] W_new, float[3, 1] v_new",
    bindings: Mapping[str, str] = BOTH,
    more: Sequence[tuple[onnx.GraphProto, Mapping[str, str]]] = (),
    **parts: str,
) -> onnx.ModelProto:
    """Return the inference graph with one algorithm, and with `more` of them."""
    model = onnx.parser.parse_model(INFERENCE)
    feed = values()
    for name in ("W", "v"):
        model.graph.initializer.append(numpy_helper.from_array(feed[name], name))
    for graph, binding in ((graph_of(body, outputs, **parts), bindings), *more):
        info = model.training_info.add()
        info.algorithm.CopyFrom(graph)
        for key, value in binding.items():
            info.update_binding.add(key=key, value=value)
    return model


def check(model: onnx.ModelProto) -> list[str]:
    """Compare the canonical graph with NumPy; return its notes."""
    canonical = read_training_graph(model)
    assert canonical.metadata_props["kfac.frontend"] == "training-info"
    assert [value.name for value in canonical.graph.inputs] == ["ids", "y"]
    loss, found = run_canonical(canonical, values())
    want_loss, want = gradients(values())
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert set(found) == {"W", "v"}
    for name, array in want.items():  # float32 rounding of a few products and sums
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6 * np.abs(array).max())
    return metadata.read_strings(canonical, "notes")


def refused(model: onnx.ModelProto) -> UserError:
    with pytest.raises(UserError) as caught:
        read_training_graph(model)
    return caught.value


def test_gradients_are_those_of_the_loss() -> None:
    notes = check(model_with())
    assert "1 Gradient node of training_info replaced by derivatives of loss" in notes
    assert "the graph's own optimizer is taken out (sgd, learning rate 0.1): 2 parameters" in notes


def test_the_model_given_is_not_changed() -> None:
    model = model_with()
    before = model.SerializeToString()
    read_training_graph(model)
    assert model.SerializeToString() == before


def test_gradient_node_before_its_loss_and_loss_that_is_no_output() -> None:
    check(model_with(f"{GRADIENT} {SGD} {LOSS}", "float[5, 3] W_new, float[3, 1] v_new"))


def test_one_gradient_node_per_parameter() -> None:
    nodes = (
        f'dW = {DOMAIN}.Gradient<xs: strings = ["W"], zs: strings = ["v", "ids", "y"], y: string = "loss">(W, v, ids, y)'
        f' dv = {DOMAIN}.Gradient<xs: strings = ["v"], zs: strings = ["W", "ids", "y"], y: string = "loss">(v, W, ids, y)'
    )
    check(model_with(f"{LOSS} {nodes} {SGD}"))


def test_gradient_of_an_intermediate_value_is_scattered_by_the_algorithm() -> None:
    body = (
        f'{LOSS} dh, dv = {DOMAIN}.Gradient<xs: strings = ["h", "v"], zs: strings = ["y"], y: string = "loss">(h, v, y)'
        " r = Mul(lr, dh) n = Neg(r) i = Unsqueeze(ids, last)"
        ' W_new = ScatterND<reduction: string = "add">(W, i, n) av = Mul(lr, dv) v_new = Sub(v, av)'
    )
    check(model_with(body, held="float lr = {0.1}, int64[1] last = {-1}"))


def test_an_intermediate_value_among_xs_cuts_what_it_is_computed_from() -> None:
    """With W and h = W[ids] both independent, y depends on W through nothing else: dy/dW is zero."""
    node = f'dW, dh, dv = {DOMAIN}.Gradient<xs: strings = ["W", "h", "v"], zs: strings = ["y"], y: string = "loss">(W, h, v, y)'
    canonical = read_training_graph(model_with(f"{LOSS} {node} {SGD}"))
    _, found = run_canonical(canonical, values())
    assert set(found) == {"v"}
    assert "'W' is changed by no gradient: it stays as it is" in metadata.read_strings(canonical, "notes")
    np.testing.assert_allclose(found["v"], gradients(values())[1]["v"], rtol=1e-5)


def test_gradient_at_another_value() -> None:
    """The node's inputs say where the derivative is taken: at twice v."""
    node = GRADIENT.replace("(W, v, ids, y)", "(W, v2, ids, y)")
    canonical = read_training_graph(model_with(f"v2 = Add(v, v) {LOSS} {node} {SGD}"))
    _, found = run_canonical(canonical, values())
    feed = values()
    feed["v"] = 2 * feed["v"]
    for name, array in gradients(feed)[1].items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6 * np.abs(array).max())


def test_a_penalty_on_a_gradient() -> None:
    """Second order: loss + Σ (dloss/dp)²; with p = W[ids]·v, dloss/dp = 2 (p − y) / N."""
    body = (
        f'{LOSS} dp = {DOMAIN}.Gradient<xs: strings = ["p"], zs: strings = ["y"], y: string = "loss">(p, y)'
        " q = Mul(dp, dp) penalty = ReduceSum<keepdims: int = 0>(q) total = Add(loss, penalty) "
        + GRADIENT.replace('"loss"', '"total"')
        + SGD
    )
    canonical = read_training_graph(model_with(body, "float total, float[5, 3] W_new, float[3, 1] v_new"))
    feed = values()
    outputs = {value.name: value for value in canonical.graph.outputs}
    assert metadata.read(canonical, "loss", metadata.Loss).value == "total"
    assert "total" in outputs
    rows = feed["W"][feed["ids"]].astype(np.float64)
    p = rows @ feed["v"].astype(np.float64)
    error, n = p - feed["y"], len(feed["ids"])
    slope = 2 / n * error + 2 * (2 / n * error) * (2 / n)
    session = ort.InferenceSession(
        ir.to_proto(canonical).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [item.name for item in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"ids": feed["ids"], "y": feed["y"]}), strict=True))
    np.testing.assert_allclose(found["dv"], rows.T @ slope, rtol=1e-5)


def test_consecutive_steps_are_one() -> None:
    """Two blocks, each with a loss of its own by the same names: one loss, gradients at the same values."""
    one = f'{LOSS} d = {DOMAIN}.Gradient<xs: strings = ["W"], zs: strings = ["y"], y: string = "loss">(W, y) a = Mul(lr, d) new = Sub(W, a)'
    two = one.replace('"W"', '"v"').replace("(W,", "(v,")
    second = graph_of(two, "float loss, float[3, 1] new")
    model = model_with(one, "float loss, float[5, 3] new", {"W": "new"}, [(second, {"v": "new"})])
    notes = check(model)
    assert "2 consecutive training steps are one: every gradient is taken at the same values" in notes


def test_two_losses_are_refused() -> None:
    one = f'{LOSS} d = {DOMAIN}.Gradient<xs: strings = ["W"], zs: strings = ["y"], y: string = "loss">(W, y) a = Mul(lr, d) new = Sub(W, a)'
    two = one.replace("(W,", "(v,").replace('"W"', '"v"').replace("ReduceMean", "ReduceSum")
    second = graph_of(two, "float loss, float[3, 1] new")
    model = model_with(one, "float loss, float[5, 3] new", {"W": "new"}, [(second, {"v": "new"})])
    error = refused(model)
    assert error.message == "training_info differentiates two losses: loss and loss.step2"
    assert error.help == "a training step has one loss: add them in the algorithm, or keep one training_info"


def test_gradients_written_out_need_no_gradient_node() -> None:
    body = (
        f"{LOSS} n = Size(y) m = Cast<to: int = 1>(n) w = Div(two, m) dp = Mul(w, e) ht = Transpose(h) dv = MatMul(ht, dp)"
        " vt = Transpose(v) dh = MatMul(dp, vt) z = ConstantOfShape(size) i = Unsqueeze(ids, last)"
        f' dW = ScatterND<reduction: string = "add">(z, i, dh) {SGD}'
    )
    held = "float lr = {0.1}, float two = {2.0}, int64[2] size = {5, 3}, int64[1] last = {-1}"
    check(model_with(body, held=held))


STATES = f"float[5, 3] mW = {{{', '.join('0' * 15)}}}, float[3, 1] mv = {{0, 0, 0}}"
MOMENTUM = (
    f"W_new, v_new, mW_new, mv_new = {DOMAIN}.Momentum<alpha = 0.9, beta = 1.0, norm_coefficient = 0.0, "
    'mode = "standard">(lr, t, W, v, gW, gv, mW, mv)'
)
KEPT = {**BOTH, "mW": "mW_new", "mv": "mv_new"}
NEWS = "float loss, float[5, 3] W_new, float[3, 1] v_new, float[5, 3] mW_new, float[3, 1] mv_new"
HELD = f"float lr = {{0.1}}, int64 t = {{0}}, float one = {{1}}, {STATES}"


@pytest.mark.parametrize(
    ("between", "optimizer", "said"),
    [
        ("gW = Identity(dW) gv = Identity(dv)", MOMENTUM, "momentum, learning rate 0.1"),
        ("aW = Neg(dW) gW = Neg(aW) gv = Identity(dv)", MOMENTUM, "momentum, learning rate 0.1"),
        (
            "gW = Identity(dW) gv = Identity(dv)",
            MOMENTUM.replace("norm_coefficient = 0.0", "norm_coefficient = 0.01"),
            "momentum, learning rate 0.1, with weight decay",
        ),
        (
            "low = Neg(one) gW = Clip(dW, low, one) gv = Clip(dv, low, one)",
            MOMENTUM,
            "momentum, learning rate 0.1, with gradients clipped",
        ),
        (
            "gW = Identity(dW) gv = Identity(dv)",
            MOMENTUM.replace("Momentum", "Adagrad")
            .replace("alpha = 0.9, beta = 1.0, ", "")
            .replace(', mode = "standard"', ""),
            "adagrad, learning rate 0.1",
        ),
    ],
)
def test_an_optimizer_node_is_read_as_what_it_is(between: str, optimizer: str, said: str) -> None:
    """Its gradient input goes back to the derivative, whatever is done to that on the way."""
    notes = check(model_with(f"{LOSS} {GRADIENT} {between} {optimizer}", NEWS, KEPT, held=HELD))
    assert f"the graph's own optimizer is taken out ({said}): 2 parameters" in notes


def test_an_optimizer_node_that_stays_is_lowered() -> None:
    body = f"{LOSS} {GRADIENT} gW = Identity(dW) gv = Identity(dv) {MOMENTUM}"
    canonical = read_training_graph(model_with(body, NEWS, KEPT, held=HELD), keep_optimizer=True)
    assert not [node for node in canonical.graph if node.domain]
    updates = {item.parameter: item for item in metadata.read_list(canonical, "updates", metadata.HostUpdate)}
    assert {name: (item.output, item.negative, item.problem) for name, item in updates.items()} == {
        "W": ("W_new", False, None),
        "v": ("v_new", False, None),
    }
    states = {
        item.input: item.output
        for item in metadata.read_list(canonical, "optimizer_states", metadata.OptimizerState)
    }
    assert states == {"mW": "mW_new", "mv": "mv_new"}


def test_a_parameter_bound_to_another_result_of_its_optimizer_is_refused() -> None:
    body = f"{LOSS} {GRADIENT} gW = Identity(dW) gv = Identity(dv) {MOMENTUM}"
    error = refused(model_with(body, NEWS, {**KEPT, "W": "mW_new", "mW": "W_new"}, held=HELD))
    assert error.message == (
        "'mW_new' is the new value of 'W', but its gradient cannot be told: Momentum does not make it of 'W'"
    )


def test_a_running_average_is_no_parameter() -> None:
    body = f"{LOSS} {GRADIENT} {SGD} t_new = Add(t, one)"
    outputs = "float loss, float[5, 3] W_new, float[3, 1] v_new, float t_new"
    held = "float lr = {0.1}, float t = {0.0}, float one = {1.0}"
    notes = check(model_with(body, outputs, {**BOTH, "t": "t_new"}, held=held))
    assert "outputs of the graph's optimizer are gone: W_new, v_new, t_new" in notes


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"bindings": {"w": "W_new"}}, "training_info updates 'w', which is no initializer of the model"),
        ({"bindings": {"W": "W_next"}}, "training_info updates 'W' with 'W_next', which nothing computes"),
        (
            {"body": f"{LOSS} {GRADIENT} {SGD}".replace('y: string = "loss"', 'y: string = "s"')},
            "the Gradient node 'dW' differentiates 's', which has shape [4, 1]: only a loss of one entry has a "
            "gradient",
        ),
        (
            {"body": f"{LOSS} {GRADIENT} {SGD}".replace('y: string = "loss"', 'y: string = "los"')},
            "a Gradient node of training_info names 'los', which the graph does not have; did you mean 'loss'?",
        ),
        (
            {"body": f"{LOSS} {GRADIENT} {SGD}".replace("(W, v, ids, y)", "(W)")},
            "the Gradient node 'dW' lacks xs, y or its inputs",
        ),
    ],
)
def test_what_is_wrong_is_said(parts: dict[str, object], message: str) -> None:
    fixed = {"inputs": "float[4, 1] y"} if "shape [4, 1]" in message else {}
    model = model_with(**parts, **fixed)
    if fixed:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert refused(model).message == message


def test_one_initializer_bound_twice() -> None:
    second = graph_of("new = Identity(W)", "float[5, 3] new")
    error = refused(model_with(more=[(second, {"W": "new"})]))
    assert error.message == "training_info binds 'W' to two new values"


def test_operators_without_a_derivative_are_listed() -> None:
    model = model_with(LOSS.replace("s = Mul(e, e)", "c = Det(m) s = Mul(e, e)") + GRADIENT + SGD)
    model = model_with(
        f"{LOSS.replace('s = Mul(e, e)', 'q = Unsqueeze(e, last) d = Det(q) s = Mul(d, d)')} {GRADIENT} {SGD}",
        held="float lr = {0.1}, int64[1] last = {-1}",
    )
    error = refused(model)
    assert error.message == "1 node has no gradient rule between the parameters and the loss"
    assert any("Det" in line for line in error.tried)


def with_initialization(node: onnx.NodeProto) -> onnx.ModelProto:
    model = model_with()
    info = model.training_info[0]
    output = helper.make_tensor_value_info("W_first", TensorProto.FLOAT, [5, 3])
    info.initialization.CopyFrom(helper.make_graph([node], "first", [], [output]))
    info.initialization_binding.add(key="W", value="W_first")
    return model


def test_stored_values_are_used_unless_the_initialization_is_asked_for() -> None:
    node = helper.make_node("RandomNormal", [], ["W_first"], shape=[5, 3], seed=3.0, scale=0.5)
    model = with_initialization(node)
    notes = check(model)
    assert (
        "the file's initialization of 1 tensors is not run: training starts from the values that are stored "
        "(--initialize runs it)"
    ) in notes
    first = initial_values(model)
    assert set(first) == {"W"}
    for initialize, want in ((False, values()["W"]), (True, first["W"])):
        made = transform(model, initialize=initialize)
        with TrainingSession(made, threads=1) as session:
            np.testing.assert_array_equal(session.parameters["W"], want)
            np.testing.assert_array_equal(session.parameters["v"], values()["v"])


def test_an_initialization_that_cannot_run_is_said() -> None:
    with pytest.raises(UserError) as caught:
        initial_values(with_initialization(helper.make_node("RandomNothing", [], ["W_first"])))
    assert caught.value.message.startswith("the initialization of training_info cannot be run: ")
    with pytest.raises(UserError) as caught:
        initial_values(model_with())
    assert caught.value.message.startswith("the model has no initialization")


def test_a_step_of_training_is_right() -> None:
    """One step of plain SGD on the table and the rest equals the file's own update."""
    made = transform(model_with(), preset="plain-sgd", lr=0.1, rest="sgd", rest_lr=0.1)
    feed = values()
    with TrainingSession(made, threads=1) as session:
        session.step({"ids": feed["ids"], "y": feed["y"]})
        for name, gradient in gradients(feed)[1].items():
            want = feed[name] - 0.1 * gradient
            np.testing.assert_allclose(session.parameters[name], want, rtol=0, atol=1e-6)
            assert np.abs(session.parameters[name] - 1.01 * want).max() > 1e-3
