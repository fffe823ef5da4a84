from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.graph.verifier import problems_of
from kfac_onnx.metadata import Phase
from kfac_onnx.pipeline.base import Changes

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = "g (float[N] x, bool c) => (float[N] y) { t = Abs(x) y = Neg(t) }"


@pytest.fixture
def model(parse_model: Callable[[str], ir.Model]) -> ir.Model:
    return parse_model(GRAPH)


def test_a_node_says_who_made_it_and_why(model: ir.Model) -> None:
    emit = Emitter(model, "halve", site="emb", phase=Phase.PRECONDITION)
    half = emit.constant(np.float32(0.5), "half")
    value = emit.node("Mul", [model.graph.outputs[0], half], name="y", dtype=ir.DataType.FLOAT, shape=["N"])
    node = value.producer()
    assert node is not None
    assert node.metadata_props == {
        "kfac.pass": "halve",
        "kfac.site": "emb",
        "kfac.phase": "precondition",
    }
    assert value.name == node.name == "kfac/halve/emb/y"
    assert half.name == "kfac/halve/half"
    assert (value.dtype, value.shape) == (ir.DataType.FLOAT, ir.Shape(["N"]))
    assert emit.changes == Changes(added=2)
    later = emit.node("Neg", [value], phase=Phase.COMMIT).producer()
    assert later is not None
    assert later.metadata_props["kfac.phase"] == "commit"


def test_names_are_made_unique_also_against_the_users(model: ir.Model) -> None:
    emit = Emitter(model, "p")
    x = model.graph.inputs[0]
    first, second, third = (emit.node("Neg", [x], name="n") for _ in range(3))
    assert [first.name, second.name, third.name] == ["kfac/p/n", "kfac/p/n_2", "kfac/p/n_3"]
    assert Emitter(model, "p").node("Neg", [x], name="n").name == "kfac/p/n_4"
    assert emit.node("Neg", [x], name="kfac/w/A", exact_name=True).name == "kfac/w/A"
    with pytest.raises(ValueError, match="the model already has a value 't'"):
        emit.node("Neg", [x], name="t", exact_name=True)
    assert problems_of(model) == []


def test_several_outputs_and_a_new_domain(model: ir.Model) -> None:
    del model.opset_imports["ai.kfac"]
    emit = Emitter(model, "p")
    one, two = emit.node(
        "MergeRows",
        model.graph.inputs[:2],
        domain="ai.kfac",
        outputs=["unique_ids", Out("sums", ir.DataType.FLOAT, ["U", 4])],
    )
    assert (one.name, two.name) == ("kfac/p/unique_ids", "kfac/p/sums")
    assert one.dtype is None
    assert two.shape == ir.Shape(["U", 4])
    assert model.opset_imports["ai.kfac"] == 1
    assert emit.changes == Changes(added=1, edited=1)
    values = emit.node("Split", [one], outputs=3)
    assert [value.name for value in values] == ["kfac/p/Split", "kfac/p/Split_2", "kfac/p/Split_3"]


def test_equal_constants_are_one_and_dtype_and_shape_matter(model: ir.Model) -> None:
    emit = Emitter(model, "p")
    half = emit.constant(np.float32(0.5), "half")
    assert emit.constant(np.float32(0.5), "again") is half
    assert emit.constant(np.float64(0.5), "wide") is not half
    assert emit.constant(np.full(1, 0.5, np.float32), "vector") is not half
    assert emit.derive(site="emb").constant(np.float32(0.5)) is half
    assert emit.changes == Changes(added=3)
    assert half.shape == ir.Shape([])
    stored = half.const_value
    assert stored is not None
    assert stored.numpy() == np.float32(0.5)


def test_inputs_defaults_and_outputs(model: ir.Model) -> None:
    emit = Emitter(model, "p")
    rate = emit.input("lr", ir.DataType.FLOAT, [])
    emit.default(rate, np.float32(0.1))
    emit.output(emit.node("Identity", [rate], name="lr_new", dtype=ir.DataType.FLOAT, shape=[]))
    assert emit.changes == Changes(added=4)
    assert problems_of(model) == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    with pytest.raises(ValueError, match="the model already has a value 'x'"):
        emit.input("x", ir.DataType.FLOAT, [])


def test_branches_become_the_bodies_of_an_if(model: ir.Model) -> None:
    emit = Emitter(model, "p", site="emb", phase=Phase.REFRESH)
    x, condition = model.graph.inputs
    fresh, kept = emit.branch("fresh"), emit.branch("kept")
    for branch, op in ((fresh, "Neg"), (kept, "Identity")):
        branch.graph.outputs.append(branch.node(op, [x], dtype=ir.DataType.FLOAT, shape=["N"]))
    emit.output(
        emit.node(
            "If",
            [condition],
            attributes={"then_branch": fresh.graph, "else_branch": kept.graph},
            name="root",
            dtype=ir.DataType.FLOAT,
            shape=["N"],
        )
    )
    assert emit.changes == Changes(added=4)
    assert fresh.graph.node(0).metadata_props["kfac.phase"] == "refresh"
    assert problems_of(model) == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_before_puts_nodes_in_front(model: ir.Model) -> None:
    last = model.graph.node(1)
    emit = Emitter(model, "p", before=last)
    value = emit.node("Exp", [model.graph.inputs[0]])
    emit.replace_input(last, 0, value)
    emit.replace_input(last, 0, value)
    assert emit.changes == Changes(added=1, edited=1)
    assert [node.op_type for node in model.graph] == ["Abs", "Exp", "Neg"]
    assert problems_of(model) == []


def test_every_edit_is_counted(model: ir.Model, model_bytes: Callable[[ir.Model], bytes]) -> None:
    emit = Emitter(model, "p")
    before = model_bytes(model)
    x, (absolute, negated) = model.graph.inputs[0], list(model.graph)
    emit.replace_uses(absolute.outputs[0], x)
    assert emit.changes == Changes(edited=1)
    emit.remove([absolute])
    assert emit.changes == Changes(edited=1, removed=1)
    emit.replace_uses(negated.outputs[0], x, outputs=True)
    assert emit.changes == Changes(edited=2, removed=1)
    emit.count(edited=2)
    assert emit.changes == Changes(edited=4, removed=1)
    assert model_bytes(model) != before


def test_metadata_counts_only_when_it_changes(
    model: ir.Model, model_bytes: Callable[[ir.Model], bytes]
) -> None:
    emit = Emitter(model, "p")
    emit.metadata("loss", metadata.Loss("y", "mean"))
    assert emit.changes == Changes(edited=1)
    before = model_bytes(model)
    emit.metadata("loss", metadata.Loss("y", "mean"))
    assert emit.changes == Changes(edited=1)
    assert model_bytes(model) == before


def test_removing_a_node_that_is_used_is_an_error(model: ir.Model) -> None:
    with pytest.raises(ValueError, match="still being used"):
        Emitter(model, "p").remove([model.graph.node(0)])
