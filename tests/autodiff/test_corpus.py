"""Whole graphs: our gradients against those that exporters wrote into training graphs, and against PyTorch's.

A training graph is cut down to its loss and differentiated again; every gradient must equal the one that
the exporter's own graph computes. Forward-only graphs are differentiated with a loss on their logits and must
give PyTorch's gradients, which stand with another export of the same model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.autodiff import append_gradients
from kfac_onnx.canonical.pipelines import CANONICAL
from kfac_onnx.metadata import Loss, Parameter
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime.gradcheck.verify import verify_gradients

if TYPE_CHECKING:
    from collections.abc import Mapping

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
TRAINING = [
    "jax2onnx__bag_mean",
    "jax2onnx__flax_nplm",
    "jax2onnx__nplm_onehot",
    "jax2onnx__nplm_take",
    "jax2onnx__untiedlm",
    "ortart_dyncore__dlrm_manual_sum",
    "ortart_dyncore__lookup_index",
    "ortart_dynloss__gpt_untied",
    "ortart_legcore__bert_sum",
    "ortart_legcore__decoys",
    "ortart_legcore__lookup_concat",
    "ortart_legcore__lookup_int32",
    "ortart_legcore__lookup_scale",
    "ortart_legcore__twotower_bce",
    "ortart_legloss__gpt_tied",
    "ortart_legloss__lookup_gather_op",
    "ortart_legloss__lookup_onehot",
    "ortart_legloss__nplm_ignore",
    "ortgrad_leg__siamese",
    "tf2onnx_in__bag_mean",
    "tf2onnx_in__nplm_int32",
    "tf2onnx_in__tiedlm",
    "tf2onnx_in__twotower_sum",
    "torchjoint_in__dlrm_offsets_mean",
    "torchjoint_in__gpt_tied",
    "torchjoint_in__gru_lm",
    "torchjoint_in__lookup_ids_offset",
    "torchjoint_in__lstm_lm",
    "torchjoint_in__manualbag_pad0",
    "torchmakefx__siamese",
]
"""One or more of every exporter. Left out are graphs whose own gradient is not that of their loss: dropped
padding rows, weights that an exporter merged because they started equal, random dropout."""
FORWARD = {
    "fwd_dyncore__nplm": "torchjoint_in__nplm",
    "fwd_evalext__nplm": "torchjoint_in__nplm",
    "fwd_dyncore__gpt_tied": "torchjoint_in__gpt_tied",
    "fwd_legcore__gpt_tied": "torchjoint_in__gpt_tied",
    "fwd_legcore__lookup_axis1": "torchjoint_in__lookup_axis1",
    "fwd_legcore__lookup_transpose": "torchjoint_in__lookup_transpose",
    "fwd_legcore__lstm_lm": "torchjoint_in__lstm_lm",
    "fwd_eval__bert_sum": "torchjoint_in__bert_sum",
    "fwd_dynoptcore__bert_sum": "torchjoint_in__bert_sum",
    "fwd_dyncore__dlrm_offsets_mean": "torchjoint_in__dlrm_offsets_mean",
    "fwd_legcore__dlrm_offsets_mean": "torchjoint_in__dlrm_offsets_mean",
}
"""Forward-only graph -> another export of the same model, beside which PyTorch's gradients are kept."""
BINARY = "dlrm"
"""Models of this name have one logit per example and the binary cross-entropy as their loss."""
PADDED = {"tok.weight"}
"""Tables of bert_sum with padding_idx=0: a forward graph does not say that their row 0 is not trained."""
RENAMED = {"head.weight": "tok.weight"}
"""Tied weights under the other of their two names."""
# Both sides sum in float32 over up to 100 terms in their own order, through layers that double the error.
TOLERANCE = 2e-5


