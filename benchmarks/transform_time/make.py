"""Synthetic training graphs of any number of nodes: gated residual blocks with embedding tables between them.

Each block is `h + silu(norm(h) W + b) U`, and its backward is written out as an exporter would write it: 30
nodes and three parameters. After every fiftieth block the rows of a table are added.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["VOCAB_SIZE", "WIDTH", "is_parameter", "synthetic_graph"]

WIDTH, VOCAB_SIZE = 8, 1000


def is_parameter(name: str | None) -> bool:
    """Say whether a name is that of a parameter of these graphs."""
    return str(name).startswith(("blocks.", "tables."))


class _Writer:
    """Collects nodes, initializers and outputs; values are numbered."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.rng = np.random.default_rng(0)

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Add a parameter with random values; its gradient will be the output `<name>_grad`."""
        values = (self.rng.standard_normal(shape) / np.sqrt(WIDTH)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        self.outputs.append(helper.make_tensor_value_info(f"{name}_grad", TensorProto.FLOAT, shape))
        return name

    def constant(self, name: str, values: object, dtype: type) -> str:
        """Add a constant."""
        self.weights.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name


class _Block:
    """One residual block: its forward nodes now, its backward nodes later."""

    def __init__(self, writer: _Writer, index: int, h: str) -> None:
        self.writer, self.index = writer, index
        op, weight = writer.op, writer.weight
        self.w = weight(f"blocks.{index}.w", WIDTH, WIDTH)
        self.b = weight(f"blocks.{index}.b", WIDTH)
        self.u = weight(f"blocks.{index}.u", WIDTH, WIDTH)
        mean = op("ReduceMean", op("Mul", h, h), "last", keepdims=1)
        self.root = op("Sqrt", op("Add", mean, "eps"))
        self.n = op("Div", h, self.root)
        z = op("Add", op("MatMul", self.n, self.w), self.b)
        self.s = op("Sigmoid", z)
        self.silu = op("Mul", z, self.s)
        self.output = op("Add", h, op("MatMul", self.silu, self.u))

    def backward(self, dh: str) -> str:
        """Write the gradients of this block's parameters; return the gradient of its input."""
        op = self.writer.op
        op("MatMul", op("Transpose", self.silu, perm=[1, 0]), dh, output=f"{self.u}_grad")
        dsilu = op("MatMul", dh, op("Transpose", self.u, perm=[1, 0]))
        slope = op("Add", self.s, op("Mul", self.silu, op("Sub", "one", self.s)))
        dz = op("Mul", dsilu, slope)
        op("ReduceSum", dz, "first", keepdims=0, output=f"{self.b}_grad")
        op("MatMul", op("Transpose", self.n, perm=[1, 0]), dz, output=f"{self.w}_grad")
        dn = op("MatMul", dz, op("Transpose", self.w, perm=[1, 0]))
        along = op("ReduceMean", op("Mul", dn, self.n), "last", keepdims=1)
        inner = op("Sub", dn, op("Mul", self.n, along))
        return op("Add", dh, op("Div", inner, self.root))


def _lookup(writer: _Writer, index: int, h: str | None) -> tuple[str, str, str]:
    """Add the rows of a new table to `h`; return the table, its ids, and the sum."""
    table = writer.weight(f"tables.{index}", VOCAB_SIZE, WIDTH)
    ids = f"ids_{index}"
    writer.inputs.append(helper.make_tensor_value_info(ids, TensorProto.INT64, ["batch"]))
    rows = writer.op("Gather", table, ids, axis=0)
    return table, ids, rows if h is None else writer.op("Add", h, rows)


def synthetic_graph(nodes: int, *, gradients: bool = True, every: int = 50) -> onnx.ModelProto:
    """Return a training graph of about this many nodes, or its forward part; a table every few blocks."""
    writer = _Writer()
    writer.constant("one", 1.0, np.float32)
    writer.constant("eps", 1e-5, np.float32)
    writer.constant("last", [-1], np.int64)
    writer.constant("first", [0], np.int64)
    writer.constant("size", [VOCAB_SIZE, WIDTH], np.int64)
    table, ids, h = _lookup(writer, 0, None)
    parts: list[_Block | tuple[str, str]] = [(table, ids)]
    for index in range(max(nodes // (30 if gradients else 11), 1)):
        parts.append(_Block(writer, index, h))
        h = parts[-1].output
        if index % every == every - 1:
            table, ids, h = _lookup(writer, index // every + 1, h)
            parts.append((table, ids))
    writer.inputs.append(helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["batch", WIDTH]))
    error = writer.op("Sub", h, "labels")
    loss = writer.op("ReduceMean", writer.op("Mul", error, error), keepdims=0, output="loss")
    if gradients:
        _backward(writer, parts, error)
    outputs = [helper.make_tensor_value_info(loss, TensorProto.FLOAT, [])]
    outputs += writer.outputs if gradients else []
    graph = helper.make_graph(
        writer.nodes,
        "synthetic",
        writer.inputs,
        outputs + (writer.outputs if gradients else []),
        writer.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _backward(writer: _Writer, parts: list[_Block | tuple[str, str]], error: str) -> None:
    count = writer.op("Cast", writer.op("Size", error), to=TensorProto.FLOAT)
    dh = writer.op("Div", writer.op("Add", error, error), count)
    for part in reversed(parts):
        if isinstance(part, _Block):
            dh = part.backward(dh)
            continue
        table, ids = part
        zeros = writer.op("ConstantOfShape", "size")
        indices = writer.op("Unsqueeze", ids, "last")
        writer.op("ScatterND", zeros, indices, dh, output=f"{table}_grad", reduction="add")
