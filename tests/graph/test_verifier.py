from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.verifier import problems_of, require_sound

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = """
g (float[N] x, bool c) => (float[N] y, float[N] z) <float[1] w = {2}> {
  [first] t = Mul(x, w)
  [second] y = Neg(t)
  [third] z = If(c) <
    then_branch = a () => (float[N] p) { p = Abs(t) },
    else_branch = b () => (float[N] q) { q = Identity(t) }
  >
}
"""


@pytest.fixture
def model(parse_model: Callable[[str], ir.Model]) -> ir.Model:
    return parse_model(GRAPH)


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_a_sound_model_has_no_problems(model: ir.Model) -> None:
    assert problems_of(model) == []


def test_two_values_of_one_name(model: ir.Model) -> None:
    named(model, "first").outputs[0].name = "x"
    assert problems_of(model) == ["the name 'x' stands for an input and for an output of node 'first' (Mul)"]


def test_a_name_in_a_branch_may_not_repeat_an_outer_one(model: ir.Model) -> None:
    branch = named(model, "third").attributes["then_branch"].as_graph()
    branch.node(0).outputs[0].name = "t"
    assert problems_of(model) == [
        "the name 't' stands for an output of node 'first' (Mul) and for an output of a node Abs"
    ]


def test_use_before_definition(model: ir.Model) -> None:
    first = named(model, "first")
    model.graph.remove(first)
    model.graph.append(first)
    problems = problems_of(model)
    assert problems[0] == "node 'second' (Neg), input 0: 't' is used before node 'first' (Mul) makes it"
    assert len(problems) == 3  # and once in each branch


def test_a_removed_producer(model: ir.Model) -> None:
    second = named(model, "second")
    model.graph.remove(second)
    assert problems_of(model) == ["output 'y' is made by node 'second' (Neg), which is in no graph"]


def test_a_value_of_nowhere(model: ir.Model) -> None:
    named(model, "second").replace_input_with(0, ir.Value(name="u"))
    assert problems_of(model) == [
        "node 'second' (Neg), input 0: 'u' is not an input, not an initializer and no node makes it"
    ]


def test_a_value_of_a_branch_is_not_seen_outside(model: ir.Model) -> None:
    inner = named(model, "third").attributes["then_branch"].as_graph().node(0)
    inner.name = "inner"
    named(model, "second").replace_input_with(0, inner.outputs[0])
    assert problems_of(model) == [
        "node 'second' (Neg), input 0: 'p' is made by node 'inner' (Abs), which is in another graph"
    ]


def test_a_domain_that_is_not_imported(model: ir.Model) -> None:
    named(model, "second").domain = "com.microsoft"
    assert problems_of(model) == [
        "node 'second' (com.microsoft::Neg) is of a domain that is not imported: 'com.microsoft'"
    ]


