"""The pass `differentiate`: what it adds, what it trains, what it refuses, and that the result trains as well."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.demo.corpus import load_corpus
from kfac_onnx.demo.model import initial_parameters, model_bytes
from kfac_onnx.errors import UserError
from kfac_onnx.graph.verifier import problems_of
from kfac_onnx.metadata import Loss, Parameter
from kfac_onnx.passes.differentiate import Differentiate
from kfac_onnx.pipeline.log import Log
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parents[1] / "data"
GRAPHS = DATA / "graphs"


def forward(
    nodes: str, *, weights: str, inputs: str = "int64[N, 2] ids", outputs: str = "float[N, 4] z"
) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    model ({inputs}) => ({outputs}) <{weights}> {{ {nodes} }}
    """)


def numbers(*shape: int) -> str:
    """Return an initializer's values in ONNX text: 1, 2, 3, .."""
    return "{" + ", ".join(str(number + 1.5) for number in range(int(np.prod(shape)))) + "}"


LOOKUP = {
    "nodes": "h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) z = Add(s, bias)",
    "weights": f"float[5, 4] table = {numbers(5, 4)}, float[4] bias = {numbers(4)}, int64[1] one = {{1}}",
}


def trained(model: ir.Model) -> list[str]:
    return [item.name for item in metadata.read_list(model, "parameters", Parameter)]


def test_the_graph_gets_labels_loss_and_gradients_and_keeps_the_rest() -> None:
    model = kx.differentiate(forward(**LOOKUP))
    assert [value.name for value in model.graph.inputs] == ["ids", "labels"]
    assert [value.name for value in model.graph.outputs] == ["z", "loss", "table_grad", "bias_grad"]
    assert metadata.read(model, "loss", Loss) == Loss("loss", "mean")
    assert trained(model) == ["table", "bias"]
    assert set(model.graph.initializers) >= {"table", "bias"}
    assert model.metadata_props["kfac.pipeline"] == "differentiate"
    assert problems_of(model) == []


def test_the_written_graph_is_read_as_a_training_graph(tmp_path: Path) -> None:
    kx.save(kx.differentiate(forward(**LOOKUP), reduction="sum"), tmp_path / "train.onnx")
    report = kx.scan(tmp_path / "train.onnx")
    assert (report.loss, report.reduction, report.trainable) == ("loss", "sum", True)
    assert report.batch_inputs == ("ids", "labels")
    assert [(item.name, item.gradient) for item in report.parameters] == [
        ("table", "table_grad"),
        ("bias", "bias_grad"),
    ]
    assert [site.parameter for site in report.sites] == ["table"]


def test_a_scalar_among_the_forward_outputs_is_not_taken_for_the_loss(tmp_path: Path) -> None:
    nodes = LOOKUP["nodes"] + " total = ReduceMean<keepdims: int = 0>(z)"
    proto = forward(nodes, weights=LOOKUP["weights"], outputs="float[N, 4] z, float total")
    kx.save(kx.differentiate(proto, logits="z"), tmp_path / "train.onnx")
    assert kx.scan(tmp_path / "train.onnx").loss == "loss"


def test_an_output_that_is_the_loss_already_is_differentiated() -> None:
    nodes = LOOKUP["nodes"] + " q = Mul(z, z) total = ReduceMean<keepdims: int = 0>(q)"
    model = kx.differentiate(
        forward(nodes, weights=LOOKUP["weights"], outputs="float total"), loss_output="total"
    )
    assert [value.name for value in model.graph.inputs] == ["ids"]
    assert [value.name for value in model.graph.outputs] == ["total", "table_grad", "bias_grad"]
    assert metadata.read(model, "loss", Loss) == Loss("total", "mean")


def test_a_value_inside_may_be_the_loss_or_the_logits() -> None:
    nodes = LOOKUP["nodes"] + " q = Mul(z, z) total = ReduceSum<keepdims: int = 0>(q)"
    proto = forward(nodes, weights=LOOKUP["weights"], outputs="float[N, 4] q")
    assert metadata.read(kx.differentiate(proto, loss_output="total"), "loss", Loss) == Loss("total", "sum")
    model = kx.differentiate(proto, logits="z", loss="mse")
    assert [value.name for value in model.graph.outputs] == ["q", "loss", "table_grad", "bias_grad"]


