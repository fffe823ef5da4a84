"""K-FAC of layers, held against eigenvalues in float64 on committed graphs, step by step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import GRAPHS, Case

from kfac_onnx import UserError, metadata, transform
from kfac_onnx.metadata import Parameter, Role
from kfac_onnx.passes.find_embeddings import facts_of, values_by_name
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.readers import emit_divisor, read_training_graph
from kfac_onnx.reference import LayerReference, patches
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.tables.layers import LayerUse, layer_uses

if TYPE_CHECKING:
    from kfac_onnx.reference.operators import Array

LR = 0.02
RESNET = Path(__file__).parents[1] / "data" / "roles" / "resnet.onnx"
CASES = [
    ("torchjoint_in__nplm", "half"),  # MLP, bias as last row
    ("torchjoint_in__nplm", "whole"),
    ("torchjoint_in__gru_lm", "half"),  # a matrix that each time step uses
    ("torchjoint_in__lstm_lm", "half"),
    ("torchjoint_in__gpt_tied", "half"),  # attention
    ("tf2onnx_in__nplm", "half"),  # stored as [in, out]
    ("jax2onnx__untiedlm", "half"),  # einsum, no bias
    ("resnet", "half"),  # convolutions with strides, with and without bias
    ("resnet", "whole"),
]


def pipeline(options: str) -> str:
    return (
        f"find-embeddings,classify,insert-layer-kfac{{{options}}},"
        "insert-optimizer{method=sgd,parameters=all},close-step,dce,lower"
    )


class Layers:
    """A committed graph with batches and weights, and what its layers multiply and get back, at any weights."""

    def __init__(self, name: str) -> None:
        self.path = RESNET if name == "resnet" else GRAPHS / f"{name}.onnx"
        model = read_training_graph(self.path)
        parse_pipeline("find-embeddings,classify").run(model)
        values = values_by_name(model)
        facts = facts_of(model, values)
        parameters = metadata.read_list(model, "parameters", Parameter)
        self.gradients = {item.name: str(item.gradient) for item in parameters}
        self.roles = {
            role.parameter: role for role in metadata.read_list(model, "roles", Role) if role.kind == "hidden"
        }
        self.uses: dict[str, tuple[LayerUse, ...]] = {}
        for key, role in self.roles.items():
            uses = layer_uses(role, values[key], values[self.gradients[key]], facts)
            assert isinstance(uses, tuple)
            self.uses[key] = uses
        self.shapes = {item.name: item.shape for item in parameters}
        divisor = emit_divisor(model)
        wanted = [values[gradient] for gradient in self.gradients.values()]
        wanted += [
            value for uses in self.uses.values() for use in uses for value in (use.inputs, use.gradient)
        ]
        wanted += [] if divisor is None else [divisor]
        self.divisor = None if divisor is None else str(divisor.name)
        inputs = set(model.graph.inputs)
        model.graph.outputs.clear()
        model.graph.outputs.extend(dict.fromkeys(value for value in wanted if value not in inputs))
        for item in parameters:
            if values[item.name] not in inputs:
                model.graph.inputs.append(values[item.name])
            model.graph.initializers.pop(
                item.name, None
            )  # a weight of the file must not win over the fed one
        self.session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.names = [item.name for item in self.session.get_outputs()]
        self.weights, self.batches = self._data(name)

    def _data(self, name: str) -> tuple[dict[str, Array], list[dict[str, Array]]]:
        if name != "resnet":
            case = Case(name)
            feeds = [case.feed(which) for which in ("in", "in2")]
            weights = {key: feeds[0].get(key) for key in self.shapes}
            assert all(value is not None for value in weights.values())
            return {key: np.asarray(value) for key, value in weights.items()}, feeds
        rng = np.random.default_rng(3)
        weights = {key: rng.normal(0, 0.4, shape).astype(np.float32) for key, shape in self.shapes.items()}
        batches = [
            {
                "image": rng.normal(size=(size, 3, 8, 8)).astype(np.float32),
                "camera": rng.integers(0, 20, size),
                "label": rng.integers(0, 10, size),
            }
            for size in (4, 1)
        ]
        return weights, batches

    def run(self, feed: dict[str, Array]) -> dict[str, Array]:
        given = {item.name: feed[item.name] for item in self.session.get_inputs()}
        outputs = self.session.run(None, given)
        return {**given, **{name: np.asarray(value) for name, value in zip(self.names, outputs, strict=True)}}

    def bias(self, key: str) -> str | None:
        role, (first, *more) = self.roles[key], self.uses[key]
        if first.convolution is not None:
            bias = first.convolution.inputs[2] if len(first.convolution.inputs) > 2 else None
            return str(bias.name) if bias is not None and bias.name in self.gradients else None
        return None if more else role.bias

    def matrix(self, values: dict[str, Array], key: str, names: dict[str, str]) -> Array:
        """Return a matrix, its bias as last row, as float64[inputs, outputs]."""
        role = self.roles[key]
        stored = np.asarray(values[names[key]], np.float64)
        size = np.prod([stored.shape[axis] for axis in role.rows], dtype=int)
        matrix = np.transpose(stored, (*role.columns, *role.rows)).reshape(-1, size)
        bias = self.bias(key)
        return matrix if bias is None else np.vstack([matrix, np.asarray(values[names[bias]], np.float64)])

    def rows(self, out: dict[str, Array], key: str) -> tuple[Array, Array]:
        """Return inputs with their ones, and gradients of products, as float64 rows of all uses."""
        inputs: list[Array] = []
        slopes: list[Array] = []
        for use in self.uses[key]:
            h, g = (np.asarray(out[str(value.name)], np.float64) for value in (use.inputs, use.gradient))
            slopes.append(np.moveaxis(g, use.gradient_axis, -1).reshape(-1, g.shape[use.gradient_axis]))
            if use.convolution is None:
                inputs.append(np.moveaxis(h, use.input_axis, -1).reshape(-1, h.shape[use.input_axis]))
                continue
            node = use.convolution.attributes
            strides, pads = node.get_ints("strides") or [1, 1], node.get_ints("pads") or [0, 0, 0, 0]
            inputs.append(patches(h, self.shapes[key][2:], strides, pads))
        h = np.concatenate(inputs)
        h = h if self.bias(key) is None else np.column_stack([h, np.ones(len(h))])
        return h, np.concatenate(slopes)


layers_of = functools.cache(Layers)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steps_of_layers(name: str, kind: str, threads: int) -> None:
    layers = layers_of(name)
    assert layers.roles
    own = {key: key for key in layers.gradients}
    settings: dict[str, Any] = {} if kind == "half" else {"exponent": -1.0, "damping": 0.1}
    options = f"lr={LR}" + ("" if kind == "half" else ",power=whole,damping=0.1")
    references: dict[str, LayerReference] = {}
    model = transform(layers.path, pipeline=pipeline(options))
    seen = False
    with TrainingSession(model, parameters=layers.weights, threads=threads) as session:
        for step in range(20):
            feed = layers.batches[step % 2]
            before = {key: np.asarray(session.parameters[key]) for key in layers.weights}
            out = layers.run({**feed, **before})
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
            after = {key: np.asarray(session.parameters[key]) for key in layers.weights}
            for key in layers.roles:
                h, g = layers.rows(out, key)
                gradient = layers.matrix(out, key, layers.gradients)
                # what the rule read off the graph is what makes the exporter's own gradient
                np.testing.assert_allclose(h.T @ g, gradient, atol=2e-5 * np.abs(gradient).max())
                places = len(g) // len(feed["image"]) if name == "resnet" else 1
                reference = references.setdefault(key, LayerReference(LR, places=places, **settings))
                old, new = layers.matrix(before, key, own), layers.matrix(after, key, own)
                divisor = 1.0 if layers.divisor is None else float(out[layers.divisor])
                want = reference.step(old, gradient, h, g, divisor)
                # float32 powers are good to eps times the condition, which the damping bounds
                limit = 4e-6 * np.abs(old).max() + 3e-3 * np.abs(want - old).max()
                assert np.abs(new - want).max() <= limit, (step, key)
                seen = seen or np.abs(old + 1.01 * (new - old) - want).max() > limit
    assert seen


def test_states_are_those_of_the_block() -> None:
    model = transform(GRAPHS / "torchjoint_in__nplm.onnx", rest="kfac")
    shapes = {
        state.input: state.shape
        for state in metadata.read_list(model, "state", metadata.State)
        if state.input.startswith("kfac/m.fc.weight/")
    }
    assert shapes == {
        "kfac/m.fc.weight/A": (65, 65),
        "kfac/m.fc.weight/A.count": (),
        "kfac/m.fc.weight/G": (16, 16),
        "kfac/m.fc.weight/G.count": (),
        "kfac/m.fc.weight/root_A": (65, 65),
        "kfac/m.fc.weight/root_G": (16, 16),
        "kfac/m.fc.weight/momentum": (65, 16),
    }


def test_checkpoints_and_skipped_steps(tmp_path: Path) -> None:
    """A step that is skipped leaves every state as it was; a run goes on from its checkpoint bit by bit."""
    layers = layers_of("resnet")
    model = transform(RESNET, rest="kfac")
    good = layers.batches[0]
    bad = {**good, "image": np.full_like(good["image"], np.nan)}
    results: list[dict[str, Array]] = []
    for batches in ([good] * 6, [good, bad, good, good, bad, good, good, good]):
        with TrainingSession(model, parameters=layers.weights, threads=1) as session:
            skipped = [session.step(batch)["skipped"] for batch in batches]
            assert skipped == [batch is bad for batch in batches]
            results.append({key: np.array(session.parameters[key]) for key in layers.weights})
            session.save(tmp_path / f"{len(batches)}.ckpt")
    with TrainingSession(model, parameters=layers.weights, threads=1) as session:
        for _ in range(3):
            session.step(good)
        session.save(tmp_path / "run.ckpt")
    with TrainingSession.resume(tmp_path / "run.ckpt", threads=1) as session:
        for _ in range(3):
            session.step(good)
        results.append({key: np.array(session.parameters[key]) for key in layers.weights})
    for other in results[1:]:
        for key in layers.weights:
            np.testing.assert_array_equal(results[0][key], other[key])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "torchjoint_in__nplm",
            "find-embeddings,insert-layer-kfac",
            "insert-layer-kfac needs to know which matrices are hidden",
        ),
        (
            "torchjoint_in__nplm",
            "find-embeddings,classify,insert-layer-kfac{only=[m.out.bias]}",
            "'m.out.bias' cannot have K-FAC of a layer: it is no matrix, but of the role 'vector': its shape "
            "[100] has one dimension above 1",
        ),
        (
            "torchjoint_in__nplm",
            "find-embeddings,classify,insert-layer-kfac{grad-scale=3}",
            "grad-scale has no meaning with power=half, whose update does not depend on it",
        ),
        (
            "ortart_legloss__lstm_lm",
            "find-embeddings,classify,insert-layer-kfac",
            "'m.rnn.weight_ih_l0' cannot have K-FAC of a layer, because the graph does not show what its block "
            "needs: 'm.rnn.weight_ih_l0_grad' is no product of two tensors",
        ),
    ],
)
def test_misuse_is_an_error(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        transform(GRAPHS / f"{name}.onnx", pipeline=text)
    assert caught.value.message == message


def test_a_graph_that_hides_a_layer_is_trained_otherwise_by_a_rule() -> None:
    graph = GRAPHS / "ortart_legloss__lstm_lm.onnx"
    model = transform(graph, rest="kfac", rules=("m.rnn.weight_ih_l0=muon",))
    states = {state.input for state in metadata.read_list(model, "state", metadata.State)}
    assert "kfac/m.rnn.weight_ih_l0/momentum" in states
    assert "kfac/m.rnn.weight_ih_l0/A" not in states
