"""Graphs with their optimizer inside that leave something open: what is decided, refused, or left to the user."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from update_forms import FORMS
from update_graphs import Optimizer, check, gradients, model_of, values

from kfac_onnx import metadata
from kfac_onnx.api import scan, transform
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import State
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime import TrainingSession

SGD = "s{n} = Mul(lr, {g}) {new} = Sub({p}, s{n})"
LR = "float lr = {0.1}"


def refused(optimizer: Optimizer, **reading: object) -> UserError:
    with pytest.raises(UserError) as caught:
        read_training_graph(model_of(optimizer), **reading)
    return caught.value


def test_new_values_without_a_loss_are_not_taken_for_gradients() -> None:
    model = model_of(Optimizer(SGD, constants=LR))
    del model.graph.output[0]
    with pytest.raises(UserError) as caught:
        read_training_graph(model)
    assert str(caught.value) == (
        "outputs of the graph are new values of its parameters, but none is the loss\n"
        "  help: export the loss as an output of the training graph, or name it with --loss NAME"
    )
    assert read_training_graph(model, loss="loss").graph.outputs[0].name in ("dv", "W_grad", "dW", "loss")


def test_two_new_values_are_refused_unless_one_bears_the_name() -> None:
    two = Optimizer(
        SGD + " b{n} = Mul(half, {g}) {p}_other = Sub({p}, b{n})",
        outputs=("{p}_other",),
        constants=f"{LR}, float half = {{0.5}}",
    )
    error = refused(two)
    assert error.message == "2 outputs of the graph could be the new value of 'W': r0, W_other"
    assert error.help == "name the gradient: --gradients W=VALUE (a value inside the graph will do)"
    check(model_of(two), gradients={"W": "dW", "v": "dv"})
    named = Optimizer(
        two.lines.replace("{p}_other", "{p}_new"), outputs=("{p}_new",), constants=two.constants
    )
    check(model_of(named))


def test_rows_that_are_set_are_refused() -> None:
    """Of rows that repeat in a batch only the last would count: that is no gradient step."""
    setting = Optimizer(
        SGD, constants=LR,
        tables="o{n} = Gather<axis: int = 0>(W, ids) t{n} = Mul(lr, dh) u{n} = Sub(o{n}, t{n}) {new} = ScatterND(W, index, u{n})",
    )  # fmt: skip
    error = refused(setting)
    assert error.message == (
        "'r0' is the new value of 'W', but its gradient cannot be told: ScatterND 'r0' sets rows "
        "(reduction=none), so of rows that repeat in a batch only one counts"
    )
    check(model_of(setting), gradients={"W": "dW"})


def test_a_part_of_the_gradient_in_the_learning_rate_is_found() -> None:
    """An exporter folded lr · 2 for W alone: the derivative of the loss says whose the 2 is."""
    folded = Optimizer(
        SGD, constants=f"{LR}, float folded = {{0.2}}, float half = {{0.5}}",
        tables="x{n} = Mul(dh, half) z{n} = ScatterND<reduction: string = \"add\">(zeros, index, x{n}) "
        "s{n} = Mul(folded, z{n}) {new} = Sub({p}, s{n})",
    )  # fmt: skip
    model = check(model_of(folded))
    notes = metadata.read_strings(model, "notes")
    assert "the gradient of 'W' is scaled by 2: a part of it was in the update" in notes
    (site,) = scan(model_of(folded)).sites
    assert (site.parameter, site.vocab_size, len(site.uses)) == ("W", 5, 1)


def test_a_gradient_that_is_computed_negative() -> None:
    """Some exporters carry −dL through the backward part and add it."""
    negative = Optimizer(
        "m{n} = Neg({g}) n{n} = Identity(m{n}) s{n} = Mul(lr, n{n}) {new} = Add({p}, s{n})", constants=LR
    )
    check(model_of(negative))
    turned = Optimizer("s{n} = Mul(lr, {g}) {new} = Add({p}, s{n})", constants=LR)
    text = model_of(turned)
    for node in text.graph.node:
        if node.output[0] == "e":
            node.input[:] = ["y", "p"]  # e = y − p, so every gradient in the graph is the negative one
    check(text)


def test_a_penalty_in_the_loss_is_not_taken_for_weight_decay() -> None:
    """The loss holds 0.005·Σv², so 0.01·v belongs to the gradient; data flow alone cannot tell."""
    decayed = Optimizer(
        SGD,
        constants=f"{LR}, float wd = {{0.01}}, float half = {{0.005}}",
    )
    model = model_of(Optimizer(
        SGD.replace("{g}", "t{n}").replace("s{n} =", "d{n} = Mul(wd, {p}) t{n} = Add({g}, d{n}) s{n} =", 1),
        constants=decayed.constants, tables=SGD,
        common="q = Mul(v, v) c = ReduceSum<keepdims: int = 0>(q) r = Mul(half, c) total = Add(loss, r)",
    ))  # fmt: skip
    model.graph.output[0].name = "total"
    with pytest.raises(UserError) as caught:
        read_training_graph(model)
    assert caught.value.message == (
        "a multiple of 'v' is part of its update, and the loss depends on it too: whether that is weight decay "
        "or the derivative of a penalty cannot be told"
    )
    named = read_training_graph(model, gradients={"v": "t1"})
    parameters = metadata.read_list(named, "parameters", metadata.Parameter)
    assert {item.name: item.gradient for item in parameters}["v"] == "t1"


def test_running_averages_of_the_batch_stay() -> None:
    """Statistics that the model keeps are no optimizer's states: they stay inputs and outputs."""
    kept = Optimizer(
        SGD, constants=f"{LR}, float keep = {{0.9}}, float rest = {{0.1}}, int64[1] rows = {{0}}",
        shared=("float[3] mean",), results=("float[3] mean_",),
        common="m1 = ReduceMean<keepdims: int = 0>(h, rows) m2 = Mul(rest, m1) m3 = Mul(keep, mean) mean_ = Add(m3, m2)",
    )  # fmt: skip
    model = read_training_graph(model_of(kept))
    assert "mean" in {value.name for value in model.graph.inputs}
    assert "mean_" in {value.name for value in model.graph.outputs}


