"""Attaching bodies to models, what they end in, and the verifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from kfac_onnx import dialect
from kfac_onnx.dialect.signature import ports
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def apply_rows_node(**changed: Any) -> ir.Node:
    inputs = {
        "W": value("W", F32, 9, 4),
        "ids": value("ids", I64, "N"),
        "update": value("update", F32, "N", 4),
        "lr": value("lr", F32),
    } | changed
    return ir.node("ApplyRows", list(inputs.values()), domain=dialect.DOMAIN)


@pytest.mark.parametrize("variant", ["safe", "sequential", "atomic", "ordered"])
def test_every_operator_has_a_body_that_matches_its_signature(variant: dialect.Variant) -> None:
    bodies = dialect.functions(variant)
    assert list(bodies) == list(dialect.OPERATORS)
    for name, body in bodies.items():
        operator = dialect.OPERATORS[name]
        assert body.identifier() == (dialect.DOMAIN, name, "")
        assert len(body.inputs) == len(operator.inputs)
        assert len(body.outputs) == len(operator.outputs)
        assert list(body.attributes) == [attribute.name for attribute in operator.attributes]
        assert body.opset_imports[""] == 18


@pytest.mark.parametrize("variant", ["safe", "sequential", "atomic", "ordered"])
@pytest.mark.parametrize(
    "name", ["InputFactorUpdate", "AddRows", "ApplyRows", "ApplyColumns", "ApplyFlat", "WriteRows"]
)
def test_writers_end_in_the_scatter_that_makes_their_output(name: str, variant: dialect.Variant) -> None:
    body = dialect.functions(variant, [name])[name]
    last = body.outputs[0].producer()
    assert last is not None
    assert last.inputs[0] is body.inputs[0]
    assert [node.op_type for node in body].count(last.op_type) == 1
    safe = variant == "safe" and name != "WriteRows"
    always = name in ("ApplyColumns", "ApplyFlat") or (name, variant) == ("InputFactorUpdate", "sequential")
    assert last.op_type == ("ScatterElements" if safe or always else "ScatterND")


@pytest.mark.parametrize("name", ["InputFactorUpdate", "AddRows", "ApplyRows", "WriteRows"])
def test_writers_update_a_bound_buffer_in_place(name: str, make_model: Callable[..., ir.Model]) -> None:
    table = np.zeros(6) if name == "InputFactorUpdate" else np.zeros((6, 3), np.float32)
    ids, rows = np.array([1, 4, 1]), np.ones((3, *table.shape[1:]), table.dtype)
    inputs = [table, ids, rows] + ([np.array(-1.0, np.float32)] if name == "ApplyRows" else [])
    model = make_model(name, inputs, {}, variant="sequential", opset=18, in_branch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    bound = onnxruntime.OrtValue.ortvalue_from_numpy(table)
    binding = session.io_binding()
    names = [entry.name for entry in session.get_inputs()]
    binding.bind_ortvalue_input(names[0], bound)
    for entry, array in zip(names[1:], inputs[1:], strict=True):
        binding.bind_cpu_input(entry, array)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, bound)
    session.run_with_iobinding(binding)
    written = bound.numpy().reshape(6, -1)[:, 0]
    repeated = 1.0 if name == "WriteRows" else 2.0
    assert written.tolist() == [0.0, repeated, 0.0, 0.0, 1.0, 0.0]


def test_attach_adds_what_is_used_also_in_branches_and_functions() -> None:
    inner = apply_rows_node()
    x = value("x", F32, 3)
    flag = ir.node("AllFinite", [x], domain=dialect.DOMAIN)
    function = ir.Function(
        "user",
        "Check",
        graph=ir.Graph([x], flag.outputs, nodes=[flag], opset_imports={"": 18}),
        attributes=[],
    )
    same = ir.node("Identity", [inner.inputs[0]])
    branches = {
        "then_branch": ir.Graph([], inner.outputs, nodes=[inner], name="then"),
        "else_branch": ir.Graph([], same.outputs, nodes=[same], name="else"),
    }
    condition = value("condition", ir.DataType.BOOL)
    choice = ir.node("If", [condition], attributes=branches)
    graph = ir.Graph([condition], choice.outputs, nodes=[choice], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9, functions=[function])
    assert dialect.attach(model, "safe") == ["AllFinite", "ApplyRows"]
    assert ("ai.kfac", "ApplyRows", "") in model.functions
    assert model.graph.opset_imports == {"": 18, "ai.kfac": 1}


def test_attach_again_changes_the_variant_and_drops_what_is_unused() -> None:
    node = apply_rows_node()
    inputs = [source for source in node.inputs if source is not None]
    model = ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=9)
    dialect.attach(model, "safe")
    extra = dialect.functions("safe", ["Sgd"])["Sgd"]
    model.functions[extra.identifier()] = extra
    dialect.attach(model, "atomic")
    assert [key[1] for key in model.functions] == ["ApplyRows"]
    kinds = {n.op_type for n in model.functions[("ai.kfac", "ApplyRows", "")]}
    assert "ScatterND" in kinds
    assert "ScatterElements" not in kinds


def test_attach_imports_the_domain_of_the_inverse() -> None:
    G, damping = value("G", F32, 3, 3), value("d", F32)
    node = ir.node("FactorInverse", [G, damping, G], domain=dialect.DOMAIN, num_outputs=2)
    model = ir.Model(ir.Graph([G, damping], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=9)
    dialect.attach(model, "safe")
    assert model.graph.opset_imports == {"": 18, "com.microsoft": 1, "ai.kfac": 1}


def test_attach_refuses_an_operator_that_does_not_exist() -> None:
    x = value("x", F32, 3)
    node = ir.node("AplyRows", [x], domain=dialect.DOMAIN)
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=9)
    with pytest.raises(UserError) as caught:
        dialect.attach(model, "safe")
    assert str(caught.value) == (
        "the model uses 'ai.kfac::AplyRows', which does not exist; did you mean 'ApplyRows'?"
    )


def test_a_right_node_has_no_fault() -> None:
    assert dialect.verify_node(apply_rows_node()) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"ids": value("ids", F32, "N")}, "ApplyRows: input 'ids' is FLOAT, not INT64"),
        ({"ids": value("ids", I64, 5, 1)}, "ApplyRows: input 'ids' has rank 2, not 1"),
        (
            {"update": value("update", F32, "N", 5)},
            "ApplyRows: D is 4 in input 'W' but 5 in input 'update'",
        ),
        ({"lr": None}, "ApplyRows: input 'lr' is missing"),
        ({"more": value("more", F32)}, "ApplyRows has 4 inputs, not 5"),
    ],
)
def test_a_wrong_node_is_told_what_is_wrong(changed: dict[str, Any], fault: str) -> None:
    assert dialect.verify_node(apply_rows_node(**changed)) == [fault]


@pytest.mark.parametrize(
    ("attributes", "faults"),
    [
        ({"vocab_size": 9}, []),
        ({}, ["ScatterRows: attribute 'vocab_size' is missing"]),
        ({"vocab_size": 0}, ["ScatterRows: attribute 'vocab_size' is 0, outside [1, 4.61169e+18]"]),
        ({"vocab_size": 9.0}, ["ScatterRows: attribute 'vocab_size' is FLOAT, not INT"]),
        ({"vocab_size": 9, "vocab": 9}, ["ScatterRows has no attribute 'vocab'; did you mean 'vocab_size'?"]),
    ],
)
def test_attributes_are_checked(attributes: dict[str, Any], faults: list[str]) -> None:
    inputs = [value("ids", I64, "N"), value("rows", F32, "N", 4)]
    node = ir.node("ScatterRows", inputs, attributes=attributes, domain=dialect.DOMAIN)
    assert dialect.verify_node(node) == faults


def test_vocab_size_must_be_the_tables() -> None:
    inputs = [value("ids", I64, "N"), value("rows", F32, "N", 4)]
    node = ir.node("ScatterRows", inputs, attributes={"vocab_size": 9}, domain=dialect.DOMAIN)
    node.outputs[0].shape = ir.Shape([8, 4])
    assert dialect.verify_node(node) == ["ScatterRows: output 'grad' has 8 rows, but vocab_size is 9"]


def test_nodes_of_other_domains_and_unknown_operators_are_faults() -> None:
    x = value("x", F32, 3)
    assert dialect.verify_node(ir.node("Relu", [x])) == ["'::Relu' is not an operator of 'ai.kfac'"]
    unknown = ir.node("Adagrat", [x], domain=dialect.DOMAIN)
    assert dialect.verify_node(unknown) == ["'ai.kfac::Adagrat' does not exist; did you mean 'Adagrad'?"]


def test_ports_are_read_from_text() -> None:
    read = ports("ids:i64[N] rows:f32[N,D] lr:f32[] t:any[V,...]")
    assert [(port.name, port.dtype, port.shape) for port in read] == [
        ("ids", "i64", ("N",)),
        ("rows", "f32", ("N", "D")),
        ("lr", "f32", ()),
        ("t", "any", ("V", "...")),
    ]
    with pytest.raises(ValueError, match="unknown element type 'f16' in 'x:f16"):
        ports("x:f16[N]")


def test_costs_grow_with_lookups_and_not_with_the_vocabulary() -> None:
    small, big = dialect.Sizes(V=10**4, D=64, N=512), dialect.Sizes(V=10**7, D=64, N=512)
    for name in (
        "InputFactorUpdate",
        "OutputFactorUpdate",
        "PreconditionRows",
        "ApplyRows",
        "FactorInverseRoot",
    ):
        operator = dialect.OPERATORS[name]
        assert operator.cost(small) == operator.cost(big)
        assert operator.cost(small).bytes > 0
    more = dialect.Sizes(V=10**4, D=64, N=1024)
    rows = dialect.OPERATORS["PreconditionRows"]
    assert rows.cost(small).flops == 2 * 512 * 64**2 + 512 * 64 + 9 * 512
    assert rows.cost(more).flops == 2 * rows.cost(small).flops


def test_attach_declares_bodies_at_the_models_opset_and_refuses_an_old_one() -> None:
    def model(opset: int) -> ir.Model:
        node = apply_rows_node()
        inputs = [source for source in node.inputs if source is not None]
        return ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset}), ir_version=9)

    new = model(23)
    dialect.attach(new, "safe")
    assert new.functions[("ai.kfac", "ApplyRows", "")].opset_imports[""] == 23
    with pytest.raises(UserError) as caught:
        dialect.attach(model(17), "safe")
    assert str(caught.value) == "the model is at opset 17, but 'ai.kfac' needs 18"
