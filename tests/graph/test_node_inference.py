from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.node_inference import RULES, describe_outputs, numbers_of
from kfac_onnx.graph.operators import REDUCTIONS, SCATTERS, Trait, having

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
DIMS = {"x": [2, 3, 4], "n": ["N", 3, 4], "row": [4], "column": [3, 1], "square": [4, 4], "scalar": []}


@pytest.fixture
def emit() -> Emitter:
    """An emitter into a model with float inputs of several shapes, int64 `ids` [5] and bool `mask` [2, 3, 4]."""
    model = ir.Model(ir.Graph([], [], nodes=[], name="g", opset_imports={"": 20}), ir_version=10)
    emit = Emitter(model, "p")
    for name, dims in DIMS.items():
        emit.input(name, FLOAT, dims)
    emit.input("ids", INT64, [5])
    emit.input("mask", BOOL, [2, 3, 4])
    return emit


def value(emit: Emitter, name: str) -> ir.Value:
    return next(item for item in emit.model.graph.inputs if item.name == name)


def onnx_says(emit: Emitter, result: ir.Value) -> tuple[int, list[int | str | None] | None]:
    """Return the element type and dimensions that ONNX infers where ours are not written into the file."""
    described = [(item, item.type, item.shape) for node in emit.model.graph for item in node.outputs]
    for item, _, _ in described:
        item.type = item.shape = None
    emit.model.graph.outputs[:] = []
    proto = ir.to_proto(emit.model)
    for item, kind, shape in described:
        item.type, item.shape = kind, shape
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    info = next(info for info in inferred.graph.value_info if info.name == result.name)
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
    return tensor.elem_type, dims


def agrees(own: object, other: object) -> bool:
    """Whether a dimension of ours is what ONNX says; ONNX names the unknown ones, and ours may say less."""
    return own is None or own == other or (isinstance(own, str) and str(other).startswith("unk__"))


