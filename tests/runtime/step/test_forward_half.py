"""Graphs whose loss lies outside: predictions out, their gradients in, one step in two halves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from corpus_cases import marked

from kfac_onnx import metadata
from kfac_onnx.api import scan, transform
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import Loss
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.gradcheck.verify import verify_gradients

NAME = "ortmodule_leg__nplm"
MODULES = Path(__file__).parents[2] / "data" / "ortmodule"
HEAD = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>'


def captured(predictions: str, yields: str, backward: str, outputs: str = "", extra: str = "") -> ir.Model:
    """Return a graph as ORTModule captures it: a lookup of 3 columns, a YieldOp, and the gradient of W."""
    text = f"""{HEAD}
    captured (int64[N] ids, float[5, 3] W) => (float[5, 3] W_grad{outputs})
    <int64[1] last = {{-1}}, int64[2] size = {{5, 3}}, float half = {{0.5}}, bool on = {{1}} {extra}> {{
        h = Gather <axis = 0> (W, ids)
        {predictions}
        {yields}
        {backward}
        zeros = ConstantOfShape (size)
        index = Unsqueeze (ids, last)
        W_grad = ScatterND <reduction = "add"> (zeros, index, g)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def linear() -> ir.Model:
    return captured(
        "pred = Neg (h)", "pg = com.microsoft.YieldOp <full_shape_outputs = [0]> (pred)", "g = Neg (pg)"
    )


def weights() -> dict[str, np.ndarray]:
    return {"W": np.arange(15, dtype=np.float32).reshape(5, 3) + 101}


def test_the_corpus_graph_hands_out_predictions_and_takes_their_gradient() -> None:
    case, graph = marked(NAME)
    report = scan(case.path)
    assert [site.parameter for site in report.sites] == ["emb.weight"]
    assert report.batch_inputs == ("ids", "pred_grad")
    model = transform(case.path, rest="sgd")
    start = graph.initial(case)
    ids = case.feed()["ids"]
    fed = graph.fed_back(case)["pred_grad"]
    with (
        TrainingSession(model, parameters=start) as whole,
        TrainingSession(model, parameters=start) as halves,
    ):
        assert halves.predictions == {"pred": "pred_grad"}
        for _ in range(12):
            made = halves.forward({"ids": ids})
            want = graph.run({**halves.parameters, "ids": ids, "pred_grad": fed})["pred"]
            np.testing.assert_array_equal(made["pred"], want)
            np.testing.assert_array_equal(halves.forward({"ids": ids}, training=False)["pred"], want)
            for session in (whole, halves):
                metrics = session.step({"ids": ids, "pred_grad": fed})
                assert metrics["loss"] is None
                assert metrics["skipped"] is False
        for name, value in whole.parameters.items():
            np.testing.assert_array_equal(halves.parameters[name], value)


def test_a_host_trains_with_its_own_loss() -> None:
    """Cross-entropy in NumPy: the loss falls below a tenth of where it started."""
    case, graph = marked(NAME)
    ids = case.feed()["ids"]
    labels = np.arange(len(ids)) * 7 % 100
    losses = []
    with TrainingSession(transform(case.path, rest_lr=0.01), parameters=graph.initial(case)) as session:
        for _ in range(60):
            logits = session.forward({"ids": ids})["pred"].astype(np.float64)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            losses.append(-np.log(p[np.arange(len(ids)), labels]).mean())
            p[np.arange(len(ids)), labels] -= 1
            session.step({"ids": ids, "pred_grad": (p / len(ids)).astype(np.float32)})
    assert losses[-1] < 0.1 * losses[0]


def test_both_halves_see_the_same_dropout() -> None:
    """The gradient 1 comes back times the mask that the prediction shows: 2 where it was kept, else 0."""
    model = captured(
        "pred, mask = Dropout (h, half, on)",
        "pg = com.microsoft.YieldOp (pred)",
        "m = Cast <to = 1> (mask) d = Mul (pg, m) g = Div (d, half)",
    )
    ids = np.arange(5)
    step = transform(model, preset="plain-sgd", lr=1.0)
    with TrainingSession(step, parameters=weights(), seed=3) as session:
        seen = set()
        for _ in range(6):
            start = session.parameters["W"]
            kept = session.forward({"ids": ids})["pred"] != 0
            session.step({"ids": ids, "pg": np.ones((5, 3), np.float32)})
            np.testing.assert_array_equal(start - session.parameters["W"], np.where(kept, 2.0, 0.0))
            seen.add(kept.tobytes())
        assert len(seen) > 1  # each step draws anew


def test_another_batch_or_new_weights_run_both_halves() -> None:
    """The gradient of h² is 2h, which the first half holds, so that a stale one would show."""
    model = captured(
        "pred = Mul (h, h)", "pg = com.microsoft.YieldOp (pred)", "two = Add (h, h) g = Mul (pg, two)"
    )
    step = transform(model, preset="plain-sgd", lr=0.125)
    one = np.ones((1, 3), np.float32)
    with TrainingSession(step, parameters=weights()) as session:
        session.forward({"ids": np.array([0])})
        session.step({"ids": np.array([1]), "pg": one})
        want = weights()["W"]
        want[1] *= 0.75
        np.testing.assert_array_equal(session.parameters["W"], want)
        ids = np.array([2])
        session.forward({"ids": ids})
        session.assign({"W": np.ones((5, 3), np.float32)})
        session.step({"ids": ids, "pg": one})
        np.testing.assert_array_equal(session.parameters["W"][2], [0.75, 0.75, 0.75])


def test_several_predictions_some_without_a_gradient() -> None:
    model = captured(
        "pred = Neg (h) aux = Abs (h) flag = Sign (h)",
        "ag, pg = com.microsoft.YieldOp <non_differentiable_outputs = [1], full_shape_outputs = [0]> (aux, flag, pred)",
        "s = Sign (h) a = Mul (ag, s) b = Neg (pg) g = Add (a, b)",
    )
    with TrainingSession(transform(model, preset="plain-sgd", lr=1.0), parameters=weights()) as session:
        assert session.predictions == {"aux": "ag", "flag": None, "pred": "pg"}
        ids = np.array([4, 0])
        made = session.forward({"ids": ids})
        rows = weights()["W"][ids]
        np.testing.assert_array_equal(made["aux"], rows)
        np.testing.assert_array_equal(made["pred"], -rows)
        np.testing.assert_array_equal(made["flag"], np.ones((2, 3)))
        gradients = {"ag": np.full((2, 3), 3, np.float32), "pg": np.full((2, 3), 1, np.float32)}
        session.step({"ids": ids, **gradients})
        np.testing.assert_array_equal(session.parameters["W"][ids], rows - 2)


def test_a_scalar_prediction_is_the_loss() -> None:
    """Modules that return (loss, logits): the loss's gradient is 1, that of the logits 0."""
    model = captured(
        "pred = Neg (h) loss = ReduceSum <keepdims = 0> (pred)",
        "lg, pg = com.microsoft.YieldOp (loss, pred)",
        "b = Add (pg, lg) g = Neg (b)",
    )
    canonical = read_training_graph(model)
    assert metadata.read(canonical, "loss", Loss) == Loss("loss", "sum")
    assert "the prediction 'loss' is a scalar and is the loss; nothing else is fed back: pred" in (
        metadata.read_strings(canonical, "notes")
    )
    with TrainingSession(transform(model, preset="plain-sgd", lr=1.0), parameters=weights()) as session:
        assert [item.name for item in session.batch_inputs] == ["ids"]
        ids = np.array([1, 1])
        assert session.step({"ids": ids})["loss"] == -2 * weights()["W"][1].sum()
        np.testing.assert_array_equal(session.parameters["W"][1], weights()["W"][1] + 2)


def test_a_yield_that_does_not_add_up_is_no_capture() -> None:
    model = captured("pred = Neg (h)", "pg, qg = com.microsoft.YieldOp (pred)", "g = Neg (pg)")
    with pytest.raises(UserError) as caught:
        read_training_graph(model)
    assert "YieldOp" in str(caught.value)


def test_what_needs_a_loss_says_so(tmp_path: Path) -> None:
    expected = (
        "the loss lies outside the graph, which takes its gradients 'pg': the session cannot {}\n"
        "  help: call forward(batch), compute the loss and its gradients, then step(batch with them)"
    )
    with TrainingSession(transform(linear()), parameters=weights()) as session:
        batch = {"ids": np.array([1])}
        with pytest.raises(UserError) as caught:
            session.fit([batch])
        assert str(caught.value) == expected.format("fit")
        with pytest.raises(UserError) as caught:
            session.evaluate([batch])
        assert str(caught.value) == expected.format("evaluate")
        session.export(tmp_path / "forward.onnx")
    assert [value.name for value in onnx.load(tmp_path / "forward.onnx").graph.output] == ["pred"]


def test_a_graph_with_its_loss_hands_out_nothing() -> None:
    case, graph = marked("ortart_legcore__nplm")
    with (
        TrainingSession(transform(case.path), parameters=graph.initial(case)) as session,
        pytest.raises(UserError) as caught,
    ):
        session.forward({"ids": case.feed()["ids"]})
    assert str(caught.value) == (
        "the graph computes its own loss, so it hands out nothing before a step\n"
        "  help: call step(batch), or export(outputs=[...]) for a forward model"
    )


def test_ids_are_checked_before_predictions_are_handed_out() -> None:
    with TrainingSession(transform(linear()), parameters=weights()) as session:
        with pytest.raises(UserError, match="ids"):
            session.forward({"ids": np.array([5])})
        ids = np.array([1])
        session.step({"ids": ids, "pg": np.zeros((1, 3), np.float32)})


def test_verify_takes_a_linear_loss() -> None:
    batch = {"ids": np.array([1, 1, 3])}
    checks = verify_gradients(read_training_graph(linear()), batch, parameters=weights())
    assert [check.status for check in checks] == ["ok"]
    wrong = captured("pred = Neg (h)", "pg = com.microsoft.YieldOp (pred)", "g = Identity (pg)")
    checks = verify_gradients(read_training_graph(wrong), batch, parameters=weights())
    assert [check.status for check in checks] == ["wrong"]


@pytest.mark.parametrize("name", sorted(path.stem for path in MODULES.glob("*.onnx")))
def test_captured_modules_train_as_in_pytorch(name: str) -> None:
    """Predictions and gradients of modules as ORTModule captures them are those of autograd."""
    with np.load(MODULES / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}

    start, batch, fed = part("p:"), part("in:"), part("fed:")
    report = scan(MODULES / f"{name}.onnx")
    tables = {item for item, value in start.items() if value.shape[0] in (5, 20, 30) and item[0] != "f"}
    assert {site.parameter for site in report.sites} == tables
    assert not report.refused
    model = transform(MODULES / f"{name}.onnx", preset="plain-sgd", lr=1.0, rest="sgd", rest_lr=1.0)
    with TrainingSession(model, parameters=start) as session:
        if session.predictions:
            made = session.forward(batch)
            for key, want in part("out:").items():
                np.testing.assert_allclose(made[key], want, rtol=1e-5, atol=1e-6)
            metrics = session.step({**batch, **fed})
        else:
            metrics = session.step(batch)
            np.testing.assert_allclose(metrics["loss"], arrays["out:loss"], rtol=1e-6)
        assert metrics["skipped"] is False
        for key, want in part("g:").items():  # float32 sums, and differences of weights, in another order
            limit = 2e-5 * max(np.abs(want).max(), 0.1)
            np.testing.assert_allclose(start[key] - session.parameters[key], want, rtol=0, atol=limit)
    for tied in ("lookup", "both"):
        with TrainingSession(transform(MODULES / f"{name}.onnx", tied=tied), parameters=start) as session:
            given = {item.name: {**batch, **fed}[item.name] for item in session.batch_inputs}
            assert session.step(given)["skipped"] is False