def test_pass_text_and_python_make_the_same_graph(model_bytes: Callable[[ir.Model], bytes]) -> None:
    text = "differentiate{loss=mse,logits=z,reduction=sum,labels=y,freeze=[bias]}"
    passes = parse_pipeline(text)
    assert str(passes) == text
    model = ir.from_proto(forward(**LOOKUP))
    before = model_bytes(model)
    (step,) = passes
    changes = step.run(model, Log())
    assert changes
    assert model_bytes(model) != before
    again = ir.from_proto(forward(**LOOKUP))
    passes.run(again)
    python = kx.differentiate(
        forward(**LOOKUP), loss="mse", logits="z", reduction="sum", labels="y", freeze=["bias"]
    )
    assert model_bytes(again) == model_bytes(python)


def test_a_pass_keeps_nothing_to_itself(model_bytes: Callable[[ir.Model], bytes]) -> None:
    step = Differentiate()
    made: list[bytes] = []
    for name in ("fwd_dyncore__nplm", "fwd_legcore__gpt_tied", "fwd_dyncore__nplm"):
        model = ir.load(GRAPHS / f"{name}.onnx")
        step.run(model, Log())
        made.append(model_bytes(model))
    assert made[0] == made[2]


def test_the_source_is_not_changed(model_bytes: Callable[[ir.Model], bytes]) -> None:
    source = ir.from_proto(forward(**LOOKUP))
    before = model_bytes(source)
    kx.differentiate(source)
    assert model_bytes(source) == before


CONSTANTS = {
    "a scale of one number": ("float[1] c = {0.5}", "t = Mul(s, c)", "a single number"),
    "an epsilon": ("float[1] c = {0.5}", "q = Mul(s, s) r = Add(q, c) t = Sqrt(r)", "a single number"),
    "a mask of scores": (
        "float[4, 4] c = {0, -10000, -10000, -10000, 0, 0, -10000, -10000, 0, 0, 0, -10000, 0, 0, 0, 0}",
        "m = ReduceMax<keepdims: int = 0>(c, zero) t = Add(s, m)",
        "a mask",
    ),
    "a mask of zeros and ones": (
        "float[1, 4] c = {0, 1, 1, 0}",
        "t = Mul(s, c)",
        "a mask",
    ),
}