def run(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feeds = {item.name: arrays[f"in:{item.name}"] for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_close(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape, name
    largest = float(np.max(np.abs(expected)))
    assert largest > 0, f"{name}: nothing to compare with"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * largest, err_msg=name)


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_equal_those_of_the_exporter(name: str) -> None:
    exported = read_training_graph(GRAPHS / f"{name}.onnx")
    parameters = metadata.read_list(exported, "parameters", Parameter)
    loss = metadata.read(exported, "loss", Loss)
    assert loss is not None
    model = read_training_graph(GRAPHS / f"{name}.onnx")
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    top = next(value for value in model.graph.outputs if value.name == loss.value)
    model.graph.outputs.clear()
    model.graph.outputs.append(top)
    RemoveUnusedNodesPass()(model)
    weights = [values[item.name] for item in parameters]
    found = append_gradients(model, top, weights)
    assert len(found) == len(weights)
    for weight in weights:
        node = ir.node("Identity", [found[weight]])
        output = node.outputs[0]
        output.name, output.type, output.shape = (
            f"ours: {weight.name}",
            ir.TensorType(weight.dtype),
            weight.shape,
        )
        model.graph.append(node)
        model.graph.outputs.append(output)
    parse_pipeline(CANONICAL).run(model)
    with np.load(GRAPHS / f"{name}.npz") as arrays:
        ours, theirs = run(model, arrays), run(exported, arrays)
    for item in parameters:
        assert_close(item.name, ours[f"ours: {item.name}"], theirs[str(item.gradient)])


@pytest.mark.parametrize("name", FORWARD)
def test_a_forward_graph_gets_the_gradients_of_pytorch(name: str) -> None:
    model = kx.differentiate(GRAPHS / f"{name}.onnx", loss="bce" if BINARY in name else "cross-entropy")
    parameters = metadata.read_list(model, "parameters", Parameter)
    with np.load(GRAPHS / f"{name}.npz") as own, np.load(GRAPHS / f"{FORWARD[name]}.npz") as other:
        arrays = {**other, **own}
    names = json.loads((GRAPHS / f"{FORWARD[name]}.json").read_text())["label_inputs"]
    arrays["in:labels"] = arrays[f"in:{names[0]}"]
    results = run(model, arrays)
    np.testing.assert_allclose(results["loss"], arrays["ref:loss"], rtol=1e-6)
    compared: list[str] = []
    for item in parameters:
        key = f"ref:grad:{RENAMED.get(item.name, item.name)}"
        expected, actual = arrays.get(key), results[str(item.gradient)]
        if expected is None:  # an anonymous constant that an exporter folded from a weight
            candidates = [value for at, value in arrays.items() if at.startswith("ref:grad:")]
            assert any(
                view.shape == actual.shape
                and np.allclose(view, actual, rtol=0, atol=TOLERANCE * np.abs(view).max())
                for value in candidates
                for view in (value, value.T, value[None])
            ), item.name
            continue
        first = 1 if item.name in PADDED and "bert_sum" in name else 0
        assert_close(item.name, actual[first:], expected[first:])
        compared.append(item.name)
    assert len(compared) >= 5


@pytest.mark.parametrize("name", FORWARD)
def test_a_differentiated_graph_is_found_transformed_and_trains(name: str) -> None:
    model = kx.differentiate(GRAPHS / f"{name}.onnx", loss="bce" if BINARY in name else "cross-entropy")
    sites = kx.scan(model).sites
    assert sites
    with np.load(GRAPHS / f"{name}.npz") as own, np.load(GRAPHS / f"{FORWARD[name]}.npz") as other:
        arrays = {**other, **own}
    step = kx.transform(model, lr=0.02, rest_lr=0.01)
    batch = {item.name: arrays[f"in:{item.name}"] for item in model.graph.inputs}
    with kx.TrainingSession(step) as session:
        losses = [session.step(batch)["loss"] for _ in range(10)]
    np.testing.assert_allclose(losses[0], arrays["ref:loss"], rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]


# No PyTorch gradient stands beside these; identical_init's exporter merged two tables that started equal.
UNPAIRED = {
    "fwd_dyncore__scan_rnn": (5, (6,)),
    "fwd_dyncore__dlrm_sum": (None, (6,)),
    "fwd_eval__identical_init": (4, (6,)),
}
"""Forward-only graph -> its classes (None for the binary cross-entropy) and the shape of its labels."""


@pytest.mark.parametrize("name", UNPAIRED)
def test_gradients_equal_finite_differences(name: str) -> None:
    classes, shape = UNPAIRED[name]
    model = kx.differentiate(GRAPHS / f"{name}.onnx", loss="bce" if classes is None else "cross-entropy")
    with np.load(GRAPHS / f"{name}.npz") as arrays:
        batch = {key[3:]: arrays[key] for key in arrays if key.startswith("in:")}
    rng = np.random.default_rng(0)
    batch["labels"] = (
        rng.random(shape).astype(np.float32) if classes is None else rng.integers(0, classes, shape)
    )
    checks = verify_gradients(model, batch)
    assert len(checks) > 2
    assert {check.status for check in checks} == {"ok"}, checks