def test_the_users_gradient_comes_first() -> None:
    model = read_training_graph(model_of(FORMS["adam"][1]), gradients={"W": "m0_", "v": "dv"})
    parameters = metadata.read_list(model, "parameters", metadata.Parameter)
    assert {item.name: item.gradient for item in parameters} == {"W": "m0_", "v": "dv"}


@pytest.mark.parametrize(
    "name",
    ["sub of rate times gradient", "momentum", "adam", "adagrad", "rows scattered", "weight decay beside"],
)
def test_rows_shape_trains(name: str) -> None:
    """Whatever the graph's own optimizer was: plain SGD on the table and the rest is exact."""
    made = transform(model_of(FORMS[name][1]), preset="plain-sgd", lr=0.1, rest="sgd", rest_lr=0.1)
    feed = values()
    weights = {key: feed[key] for key in ("W", "v")}
    with TrainingSession(made, parameters=weights, threads=1) as session:
        assert {item.name for item in session.batch_inputs} == {"ids", "y"}
        session.step({"ids": feed["ids"], "y": feed["y"]})
        for key, gradient in gradients(feed)[1].items():
            want = feed[key] - 0.1 * gradient  # float32 rounding of one step
            np.testing.assert_allclose(session.parameters[key], want, rtol=0, atol=1e-6)


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    given = {item.name: feed[item.name] for item in session.get_inputs() if item.name in feed}
    return dict(zip(names, session.run(None, given), strict=True))