INTS = np.int64
CASES: list[tuple[str, list[Any], dict[str, Any], list[int | str | None]]] = [
    ("Add", ["n", "row"], {}, ["N", 3, 4]),
    ("Mul", ["x", "column"], {}, [2, 3, 4]),
    ("Sub", ["scalar", "n"], {}, ["N", 3, 4]),
    ("Sum", ["row", "column", "x"], {}, [2, 3, 4]),
    ("Less", ["n", "row"], {}, ["N", 3, 4]),
    ("Not", ["mask"], {}, [2, 3, 4]),
    ("Where", ["mask", "row", "x"], {}, [2, 3, 4]),
    ("Relu", ["n"], {}, ["N", 3, 4]),
    ("Cast", ["n"], {"to": int(INT64)}, ["N", 3, 4]),
    ("Shape", ["n"], {"start": 1}, [2]),
    ("Size", ["n"], {}, []),
    ("Reshape", ["x", np.array([0, -1], INTS)], {}, [2, 12]),
    ("Reshape", ["n", np.array([-1, 4], INTS)], {}, [None, 4]),
    ("Expand", ["row", np.array([5, 1, 4], INTS)], {}, [5, 1, 4]),
    ("Transpose", ["n"], {"perm": [2, 0, 1]}, [4, "N", 3]),
    ("Transpose", ["n"], {}, [4, 3, "N"]),
    ("Unsqueeze", ["row", np.array([0, -1], INTS)], {}, [1, 4, 1]),
    ("Squeeze", ["column", np.array([-1], INTS)], {}, [3]),
    ("Squeeze", ["column"], {}, [3]),
    ("Flatten", ["x"], {"axis": 2}, [6, 4]),
    ("Flatten", ["n"], {"axis": -1}, [None, 4]),
    ("Concat", ["x", "n"], {"axis": 0}, [None, 3, 4]),
    ("Concat", ["x", "x"], {"axis": -1}, [2, 3, 8]),
    ("Slice", ["x", np.array([1], INTS), np.array([-1], INTS), np.array([2], INTS)], {}, [2, 3, 2]),
    ("Slice", ["x", np.array([-1], INTS), np.array([-9], INTS), np.array([1], INTS), np.array([-2], INTS)], {},
     [2, 2, 4]),
    ("Gather", ["n", "ids"], {"axis": 1}, ["N", 5, 4]),
    ("Gather", ["x", np.array(0, INTS)], {"axis": 0}, [3, 4]),
    ("GatherElements", ["row", "ids"], {}, [5]),
    ("GatherND", ["x", np.array([[0, 1], [1, 2]], INTS)], {}, [2, 4]),
    ("MatMul", ["n", "square"], {}, ["N", 3, 4]),
    ("MatMul", ["n", "row"], {}, ["N", 3]),
    ("MatMul", ["row", "square"], {}, [4]),
    ("Gemm", ["column", np.ones((5, 1), np.float32)], {"transB": 1}, [3, 5]),
    ("Gemm", ["column", np.ones((3, 2), np.float32)], {"transA": 1}, [1, 2]),
    ("ReduceSum", ["n", np.array([1], INTS)], {"keepdims": 0}, ["N", 4]),
    ("ReduceMean", ["n", np.array([-1], INTS)], {"keepdims": 1}, ["N", 3, 1]),
    ("ReduceMax", ["x"], {"keepdims": 0}, []),
    ("ReduceSum", ["x"], {"noop_with_empty_axes": 1}, [2, 3, 4]),
    ("ArgMax", ["n"], {"axis": 1, "keepdims": 0}, ["N", 4]),
    ("Range", [np.array(1, INTS), np.array(8, INTS), np.array(3, INTS)], {}, [3]),
    ("NonZero", ["x"], {}, [3, None]),
    ("OneHot", ["ids", np.array(7, INTS), np.array([0, 1], np.float32)], {}, [5, 7]),
    ("Tile", ["x", np.array([1, 2, 3], INTS)], {}, [2, 6, 12]),
    ("ConstantOfShape", [np.array([2, 5], INTS)], {"value": ir.tensor(np.zeros(1, np.float32))}, [2, 5]),
    ("Softmax", ["n"], {"axis": 1}, ["N", 3, 4]),
    ("CumSum", ["x", np.array(1, INTS)], {}, [2, 3, 4]),
    ("ScatterElements", ["row", "ids", "ids"], {}, [4]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "dims"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_types_and_shapes_are_those_of_onnx(
    emit: Emitter, op_type: str, inputs: list[Any], attributes: dict[str, Any], dims: list[int | str | None]
) -> None:
    values = [value(emit, item) if isinstance(item, str) else emit.constant(item) for item in inputs]
    if op_type == "ScatterElements":  # the updates are of the type of what they are written into
        values[2] = emit.op("Cast", values[2], to=int(FLOAT))
    result = emit.op(op_type, *values, **attributes)
    assert result.shape is not None
    own = [dim if isinstance(dim, int) else dim.value for dim in result.shape]
    assert own == dims
    kind, theirs = onnx_says(emit, result)
    assert result.dtype == kind
    assert theirs is not None
    assert len(own) == len(theirs)
    assert all(agrees(one, other) for one, other in zip(own, theirs, strict=True))


@pytest.mark.parametrize("op_type", sorted(having(Trait.ELEMENTWISE) | REDUCTIONS | SCATTERS))
def test_every_operator_of_these_kinds_has_a_rule(op_type: str) -> None:
    assert op_type in RULES


def test_splits_and_top_k_describe_every_output(emit: Emitter) -> None:
    halves = emit.many("Split", [value(emit, "x"), emit.ints(1, 3)], 2, {"axis": 2})
    assert [item.shape for item in halves] == [ir.Shape([2, 3, 1]), ir.Shape([2, 3, 3])]
    thirds = emit.many("Split", [value(emit, "x")], 3, {"axis": 2, "num_outputs": 3})
    assert [item.shape for item in thirds] == [ir.Shape([2, 3, 2]), ir.Shape([2, 3, 2]), ir.Shape([2, 3, 0])]
    best, places = emit.many("TopK", [value(emit, "n"), emit.ints(2)], 2, {"axis": 1})
    assert (best.dtype, best.shape) == (FLOAT, ir.Shape(["N", 2, 4]))
    assert (places.dtype, places.shape) == (INT64, ir.Shape(["N", 2, 4]))


def test_a_reshape_to_dimensions_that_are_computed_knows_those_that_are_known(emit: Emitter) -> None:
    n = value(emit, "n")
    wanted = emit.concat(emit.part(emit.shape(n), 0, 1), emit.ints(12))
    assert numbers_of(wanted) == ["N", 12]
    assert emit.op("Reshape", n, wanted).shape == ir.Shape(["N", 12])


def test_what_cannot_be_told_stays_unknown(emit: Emitter) -> None:
    unknown = emit.input("unknown", FLOAT, [None])
    unknown.shape = None
    total = emit.op("Add", unknown, value(emit, "row"))
    assert (total.type, total.shape) == (None, None)  # a file has no place for a type without a shape
    assert emit.op("Reshape", value(emit, "x"), value(emit, "ids")).shape == ir.Shape([None] * 5)
    (other,) = emit.many("Gelu", [value(emit, "x")], 1, None, "com.microsoft")
    assert (other.type, other.shape) == (None, None)


def test_what_is_said_is_left_as_it_is(emit: Emitter) -> None:
    result = ir.Value(name="y", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape(["M"]))
    describe_outputs(ir.Node("", "Neg", [value(emit, "row")], outputs=[result]))
    assert (result.dtype, result.shape) == (ir.DataType.DOUBLE, ir.Shape(["M"]))
