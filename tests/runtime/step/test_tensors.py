"""Buffers and dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kfac_onnx.device.providers import provider_list
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.step.tensors import (
    Buffer,
    Device,
    device_of,
    dtype_name,
    element_type,
    host_value,
    same_bits,
)

CPU = Device("cpu", 0)
DTYPES = ["float16", "bfloat16", "float32", "float64", "bool", "int8", "uint8", "int32", "int64", "uint64"]


@pytest.mark.parametrize("name", DTYPES)
def test_a_buffer_holds_every_dtype(name: str) -> None:
    element = element_type(name)
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    buffer = Buffer(array, element, CPU)
    assert dtype_name(element) == name
    assert buffer.nbytes == 4 * dtype.itemsize
    assert same_bits(buffer.read(), array)
    buffer.write(1 - array.astype(np.int64))
    assert same_bits(buffer.read(), (1 - array.astype(np.int64)).astype(dtype))
    assert buffer.value.element_type() == element


def test_a_buffer_is_the_memory_that_is_bound_and_not_the_users() -> None:
    array = np.zeros((2, 3), np.float32)
    buffer = Buffer(array, element_type("float32"), CPU)
    assert buffer.array is not None
    assert buffer.value.data_ptr() == buffer.array.ctypes.data != array.ctypes.data


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 1)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    buffer = Buffer(np.ones(shape), element_type("float32"), CPU)
    assert tuple(buffer.value.shape()) == shape
    assert same_bits(buffer.read(), np.ones(shape, np.float32))


def test_a_host_value_uses_the_arrays_memory() -> None:
    array = np.zeros(3, ml_dtypes.bfloat16)
    value = host_value(array, element_type("bfloat16"))
    assert value.data_ptr() == array.ctypes.data


@pytest.mark.parametrize(
    ("text", "name"),
    [("tensor(float)", "float32"), ("tensor(bfloat16)", "bfloat16"), ("FLOAT", "float32"), ("double", "float64"),
     ("float64", "float64"), ("tensor(bool)", "bool"), ("tensor(int64)", "int64")],
)  # fmt: skip
def test_names_of_types(text: str, name: str) -> None:
    assert dtype_name(element_type(text)) == name


def test_a_type_that_is_not_one() -> None:
    with pytest.raises(UserError) as error:
        element_type("seq(tensor(float))")
    assert str(error.value) == "'seq(tensor(float))' is not a tensor type this runtime can hold"


def test_the_device_is_the_first_providers() -> None:
    assert device_of(["CPUExecutionProvider"]) == CPU
    assert device_of([("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]) == Device(
        "cuda", 1
    )
    with pytest.raises(UserError, match=r"^no execution provider is given"):
        provider_list([])


def test_same_bits_knows_nan_and_dtype() -> None:
    nan = np.array([np.nan], np.float32)
    assert same_bits(nan, nan.copy())
    assert not same_bits(nan, nan.astype(np.float64))
    assert not same_bits(np.array([0.0]), np.array([-0.0]))
    assert not same_bits(np.zeros(2), np.zeros((2, 1)))
