"""Slips with one meaning are corrected; everything else stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx.canonical.mending import mend

if TYPE_CHECKING:
    from collections.abc import Callable

HALF = ir.DataType.FLOAT16


def half_where(build: Callable[[str], ir.Model], *, declared: ir.DataType) -> ir.Model:
    model = build("""<ir_version: 10, opset_import: ["" : 21]>
    g (bool[N] c, float16[N] x) => (float16[N] z) <float fill = {2.5}> { z = Where (c, fill, x) }""")
    model.graph.initializers["fill"].type = ir.TensorType(declared)
    return model


def test_a_constant_takes_its_declared_type(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = half_where(build, declared=HALF)
    assert mend(model) == ["constants stored in their declared type: 1"]
    feed = {"c": np.array([True, False]), "x": np.array([1, -3], np.float16)}
    np.testing.assert_array_equal(run(model, feed)["z"], np.array([2.5, -3], np.float16))
    assert mend(model) == []


def test_a_constant_of_its_declared_type_stays(build: Callable[[str], ir.Model]) -> None:
    model = half_where(build, declared=ir.DataType.FLOAT)
    assert mend(model) == []
    assert model.graph.initializers["fill"].const_value.dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("declared", [["B", 2], [7, 2], [2], []])
def test_a_constant_has_the_shape_of_its_data(
    declared: list[int | str], build: Callable[[str], ir.Model]
) -> None:
    model = build("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 2] x) => (float[N, 2] z) <float[1, 2] w = {1, 2}> { z = Add (x, w) }""")
    w = model.graph.initializers["w"]
    w.shape = ir.Shape(declared)
    assert mend(model) == []
    assert w.shape == ir.Shape([1, 2])


GEMM = """<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 2] x, float16[2, 2] w) => (float16[N, 2] z)
<{bias}> {{ z = Gemm <beta = {beta}> (x, w, bias) }}"""


def test_a_bias_times_zero_of_another_type_is_left_out(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    model = build(GEMM.format(bias="float bias = {0.0}", beta=0.0))
    assert mend(model) == ["biases that a Gemm multiplies by zero left out: 1"]
    feed = {"x": np.array([[1, 2]], np.float16), "w": np.array([[1, 0], [2, 1]], np.float16)}
    np.testing.assert_array_equal(run(model, feed)["z"], [[5, 2]])


def test_other_biases_stay(build: Callable[[str], ir.Model]) -> None:
    for bias, beta in (("float bias = {0.0}", 1.0), ("float bias = {1.0}", 0.0), ("float16 bias = {0}", 0.0)):
        model = build(GEMM.format(bias=bias, beta=beta))
        assert mend(model) == []
        (node,) = model.graph
        assert node.inputs[2] is not None