def fill(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the first values of our own states."""
    for state in metadata.read_list(model, "state", State):
        if state.input.startswith("kfac/"):
            dtype = np.dtype(state.dtype)
            feed[state.input] = {
                "zeros": np.zeros(state.shape, dtype),
                "ones": np.ones(state.shape, dtype),
                "identity": np.eye(state.shape[0] if state.shape else 1, dtype=dtype),
            }.get(
                str(state.initial),
                np.full(state.shape, 0 if isinstance(state.initial, str) else state.initial, dtype),
            )
    return feed


@pytest.mark.parametrize("name", FORMS)
def test_dense_shape_changes_the_table_alone(name: str) -> None:
    """The optimizer stays: outputs of `v` are as they were, W goes along the preconditioned gradient."""
    proto = model_of(FORMS[name][1])
    feed = values()
    rng = np.random.default_rng(3)
    for item in proto.graph.input:
        shape = [dim.dim_value for dim in item.type.tensor_type.shape.dim]
        if item.name not in feed:
            feed[item.name] = np.asarray(np.abs(rng.standard_normal(shape)) + 0.5, np.float32)
    made = transform(proto, shape="dense", preset="half")
    before = run(ir.from_proto(proto), feed)
    after = run(made, fill(made, dict(feed)))
    assert bool(after["kfac/ok"])
    if "clipped" not in name:  # the norm of all gradients now holds the preconditioned one
        for key in set(before) - {"r0", "m0_", "w0_"}:
            np.testing.assert_allclose(after[key], before[key], rtol=1e-6, atol=1e-7)
    touched = sorted(set(feed["ids"].tolist()))
    rows = [index for index in range(5) if index not in touched]
    np.testing.assert_allclose(after["r0"][rows], before["r0"][rows], rtol=1e-6, atol=1e-7)
    if name not in ("sign", "lion"):  # which look at signs alone
        assert np.abs(after["r0"][touched] - before["r0"][touched]).max() > 2e-5


def test_dense_shape_gives_the_preconditioned_gradient_to_plain_sgd() -> None:
    """W' = W − 0.1·P for every way of writing SGD; P from a graph whose gradient is an output."""
    feed = values()
    reference = transform(model_of(FORMS["rate is an input"][1]), shape="dense", preset="half")
    got = run(reference, fill(reference, {**feed, "lr": np.asarray(1.0, np.float32)}))
    update = feed["W"] - got["r0"]
    assert np.abs(update).max() > 1e-2
    for name, (kind, optimizer) in FORMS.items():
        if kind != "sgd, learning rate 0.1" or name == "sign" or "loss scale" in name:
            continue
        made = transform(model_of(optimizer), shape="dense", preset="half")
        given = {
            item.name: np.ones([dim.dim_value for dim in item.type.tensor_type.shape.dim], np.float32)
            for item in model_of(optimizer).graph.input
        }
        found = run(made, fill(made, {**given, **feed}))
        np.testing.assert_allclose(found["r0"], feed["W"] - 0.1 * update, rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(1.01 * found["r0"] - (feed["W"] - 0.1 * update)).max() > 1e-3


def test_what_cannot_take_another_gradient_is_refused_in_the_dense_shape() -> None:
    spread = Optimizer(
        SGD, constants=f"{LR}, float low = {{-1.0}}, float high = {{1.0}}",
        tables='c{n} = Clip(dh, low, high) s{n} = Mul(lr, c{n}) u{n} = Neg(s{n}) {new} = ScatterND<reduction: string = "add">({p}, index, u{n})',
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        transform(model_of(spread), shape="dense")
    assert str(caught.value) == (
        "the update of 'W' inside the graph cannot be given another gradient: it scatters rows that it makes of "
        "the gradient by more than a learning rate\n"
        "  path: dh -> r0\n"
        "  in:   insert-embedding-kfac\n"
        "  help: take --shape rows, which replaces the graph's optimizer by ours"
    )
    check(model_of(spread))
