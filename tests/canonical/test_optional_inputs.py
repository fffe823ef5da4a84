"""Optional inputs are inputs of every step, and the branch for when they are left out is gone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import kfac_onnx as kx
from kfac_onnx.canonical.optional_inputs import require_optional_inputs
from kfac_onnx.errors import UserError

TABLE = np.arange(44, dtype=np.float32).reshape(11, 4) / 50


def model_of(*, branch: bool) -> onnx.ModelProto:
    ids = helper.make_tensor_type_proto(TensorProto.INT64, ["b", 5])
    inputs = [helper.make_value_info("opt", helper.make_optional_type_proto(ids))]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 4])
    element = helper.make_node("OptionalGetElement", ["opt"], ["ids"])
    rows = [
        helper.make_node("Gather", ["emb", "ids"], ["e"]),
        helper.make_node("ReduceMean", ["e", "ax"], ["h"], keepdims=0),
    ]
    if branch:
        h = helper.make_tensor_value_info("h", TensorProto.FLOAT, None)
        there = helper.make_graph([element, *rows], "there", [], [h])
        other = helper.make_tensor_value_info("other", TensorProto.FLOAT, None)
        absent = helper.make_graph([helper.make_node("Identity", ["none"], ["other"])], "absent", [], [other])
        nodes = [
            helper.make_node("OptionalHasElement", ["opt"], ["has"]),
            helper.make_node("If", ["has"], ["taken"], then_branch=there, else_branch=absent),
            helper.make_node("Identity", ["taken"], ["z"]),
        ]
    else:
        nodes = [element, *rows, helper.make_node("Identity", ["h"], ["z"])]
    tensors = [
        onnx.numpy_helper.from_array(TABLE, "emb"),
        onnx.numpy_helper.from_array(np.array([1]), "ax"),
        onnx.numpy_helper.from_array(np.zeros((1, 4), np.float32), "none"),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def stepped(branch: bool) -> tuple[float, np.ndarray]:
    made = kx.differentiate(model_of(branch=branch), loss="mse", train=["emb"])
    whole = kx.transform(made, preset="plain-sgd", lr=1.0)
    with kx.TrainingSession(whole) as session:
        ids = np.array([[1, 2, 3, 4, 5]])
        loss = session.step({"opt": ids, "labels": np.zeros((1, 4), np.float32)})["loss"]
        return loss, session.parameters["emb"]


def test_a_step_reads_it_as_a_tensor() -> None:
    mean = TABLE[1:6].astype(np.float64).mean(axis=0)
    for branch in (False, True):
        loss, table = stepped(branch)
        np.testing.assert_allclose(loss, np.mean(mean**2), rtol=1e-6)  # float32 sums of 5 and 4 numbers
        wanted = TABLE.astype(np.float64)
        wanted[1:6] -= 2 * mean / 4 / 5
        np.testing.assert_allclose(table, wanted, rtol=1e-5, atol=1e-7)


def test_the_note_names_the_inputs() -> None:
    model = ir.from_proto(model_of(branch=False))
    assert require_optional_inputs(model) == ["optional inputs must be given at every step: opt"]
    assert isinstance(model.graph.inputs[0].type, ir.TensorType)
    assert not any(node.op_type.startswith("Optional") for node in model.graph)


def test_an_optional_sequence_stays_and_is_refused() -> None:
    proto = model_of(branch=False)
    ids = helper.make_tensor_type_proto(TensorProto.INT64, ["b", 5])
    proto.graph.input[0].type.CopyFrom(helper.make_optional_type_proto(helper.make_sequence_type_proto(ids)))
    proto.graph.node[0].CopyFrom(helper.make_node("SequenceAt", ["opt", "ax"], ["ids"]))
    with pytest.raises(UserError) as error:
        kx.differentiate(proto)
    assert error.value.message == "the input 'opt' is an optional; training graphs take tensors only"