def test_an_initializer_without_data(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None
    assert problems_of(model) == ["initializer 'w' has no data"]


def test_values_without_a_name(model: ir.Model) -> None:
    named(model, "first").outputs[0].name = None
    assert "node 'first' (Mul) has an output that is used but has no name" in problems_of(model)


def test_dialect_nodes_are_verified_by_their_operator(model: ir.Model) -> None:
    node = ir.Node("ai.kfac", "PreconditionRows", [model.graph.inputs[0]], name="bad")
    node.outputs[0].name = "bad_out"
    model.graph.append(node)
    problems = problems_of(model)
    assert problems
    assert all(problem.startswith("node 'bad' (ai.kfac::PreconditionRows): ") for problem in problems)


def test_metadata_may_not_name_what_is_not_there(model: ir.Model) -> None:
    metadata.write(model, "loss", metadata.Loss("loss"))
    metadata.write(
        model,
        "state",
        [
            metadata.State(
                input="s", output="s_new", shape=(), dtype="float32", initial="zeros",
                phase=metadata.Phase.COMMIT, update="in-place", candidate="s_candidate",
                role="counter", aliases=("x", "s_old"),
            )
        ],
    )  # fmt: skip
    metadata.write(
        model,
        "step",
        metadata.Step(
            loss="y",
            ok="ok",
            batch=("x", "labels"),
            learning_rates=(metadata.LearningRate("lr", 0.1),),
            root_checks=(metadata.RootCheck("w", "t", "y", "z", "residual", -0.5, 1e-3),),
        ),
    )
    assert problems_of(model) == [
        "kfac.loss names 'loss', which is not in the graph",
        "kfac.state: 's' is not an input of the graph",
        "kfac.state: 's_new' is not an output of the graph",
        "kfac.state of 's' names 's_candidate', which is not in the graph",
        "kfac.state of 's' names 's_old', which is not in the graph",
        "kfac.step: 'labels' is not an input of the graph",
        "kfac.step: 'lr' is not an input of the graph",
        "kfac.step names 'ok', which is not in the graph",
        "kfac.step names 'residual', which is not in the graph",
    ]


def test_a_step_is_given_tensors(model: ir.Model) -> None:
    step = metadata.Step(loss="y", ok="c", batch=("x",), learning_rates=())
    model.graph.inputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    assert problems_of(model) == []
    metadata.write(model, "step", step)
    assert problems_of(model) == ["the input 'x' of a training step is no tensor"]


def test_branches_may_share_names(model: ir.Model) -> None:
    named(model, "third").attributes["else_branch"].as_graph().node(0).outputs[0].name = "p"
    assert problems_of(model) == []


def test_a_file_of_another_version_may_have_other_operators(model: ir.Model) -> None:
    """Its functions are in the file, so it runs; only what this version inserts must fit this version."""
    second = named(model, "second")
    second.domain, second.op_type = "ai.kfac", "OutputFactorUpdate"
    model.opset_imports["ai.kfac"] = 1
    assert any("OutputFactorUpdate" in problem for problem in problems_of(model))
    assert problems_of(model, own_operators=False) == []
    require_sound(model, None)
    with pytest.raises(UserError, match="the model contradicts itself"):
        require_sound(model, None, own_operators=True)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("state", "[", "the entry 'kfac.state' of the model's metadata is damaged: it is not JSON: "),
        ("state", '{"a": 1}', "the entry 'kfac.state' of the model's metadata is damaged: it is no list"),
        ("step", "[]", "the entry 'kfac.step' of the model's metadata is damaged: it is no object"),
        (
            "loss",
            '{"value": 3}',
            "the entry 'kfac.loss' of the model's metadata is damaged: 'value' must be a text",
        ),
        (
            "step",
            "[" * 100_000,
            "the entry 'kfac.step' of the model's metadata is damaged: it is nested too deeply",
        ),
        ("loss", '{"value": "\\ud800"}', "'value' is no valid text"),
    ],
)
def test_damaged_metadata_is_the_users_fault(model: ir.Model, key: str, text: str, said: str) -> None:
    model.metadata_props[f"kfac.{key}"] = text
    with pytest.raises(UserError) as caught:
        require_sound(model, "m.onnx")
    assert said in caught.value.message
    assert caught.value.place == "m.onnx"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": [3]}, "kfac.state: 'c' has the shape [3], which is not that of the input"),
        ({"shape": [-1]}, "kfac.state of 'c' has a negative dimension"),
        ({"initial": "zero3"}, "kfac.state of 'c' begins as 'zero3', which is no known value"),
        ({"initial": "identity"}, "kfac.state of 'c' begins as the identity, and is no square matrix"),
    ],
)
def test_states_fit_their_inputs(model: ir.Model, changes: dict[str, Any], said: str) -> None:
    state = metadata.State("c", "z", (), "bool", "zeros", metadata.Phase.COUNT, "double", "z", "counter")
    metadata.write(model, "state", [state])
    assert problems_of(model) == []
    metadata.write(model, "state", [dataclasses.asdict(state) | changes])
    assert said in problems_of(model)
    metadata.write(model, "state", [state, state])
    assert problems_of(model) == ["kfac.state names 'c' 2 times"]


def test_phases_are_known(model: ir.Model) -> None:
    named(model, "first").metadata_props["kfac.phase"] = "commit"
    assert problems_of(model) == []
    named(model, "first").metadata_props["kfac.phase"] = "later"
    assert problems_of(model) == ["node 'first' (Mul) is of no known phase: 'later'"]
