from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.passes.verifier import problems_of

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
