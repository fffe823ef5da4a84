"""Fixtures: run a model, compare with a reference, make a small model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DATA = Path(__file__).parent.parent / "data"


def in_float32(model: ir.Model) -> ir.Model:
    """Return a copy whose bfloat16 outputs are cast to float32, which NumPy can hold."""
    copy = model.clone()
    for index, value in enumerate(copy.graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            node = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", 1)], num_outputs=1)
            node.outputs[0].name, value.name = value.name, f"{value.name} in bfloat16"
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            node.outputs[0].shape = value.shape
            copy.graph.append(node)
            copy.graph.outputs[index] = node.outputs[0]
    return copy


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray], threads: int = 1) -> dict[str, np.ndarray]:
    """Check a model, run it on plain onnxruntime and return its outputs by name."""
    proto = ir.to_proto(in_float32(model))
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {item.name: as_value(np.asarray(feeds[item.name])) for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    results = session.run_with_ort_values(names, values)
    return {name: result.numpy() for name, result in zip(names, results, strict=True)}


def as_value(array: np.ndarray) -> ort.OrtValue:
    if array.dtype == ml_dtypes.bfloat16:
        bfloat16 = onnx.TensorProto.BFLOAT16
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), bfloat16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def agrees(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Say whether no entry is off by more than `tolerance` times the largest expected entry."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return False
    return a.size == 0 or bool(np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), 1e-30))


def assert_agrees(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Assert agreement, and that the same result scaled by 1.01 would not agree."""
    assert actual.shape == expected.shape
    assert agrees(actual, expected, tolerance)
    if np.any(np.asarray(expected, np.float64)):
        scaled = np.asarray(actual, np.float64) * 1.01
        assert not agrees(scaled, expected, tolerance), "the tolerance would let 1 % pass"


def build_model(text: str) -> ir.Model:
    """Return the model that ONNX's text form describes."""
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.fixture
def run() -> Callable[..., dict[str, np.ndarray]]:
    return run_model


@pytest.fixture
def check() -> Callable[[np.ndarray, np.ndarray, float], None]:
    return assert_agrees


@pytest.fixture
def build() -> Callable[[str], ir.Model]:
    return build_model


@pytest.fixture
def data() -> Path:
    return DATA
