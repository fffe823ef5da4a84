"""Runs one operator of the dialect on onnxruntime, as a node of a host graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from kfac_onnx import dialect

Array = np.ndarray[Any, np.dtype[Any]]
Runner = Callable[..., list[Array]]

DTYPES = {"f32": np.float32, "f64": np.float64, "i64": np.int64}


def as_typed(name: str, inputs: Sequence[Any]) -> list[Array]:
    """The inputs in the types of the operator's signature."""
    ports = dialect.OPERATORS[name].inputs
    return [np.asarray(x, DTYPES.get(port.dtype)) for port, x in zip(ports, inputs, strict=True)]


def host_model(
    name: str,
    inputs: Sequence[Array],
    attributes: dict[str, Any],
    *,
    variant: str,
    opset: int,
    in_branch: bool,
) -> ir.Model:
    """A model of the one operator; `in_branch` puts it into the then-branch of an If."""
    operator = dialect.OPERATORS[name]
    values = [
        ir.Value(
            name=f"in_{port.name}_{i}",
            type=ir.TensorType(ir.DataType.from_numpy(x.dtype)),
            shape=ir.Shape([f"d{i}{axis}" for axis in range(x.ndim)]),
        )
        for i, (port, x) in enumerate(zip(operator.inputs, inputs, strict=True))
    ]
    node = ir.node(
        name, values, attributes=attributes, domain=dialect.DOMAIN, num_outputs=len(operator.outputs)
    )
    assert dialect.verify_node(node) == []
    for i, (port, value) in enumerate(zip(operator.outputs, node.outputs, strict=True)):
        value.name = f"out_{port.name}_{i}"
        dtype = DTYPES.get(port.dtype, inputs[0].dtype)
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    nodes, outputs = [node], list(node.outputs)
    if in_branch:
        condition = ir.Value(name="condition", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        then = ir.Graph([], outputs, nodes=[node], name="then")
        empty = []
        for value in outputs:
            assert value.dtype is not None
            zero = ir.tensor(np.zeros((), value.dtype.numpy()))
            empty.append(ir.node("Constant", [], attributes={"value": zero}))
            empty[-1].outputs[0].type = value.type
        otherwise = ir.Graph([], [n.outputs[0] for n in empty], nodes=empty, name="otherwise")
        for i, n in enumerate(empty):
            n.outputs[0].name = f"zero_{i}"
        branches = {"then_branch": then, "else_branch": otherwise}
        choice = ir.node("If", [condition], attributes=branches, num_outputs=len(outputs))
        for i, (value, inner) in enumerate(zip(choice.outputs, outputs, strict=True)):
            value.name, value.type = f"chosen_{i}", inner.type
        nodes, outputs, values = [choice], list(choice.outputs), [condition, *values]
    graph = ir.Graph(values, outputs, nodes=nodes, opset_imports={"": opset}, name="host")
    model = ir.Model(graph, ir_version=9 if opset < 22 else 10)
    dialect.attach(model, variant)  # type: ignore[arg-type]
    return model


def run(
    name: str,
    inputs: Sequence[Any],
    attributes: dict[str, Any] | None = None,
    *,
    variant: str = "safe",
    opset: int = 18,
    threads: int = 1,
    in_branch: bool = False,
) -> list[Array]:
    """The operator's outputs."""
    arrays = as_typed(name, inputs)
    given = {} if attributes is None else attributes
    model = host_model(name, arrays, given, variant=variant, opset=opset, in_branch=in_branch)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs() if value.name != "condition"]
    feeds: dict[str, Array] = dict(zip(names, arrays, strict=True))
    if in_branch:
        feeds["condition"] = np.array(True)
    return [np.asarray(x) for x in session.run(None, feeds)]


@pytest.fixture
def run_operator() -> Runner:
    return run


@pytest.fixture
def make_model() -> Callable[..., ir.Model]:
    return host_model


@pytest.fixture
def typed() -> Callable[..., list[Array]]:
    return as_typed