@pytest.mark.parametrize("what", CONSTANTS)
def test_what_is_clearly_no_weight_is_not_trained_and_told(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights, nodes, reason = CONSTANTS[what]
    proto = forward(
        f"h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) {nodes} z = Add(t, bias)",
        weights=f"{LOOKUP['weights']}, {weights}, int64[1] zero = {{0}}",
    )
    with caplog.at_level(logging.INFO, logger="kfac_onnx"):
        assert trained(kx.differentiate(proto)) == ["table", "bias"]
    assert f"not trained: c ({reason})" in caplog.messages
    assert "trained: table, bias" in caplog.messages


def numbers_of(array: np.ndarray) -> str:
    return "{" + ", ".join(str(float(item)) for item in array.reshape(-1)) + "}"


ANGLES = np.arange(12)[:, None] / 100 ** np.arange(0, 1, 0.5)


@pytest.mark.parametrize("table", [
    np.stack([np.sin(ANGLES), np.cos(ANGLES)], -1).reshape(12, 4),
    np.concatenate([np.sin(ANGLES), np.cos(ANGLES)], -1),
])  # fmt: skip
def test_positions_as_sines_and_cosines_are_not_trained(table: np.ndarray) -> None:
    proto = forward(
        "h = Gather(table, ids) p = Gather(places, ids) x = Add(h, p) s = ReduceSum<keepdims: int = 0>(x, one) z = Add(s, bias)",
        weights=f"{LOOKUP['weights']}, float[12, 4] places = {numbers_of(table.astype(np.float32))}",
    )
    assert trained(kx.differentiate(proto)) == ["table", "bias"]


def test_rotations_of_rotary_positions_are_not_trained() -> None:
    proto = forward(
        "h = Gather(table, ids) a, b = Split<axis: int = -1, num_outputs: int = 2>(h) "
        "ac = Mul(a, cos) bs = Mul(b, sin) x = Sub(ac, bs) s = ReduceSum<keepdims: int = 0>(x, one) z = Add(s, bias)",
        weights=f"float[5, 4] table = {numbers(5, 4)}, float[2] bias = {numbers(2)}, int64[1] one = {{1}}, "
        f"float[2, 2] cos = {numbers_of(np.cos(ANGLES[:2]))}, float[2, 2] sin = {numbers_of(np.sin(ANGLES[:2]))}",
        outputs="float[N, 2] z",
    )
    assert trained(kx.differentiate(proto)) == ["table", "bias"]


def test_what_stands_for_no_scale_in_a_group_normalization_is_not_trained() -> None:
    proto = forward(
        "h = Gather(table, ids) g = Reshape(h, groups) n = InstanceNormalization(g, gain, shift) y = Reshape(n, back) "
        "m = Mul(y, scale) s = ReduceSum<keepdims: int = 0>(m, one) z = Add(s, bias)",
        weights=f"{LOOKUP['weights']}, int64[3] groups = {{0, 2, -1}}, int64[3] back = {{0, 2, 4}}, "
        "float[2] gain = {1, 1}, float[2] shift = {0, 0}, float[4] scale = {1, 1, 1, 1}",
    )
    assert trained(kx.differentiate(proto)) == ["table", "bias", "scale"]


@pytest.mark.parametrize("number", [0.0, 1.0, 0.07, 2.6593, 14.2857])
def test_a_temperature_is_trained(number: float) -> None:
    proto = forward(
        "h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) z = Mul(s, t)",
        weights=f"{LOOKUP['weights']}, float[1] t = {{{number}}}",
    )
    assert trained(kx.differentiate(proto)) == ["table", "t"]


@pytest.mark.parametrize("number", [-1.0, 0.5, 8**-0.5, 64**-0.25, 0.1, 1e-5, 0.044715, 3.0])
def test_a_usual_factor_is_not_trained(number: float) -> None:
    proto = forward(
        "h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) z = Mul(s, t)",
        weights=f"{LOOKUP['weights']}, float[1] t = {{{float(np.float32(number))}}}",
    )
    assert trained(kx.differentiate(proto)) == ["table"]


def test_statistics_and_states_are_not_trained_and_inference_is_told() -> None:
    proto = forward(
        "h = Gather(table, ids) n = BatchNormalization(h, gain, shift, mean, var) "
        "x = Transpose<perm: ints = [1, 0, 2]>(n) y, z = LSTM<hidden_size: int = 2>(x, W, R, , , h0, c0)",
        weights=f"float[5, 4] table = {numbers(5, 4)}, float[2] gain = {{1, 2}}, float[2] shift = {{0, 0}}, "
        "float[2] mean = {1, 2}, float[2] var = {1, 2}, "
        f"float[1, 8, 4] W = {numbers(8, 4)}, float[1, 8, 2] R = {numbers(8, 2)}, "
        "float[1, 3, 2] h0 = {0, 0, 0, 0, 0, 0}, float[1, 3, 2] c0 = {0, 0, 0, 0, 0, 0}",
        inputs="int64[3, 2] ids",
        outputs="float[1, 3, 2] z",
    )
    model = kx.differentiate(proto)
    assert trained(model) == ["table", "gain", "shift", "W", "R"]
    assert metadata.read_strings(model, "notes") == [
        "BatchNormalization was exported for inference: "
        "it normalizes with its running mean and variance, which stay as they are"
    ]


def test_a_bias_of_one_number_is_trained() -> None:
    proto = forward(
        "h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) y = MatMul(s, w) z = Add(y, c)",
        weights=f"{LOOKUP['weights']}, float[4, 1] w = {numbers(4)}, float[1] c = {{0.5}}",
        outputs="float[N, 1] z",
    )
    assert trained(kx.differentiate(proto, loss="bce")) == ["table", "w", "c"]


def test_freeze_and_train_take_names_and_patterns() -> None:
    assert trained(kx.differentiate(forward(**LOOKUP), freeze=["table"])) == ["bias"]
    assert trained(kx.differentiate(forward(**LOOKUP), freeze=["b*"])) == ["table"]
    assert trained(kx.differentiate(forward(**LOOKUP), train=["*able"])) == ["table"]
    assert trained(kx.differentiate(forward(**LOOKUP), train=["*"], freeze=["table"])) == ["bias"]


def test_weights_that_are_inputs_are_trained_when_named() -> None:
    proto = forward(
        LOOKUP["nodes"],
        weights="int64[1] one = {1}",
        inputs="int64[N, 2] ids, float[5, 4] table, float[4] bias",
    )
    model = kx.differentiate(proto, train=["table", "bias"])
    assert [value.name for value in model.graph.outputs] == ["z", "loss", "table_grad", "bias_grad"]
    assert kx.scan(model).batch_inputs == ("ids", "labels")


def test_a_transposed_copy_of_a_tied_table_is_the_table() -> None:
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    proto = forward(
        "h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) z = MatMul(s, copy)",
        weights="int64[1] one = {1}", outputs="float[N, 5] z",
    )  # fmt: skip
    proto.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), "copy"),
            onnx.numpy_helper.from_array(table, "table"),
        ]
    )
    model = kx.differentiate(proto)
    assert trained(model) == ["table"]
    assert metadata.read_strings(model, "notes") == [
        "'copy' was a transposed copy of 'table': now computed from it"
    ]
    (site,) = kx.scan(model).sites
    assert len(site.dense_uses) == 1


