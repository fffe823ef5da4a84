from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.graph.context import Context, names_in
from kfac_onnx.graph.emit import Emitter, Out, replace_node
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


def test_an_operator_is_typed_shaped_named_and_tagged(model: ir.Model) -> None:
    emit = Emitter(model, "p", site="emb", phase=Phase.COUNT)
    x = model.graph.inputs[0]
    doubled = emit.op("Add", x, x, name="doubled")
    total = emit.op("ReduceSum", doubled, emit.ints(0), phase=Phase.COMMIT, keepdims=0)
    assert (doubled.name, total.name) == ("kfac/p/emb/doubled", "kfac/p/emb/ReduceSum")
    assert (doubled.dtype, doubled.shape) == (ir.DataType.FLOAT, ir.Shape(["N"]))
    assert (total.dtype, total.shape) == (ir.DataType.FLOAT, ir.Shape([]))
    node = total.producer()
    assert node is not None
    assert node.metadata_props == {"kfac.pass": "p", "kfac.site": "emb", "kfac.phase": "commit"}
    assert node.attributes["keepdims"].as_int() == 0
    assert emit.changes == Changes(added=3)
    assert problems_of(model) == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, ir.AttributeType.INT),
        (True, ir.AttributeType.INT),
        (0.5, ir.AttributeType.FLOAT),
        ("add", ir.AttributeType.STRING),
        ((1, 2), ir.AttributeType.INTS),
        ([0.5, 1.5], ir.AttributeType.FLOATS),
        (ir.tensor(np.zeros(1)), ir.AttributeType.TENSOR),
        (ir.Graph([], [], nodes=[]), ir.AttributeType.GRAPH),
        (ir.AttrFloat32("a", 2.0), ir.AttributeType.FLOAT),
    ],
)
def test_attributes_of_every_kind(model: ir.Model, value: object, kind: ir.AttributeType) -> None:
    (result,) = Emitter(model, "p").many("Other", [], 1, {"a": value}, "custom")  # pyright: ignore[reportArgumentType]
    node = result.producer()
    assert node is not None
    assert node.attributes["a"].type == kind
    assert model.opset_imports["custom"] == 1


def test_what_takes_a_nodes_place_has_its_name_and_says_what_it_was(model: ir.Model) -> None:
    node = model.graph.node(0)
    emit = Emitter.in_place_of(Context.of(model), node, "lower")
    x = node.inputs[0]
    assert x is not None
    square = emit.op("Mul", x, x)
    root = emit.op("Sqrt", square)
    assert [each.op_type for each in emit.nodes] == ["Mul", "Sqrt"]
    assert square.name == "kfac/lower/t/Mul"
    with pytest.raises(ValueError, match="an emitter that collects nodes has no graph"):
        _ = emit.graph
    replace_node(node, emit, [root])
    assert [each.op_type for each in model.graph] == ["Mul", "Sqrt", "Neg"]
    assert root.name == "t"
    assert [each.metadata_props for each in emit.nodes] == [{"kfac.lowered": "Abs"}] * 2
    assert problems_of(model) == []


def test_an_input_that_is_passed_through_gets_an_identity(model: ir.Model) -> None:
    node = model.graph.node(0)
    replace_node(node, Emitter.in_place_of(Context.of(model), node), [node.inputs[0]])
    assert [each.op_type for each in model.graph] == ["Identity", "Neg"]
    assert problems_of(model) == []


def test_a_model_has_one_context_which_all_emitters_share(model: ir.Model) -> None:
    context = Context.of(model)
    assert Emitter(model, "p").context is context
    assert Emitter(model, "q").derive(site="w").context is context
    assert Context.of(model.clone()) is not context
    first = Emitter(model, "p").constant(np.float32(2.0))
    assert Emitter(model, "q").constant(np.float32(2.0)) is first
    assert context.names == names_in(model.graph)


def test_names_are_forgotten_with_what_had_them(model: ir.Model) -> None:
    context = Context.of(model)
    assert context.fresh("t") == "t_2"
    model.graph.node(0).outputs[0].name = "renamed"
    assert context.fresh("renamed") == "renamed"  # nobody told the context
    context.invalidate()
    assert context.fresh("t") == "t"
    assert context.fresh("renamed") == "renamed_2"
    context.release("t")
    assert context.take("t") == "t"


def test_a_constant_that_was_removed_is_added_again_under_another_name(model: ir.Model) -> None:
    emit = Emitter(model, "p")
    first = emit.ints(1, 2)
    del model.graph.initializers[str(first.name)]
    second = emit.ints(1, 2)
    assert second is not first
    assert (first.name, second.name) == ("kfac/p/constant", "kfac/p/constant_2")
    assert model.graph.initializers["kfac/p/constant_2"] is second
    assert emit.changes == Changes(added=2)


def test_zeros_shapes_and_parts(model: ir.Model) -> None:
    emit = Emitter(model, "p")
    x = model.graph.inputs[0]
    shape = emit.shape(x)
    node = shape.producer()
    assert node is not None
    assert node.op_type == "Shape"
    static = emit.shape(emit.constant(np.zeros((2, 3), np.float32)))
    assert static.const_value is not None
    assert list(static.const_value.numpy()) == [2, 3]
    zeros = emit.zeros(shape, ir.DataType.INT64)
    assert (zeros.dtype, zeros.shape) == (ir.DataType.INT64, ir.Shape(["N"]))
    assert emit.entry(shape, 0).shape == ir.Shape([])
    assert emit.cast(x, ir.DataType.FLOAT, ir.DataType.FLOAT) is x
    assert emit.concat(shape) is shape
