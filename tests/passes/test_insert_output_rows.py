"""Output tables, held against eigenvalues in float64 on committed graphs, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import GRAPHS, marked

from kfac_onnx import UserError, metadata, transform
from kfac_onnx.metadata import Role
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.readers import read_training_graph
from kfac_onnx.reference import OutputRowReference
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable

LR = 0.02
TABLES = {
    "torchjoint_in__nplm": "m.out.weight",  # [C, n] with a bias
    "tf2onnx_in__nplm": "out_w",  # stored as [n, C]
    "torchjoint_in__lstm_lm": "m.out.weight",
    "jax2onnx__untiedlm": "head",  # einsum over [B, T, n], no bias
    "ortart_dynloss__gpt_untied": "m.head.weight",
}
"""Their softmax has fewer than 256 classes, so they are asked for by name."""


def pipeline(options: str) -> str:
    return (
        f"find-embeddings,classify,insert-output-rows{{{options}}},"
        "insert-optimizer{method=sgd,parameters=all},close-step,dce,lower"
    )


def role_of(name: str) -> Role:
    model = read_training_graph(GRAPHS / f"{name}.onnx")
    parse_pipeline("find-embeddings,classify").run(model)
    roles = metadata.read_list(model, "roles", Role)
    return next(role for role in roles if role.parameter == TABLES[name])


def activations_of(name: str, role: Role) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return what computes the inputs of the table, in the graph as it was read."""
    model = read_training_graph(GRAPHS / f"{name}.onnx")
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.append(values[role.activations])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {item.name for item in session.get_inputs()}

    def run(feed: dict[str, np.ndarray]) -> np.ndarray:
        given = {key: value for key, value in feed.items() if key in inputs}
        (h,) = session.run([role.activations], given)
        h = np.moveaxis(np.asarray(h, np.float64), role.features, -1)
        return h.reshape(-1, h.shape[-1])

    return run


def as_table(values: dict[str, np.ndarray], names: list[str], role: Role) -> np.ndarray:
    """Return matrix and bias as float64[C, n + 1]."""
    matrix = np.asarray(values[names[0]], np.float64)
    matrix = matrix if role.rows == (0,) else matrix.T
    return matrix if len(names) == 1 else np.column_stack([matrix, np.asarray(values[names[1]], np.float64)])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", list(TABLES))
def test_steps_of_output_tables(name: str, threads: int) -> None:
    case, graph = marked(name)
    weights, role = graph.initial(case), role_of(name)
    assert role.activations is not None
    names = [role.parameter, *([] if role.bias is None else [role.bias])]
    assert len(names) == (1 if "untied" in name else 2)
    gradients = {item.name: str(item.gradient) for item in graph.parameters}
    reference, activations = OutputRowReference(LR), activations_of(name, role)
    model = transform(case.path, pipeline=pipeline(f"lr={LR},only=[{role.parameter}]"))
    batches = [{**case.feed(which), **graph.fed_back(case)} for which in ("in", "in2")]
    seen = False
    with TrainingSession(model, parameters=weights, threads=threads) as session:
        for step in range(20):
            feed = batches[step % 2]
            before = {key: np.asarray(session.parameters[key]) for key in weights}
            out = graph.run({**feed, **before})
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
            after = {key: np.asarray(session.parameters[key]) for key in weights}
            h = activations({**feed, **before})
            h = h if len(names) == 1 else np.column_stack([h, np.ones(len(h))])
            slopes = {key: out[gradients[key]] for key in names}
            old, new = as_table(before, names, role), as_table(after, names, role)
            want = reference.step(old, as_table(slopes, names, role), h)
            # The float32 root is good to 2·eps·(1 + n/ρ), which is 4e-4 for n = 16.
            limit = 4e-6 * np.abs(old).max() + 2e-3 * np.abs(want - old).max()
            assert np.abs(new - want).max() <= limit, step
            seen = seen or np.abs(old + 1.01 * (new - old) - want).max() > limit
    assert seen


def test_states_are_those_of_the_block() -> None:
    model = transform(GRAPHS / "torchjoint_in__nplm.onnx", pipeline=pipeline("only=[m.out.weight]"))
    shapes = {
        state.input: state.shape
        for state in metadata.read_list(model, "state", metadata.State)
        if state.input.startswith("kfac/m.out.weight/")
    }
    assert shapes == {
        "kfac/m.out.weight/A": (17, 17),
        "kfac/m.out.weight/A.count": (),
        "kfac/m.out.weight/root": (17, 17),
        "kfac/m.out.weight/momentum": (100, 17),
        "kfac/m.out.weight/window": (100,),
    }


def test_a_run_goes_on_from_its_checkpoint(tmp_path: object) -> None:
    case, graph = marked("torchjoint_in__nplm")
    weights = graph.initial(case)
    model = transform(case.path, pipeline=pipeline("only=[m.out.weight]"))
    feed = {**case.feed(), **graph.fed_back(case)}
    with TrainingSession(model, parameters=weights, threads=1) as session:
        batch = {item.name: feed[item.name] for item in session.batch_inputs}
        for _ in range(5):
            session.step(batch)
        session.save(f"{tmp_path}/run.ckpt")
        for _ in range(7):
            session.step(batch)
        want = np.asarray(session.parameters["m.out.weight"])
    with TrainingSession.resume(f"{tmp_path}/run.ckpt", threads=1) as session:
        for _ in range(7):
            session.step(batch)
        np.testing.assert_array_equal(session.parameters["m.out.weight"], want)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "find-embeddings,insert-output-rows",
            "insert-output-rows needs to know which matrices are output tables",
        ),
        (
            "find-embeddings,classify,insert-output-rows{only=[m.out.bias]}",
            "'m.out.bias' cannot be an output table: it is of the role 'vector', and no single product with "
            "activations reads it (its shape [100] has one dimension above 1)",
        ),
    ],
)
def test_misuse_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        transform(GRAPHS / "torchjoint_in__nplm.onnx", pipeline=text)
    assert caught.value.message == message