def test_weights_that_the_loss_does_not_depend_on_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    nodes = LOOKUP["nodes"] + " u = Mul(other, other)"
    proto = forward(
        nodes, weights=f"{LOOKUP['weights']}, float[2] other = {{1, 2}}", outputs="float[N, 4] z, float[2] u"
    )
    with caplog.at_level(logging.INFO, logger="kfac_onnx"):
        assert trained(kx.differentiate(proto, logits="z")) == ["table", "bias"]
    assert "not trained: other (the loss does not depend on it)" in caplog.messages


def test_a_value_inside_with_the_name_of_a_gradient_makes_room() -> None:
    nodes = (
        "h = Gather(table, ids) table_grad = ReduceSum<keepdims: int = 0>(h, one) z = Add(table_grad, bias)"
    )
    model = kx.differentiate(forward(nodes, weights=LOOKUP["weights"]))
    assert [value.name for value in model.graph.outputs] == ["z", "loss", "table_grad", "bias_grad"]
    assert problems_of(model) == []


def test_the_same_gradient_of_two_weights_is_two_outputs() -> None:
    proto = forward(
        "h = Gather(table, ids) s = ReduceSum<keepdims: int = 0>(h, one) a = Add(s, bias) z = Add(a, more)",
        weights=f"{LOOKUP['weights']}, float[4] more = {{4, 3, 2, 1}}",
    )
    model = kx.differentiate(proto)
    assert [value.name for value in model.graph.outputs][2:] == ["table_grad", "bias_grad", "more_grad"]
    assert problems_of(model) == []


def test_half_precision_models_train_in_half_precision_with_a_float32_loss() -> None:
    model = kx.differentiate(GRAPHS / "fwd_dyncore__nplm.onnx")
    proto = ir.to_proto(ir.load(GRAPHS / "fwd_dyncore__nplm.onnx"))
    for item in proto.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(item).astype(np.float16)
            item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del proto.graph.value_info[:]
    half = kx.differentiate(proto)
    assert [value.dtype for value in half.graph.outputs] == [
        ir.DataType.FLOAT16, ir.DataType.FLOAT, *[ir.DataType.FLOAT16] * 5,
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, 100, (8, 4)), "labels": rng.integers(0, 100, 8)}
    losses = [_first_loss(item, batch) for item in (model, half)]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]  # float16 keeps 11 bits of each weight


