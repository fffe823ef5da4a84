"""Muon, held against singular values in float64 on committed graphs, step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from corpus_cases import GRAPHS, marked

from kfac_onnx import UserError, metadata, transform
from kfac_onnx.metadata import Role
from kfac_onnx.passes.classify import Classify
from kfac_onnx.pipeline.log import Log
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.readers import read_training_graph
from kfac_onnx.reference import MuonReference
from kfac_onnx.runtime import TrainingSession

LR = 0.02
NAMES = [
    "torchjoint_in__gpt_tied",  # attention, fused query, key and value
    "ortart_legloss__lstm_lm",  # two matrices of a recurrent layer
    "torchjoint_in__gru_lm",
    "torchjoint_in__dlrm_mean",
    "tf2onnx_in__nplm",  # stored as [in, out]
    "jax2onnx__untiedlm",  # einsum
]


def pipeline(muon: str) -> str:
    return f"find-embeddings,classify,insert-muon{{{muon}}},insert-optimizer{{method=sgd,parameters=all}},close-step,dce,lower"


def hidden_roles(name: str) -> dict[str, Role]:
    model = read_training_graph(GRAPHS / f"{name}.onnx")
    parse_pipeline("find-embeddings").run(model)
    Classify().run(model, Log())
    return {
        role.parameter: role for role in metadata.read_list(model, "roles", Role) if role.kind == "hidden"
    }


def as_matrix(value: np.ndarray, role: Role) -> np.ndarray:
    size = math.prod(value.shape[axis] for axis in role.rows)
    return np.transpose(value, (*role.rows, *role.columns)).reshape(size, -1)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_steps_of_hidden_matrices(name: str, threads: int) -> None:
    case, graph = marked(name)
    weights, found = graph.initial(case), hidden_roles(name)
    assert found
    references = {key: MuonReference(LR) for key in found}
    gradients = {item.name: item.gradient for item in graph.parameters}
    model = transform(case.path, pipeline=pipeline(f"lr={LR},weight-decay=0.1"))
    batches = [{**case.feed(which), **graph.fed_back(case)} for which in ("in", "in2")]
    seen = False
    with TrainingSession(model, parameters=weights, threads=threads) as session:
        for step in range(20):
            feed = batches[step % 2]
            before = {key: np.asarray(session.parameters[key]) for key in weights}
            out = graph.run({**feed, **before})
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
            for key, role in found.items():
                old = as_matrix(np.asarray(before[key], np.float64), role)
                gradient = as_matrix(np.asarray(out[gradients[key]], np.float64), role)
                want = references[key].step(old * (1 - LR * 0.1), gradient)
                got = as_matrix(np.asarray(session.parameters[key], np.float64), role)
                # float32 products of five iterations, each of which can stretch an error by 3.4445.
                limit = 4e-6 * np.abs(old).max() + 2e-3 * np.abs(want - old).max()
                assert np.abs(got - want).max() <= limit, (step, key)
                seen = seen or np.abs(old + 1.01 * (got - old) - want).max() > limit
    assert seen


def test_matrices_of_one_shape_are_one_product() -> None:
    model = transform(GRAPHS / "torchjoint_in__gpt_tied.onnx", pipeline=pipeline("iterations=5"))
    steps = [node for node in model.graph if node.op_type == "OrthogonalizeStep"]
    shapes = {tuple(sorted(item)) for item in ((48, 16), (16, 16), (32, 16), (16, 32))}
    assert len(steps) == 5 * len(shapes)


def test_without_a_gradient_nothing_moves() -> None:
    """A gradient of zero has no direction: the matrix stays, and no NaN comes of 0/0."""
    case, graph = marked("torchjoint_in__nplm")
    weights = graph.initial(case)
    name = next(iter(hidden_roles("torchjoint_in__nplm")))
    site = graph.sites[0]
    still = {**weights, site.parameter: np.zeros_like(weights[site.parameter])}
    model = transform(case.path, pipeline=pipeline("lr=0.5"))
    with TrainingSession(model, parameters=still, threads=1) as session:
        feed = case.feed() | graph.fed_back(case)
        assert session.step({item.name: feed[item.name] for item in session.batch_inputs})["skipped"] is False
        np.testing.assert_array_equal(session.parameters[name], weights[name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "find-embeddings,insert-muon",
            "insert-muon needs to know which matrices are hidden\n"
            "  in:   insert-muon\n"
            "  help: put classify before it: find-embeddings,classify,...,insert-muon",
        ),
        (
            "find-embeddings,classify,insert-muon{only=[m.fc.bias]}",
            "'m.fc.bias' cannot have Muon: it is no matrix, but of the role 'vector': its shape [16] has one "
            "dimension above 1\n"
            "  in:   insert-muon\n"
            "  help: leave it to another optimizer: `scan MODEL` lists the roles",
        ),
    ],
)
def test_misuse_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        transform(GRAPHS / "torchjoint_in__nplm.onnx", pipeline=text)
    assert str(caught.value) == message


def test_a_pattern_overrides_the_role() -> None:
    model = transform(GRAPHS / "torchjoint_in__nplm.onnx", pipeline=pipeline("only=[m.out.weight]"))
    states = {state.input for state in metadata.read_list(model, "state", metadata.State)}
    assert "kfac/m.out.weight/momentum" in states
    assert "kfac/m.fc.weight/momentum" not in states
