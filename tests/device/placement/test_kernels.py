"""The table of the CUDA provider's kernels, and finding a kernel in it."""

from __future__ import annotations

import onnx
import pytest

from kfac_onnx.device.placement import cuda_kernels
from kfac_onnx.device.placement.kernels import type_name

F32, F64, I64, I16, BOOL = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT16,
    onnx.TensorProto.BOOL,
)


def problem(
    op_type: str, inputs: list[int], outputs: list[int], opset: int = 18, domain: str = ""
) -> str | None:
    return cuda_kernels().problem(domain, op_type, opset, inputs, outputs)


def test_the_table_says_where_it_is_from() -> None:
    table = cuda_kernels()
    assert table.provider == "CUDAExecutionProvider"
    assert table.onnxruntime.count(".") == 2
    assert "onnxruntime-gpu" in table.source
    assert len(table.kernels) > 200


@pytest.mark.parametrize(
    ("op_type", "inputs", "outputs"),
    [
        ("ScatterND", [F32, I64, F32], [F32]),
        ("ScatterElements", [F32, I64, F32], [F32]),
        ("TopK", [I64, I64], [I64, I64]),
        ("NonZero", [BOOL], [I64]),
        ("Where", [BOOL, F64, F64], [F64]),
        ("Where", [BOOL, I64, I64], [I64]),
        ("MatMul", [F32, F32], [F32]),
        ("ReduceSum", [F64, I64], [F64]),
        ("Range", [I64, I64, I64], [I64]),
        ("OneHot", [I64, I64, F32], [F32]),
        ("Mod", [I64, I64], [I64]),
    ],
)
@pytest.mark.parametrize("opset", [18, 21, 24])
def test_what_the_bodies_rest_on_has_kernels(
    op_type: str, inputs: list[int], outputs: list[int], opset: int
) -> None:
    assert problem(op_type, inputs, outputs, opset) is None


def test_inverse_has_one_in_the_other_domain() -> None:
    assert problem("Inverse", [F32], [F32], 1, "com.microsoft") is None
    assert problem("Inverse", [F32], [F32]) == "the provider has no kernel for Inverse"


def test_why_there_is_no_kernel() -> None:
    assert problem("Unique", [I64], [I64]) == "the provider has no kernel for Unique"
    assert (
        problem("Nonsense", [I64], [I64], 1, "my.domain")
        == "the provider has no kernel for my.domain::Nonsense"
    )
    types = problem("Where", [BOOL, I16, I16], [I16])
    assert types is not None
    assert types.startswith("the provider's kernels for Where are for B of bool; T of ")
    assert "not for B = bool" in types
    assert "T = int16" in types


def test_types_that_are_not_known_fit() -> None:
    assert problem("Where", [BOOL, 0, 0], [0]) is None


def test_a_kernel_without_an_end_serves_its_own_version_only() -> None:
    """As onnxruntime has it: a newer form of an operator does not run on an older kernel."""
    shape = cuda_kernels().kernels["Shape"]
    newest = max(kernel.first for kernel in shape)
    last = next(kernel for kernel in shape if kernel.first == newest)
    assert last.serves(newest)
    assert last.last is None
    assert not last.serves(newest + 1)
    older = next(kernel for kernel in shape if kernel.last is not None)
    assert older.serves(older.last or 0)
    assert not older.serves((older.last or 0) + 1)


def test_sizes_are_on_the_host() -> None:
    table = cuda_kernels()
    assert table.host_outputs["Shape"] == table.host_outputs["Size"] == {0}
    assert table.host_inputs["TopK"] == {1}
    assert table.host_inputs["Range"] == {0, 1, 2}
    assert table.host_inputs["OneHot"] == {1, 2}
    assert table.host_inputs["Slice"] == {1, 2, 3, 4}
    assert "ScatterND" not in table.host_inputs


def test_operators_that_onnx_defines_by_others() -> None:
    table = cuda_kernels()
    assert table.is_spelled_out("", "SoftmaxCrossEntropyLoss", 18)
    assert not table.is_spelled_out("", "Unique", 18)
    assert not table.is_spelled_out("", "LayerNormalization", 18)
    assert not table.is_spelled_out("none", "Nothing", 1)


def test_names_of_types() -> None:
    assert [type_name(item) for item in (F32, F64, I64, BOOL)] == ["float", "double", "int64", "bool"]