def _first_loss(model: ir.Model, batch: dict[str, np.ndarray]) -> float:
    with kx.TrainingSession(kx.transform(model)) as session:
        return float(session.step(batch)["loss"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown logits": (
        {"logits": "y"},
        "the graph has no value 'y', given as the logits\n  help: its outputs are z",
    ),
    "near logits": (
        {"logits": "zz"},
        "the graph has no value 'zz', given as the logits; did you mean 'z'?\n  help: its outputs are z",
    ),
    "unknown loss": (
        {"loss_output": "s_"},
        "the graph has no value 's_', given as the loss; did you mean 's'?\n  help: its outputs are z",
    ),
    "loss of many numbers": (
        {"loss_output": "z"},
        "'z' cannot be the loss: it is of shape [N, 4], not one floating-point number\n"
        "  help: let --logits name what the loss is of, and --loss say which",
    ),
    "loss given twice": (
        {"loss_output": "z", "logits": "z"},
        "the loss is given twice: as logits and as an output that is the loss",
    ),
    "unknown weight": (
        {"freeze": ["tabel"]},
        "--freeze 'tabel' fits no weight of the graph; did you mean 'table'?\n  help: its weights are table, bias",
    ),
    "no weight": (
        {"freeze": ["*"]},
        "no weight is trained: the loss 'loss' depends on none of the initializers\n"
        "  help: name what to train with --train NAME; weights may be inputs",
    ),
    "taken name": (
        {"labels": "ids"},
        "the graph already has a value 'ids', so the labels cannot be called that\n"
        "  help: give them another name: --labels NAME",
    ),
    "unknown kind": (
        {"loss": "hinge"},
        "option 'loss' of pass 'differentiate' cannot be 'hinge': it is one of cross-entropy, mse, bce",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_told_in_one_sentence(what: str) -> None:
    settings, message = BAD[what]
    with pytest.raises(UserError) as caught:
        kx.differentiate(forward(**LOOKUP), **settings)
    assert str(caught.value) == message


def test_several_outputs_that_could_be_the_logits_are_listed() -> None:
    proto = forward(LOOKUP["nodes"], weights=LOOKUP["weights"], outputs="float[N, 4] z, float[N, 4] s")
    with pytest.raises(UserError) as caught:
        kx.differentiate(proto)
    assert str(caught.value) == ("2 outputs could be the logits: z, s\n  help: name them with --logits NAME")


def test_a_training_graph_is_not_differentiated_again() -> None:
    with pytest.raises(UserError) as caught:
        kx.differentiate(kx.differentiate(forward(**LOOKUP)), labels="more")
    assert str(caught.value) == (
        "the graph already has gradients: its output 'table_grad'\n"
        "  help: it is a training graph: give it to `kfac-onnx transform` or `train`"
    )


def test_all_operators_without_a_rule_are_listed(tmp_path: Path) -> None:
    nodes = (
        'h = Gather(table, ids) [first] p = ScatterElements<reduction: string = "max">(h, at, h) '
        "s = ReduceSum<keepdims: int = 0>(p, one) q, r = Unique<axis: int = 0>(s) z = Add(q, bias)"
    )
    path = tmp_path / "model.onnx"
    proto = forward(nodes, weights=LOOKUP["weights"], inputs="int64[N, 2] ids, int64[N, 2, 4] at")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError) as caught:
        kx.differentiate(path)
    assert str(caught.value) == (
        "2 nodes have no gradient rule between the parameters and the loss\n"
        f"  --> {path}\n"
        "  tried: Unique 'q': no rule for ai.onnx::Unique\n"
        "  tried: ScatterElements 'p': reduction=max is not supported\n"
        "  help: export the model without these operators, or export its gradients with it"
    )


def demo_forward() -> onnx.ModelProto:
    """Return the demo's forward-only model with its first weights as initializers."""
    proto = onnx.load(DATA / "autodiff" / "demo_forward.onnx")
    values = initial_parameters(seed=0)
    kept = [item for item in proto.graph.input if item.name not in values]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in values.items()
    )
    return proto


def test_the_demos_forward_only_model_trains_to_the_loss_of_its_exported_training_graph() -> None:
    ours = kx.transform(kx.differentiate(demo_forward(), logits="logits"), lr=0.01, rest_lr=0.003)
    exported = read_training_graph(onnx.ModelProto.FromString(model_bytes()))
    theirs = kx.transform(exported, lr=0.01, rest_lr=0.003)
    corpus = load_corpus()
    batches = list(itertools.islice(corpus.batches(256, seed=0), 60))
    held_out = corpus.held_out(limit=1_000)
    losses: list[list[float]] = []
    for model, parameters in ((ours, None), (theirs, initial_parameters(seed=0))):
        with kx.TrainingSession(model, parameters=parameters, threads=1) as session:
            run = [float(session.step(batch)["loss"]) for batch in batches]
            losses.append([*run, session.evaluate(held_out)])
    # The two graphs round differently, at 6e-8, which sixty steps amplify. That each gradient itself is right,
    # tests/frontends/autodiff/test_corpus.py shows: Adam would hide a wrong factor.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < 0.8 * losses[0][0]
