"""Gradients of parameters that have lost their names: paired by the flow of data, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kfac_onnx import metadata
from kfac_onnx.api import scan
from kfac_onnx.errors import NoGradientsError
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

TABLE = "float[4, 2] T = {1, 2, 3, 4, 5, 6, 7, 8}"
W, U = "float[2, 2] A = {1, 2, 3, 4}", "float[2, 2] B = {5, 6, 7, 8}"
AXES = "int64[1] rows = {0}, int64[2] flat = {-1, 2}"


def text(
    forward: str, backward: str, outputs: str, constants: str, inputs: str = "int64[3] ids, float[3, 2] x"
) -> str:
    return f"""<ir_version: 10, opset_import: ["" : 18]>
    g ({inputs}) => ({outputs}) <{constants}, {AXES}> {{
        {forward}
        {backward}
    }}"""


def paired(model: ir.Model) -> dict[str, str | None]:
    return {item.name: item.gradient for item in metadata.read_list(model, "parameters", metadata.Parameter)}


LOOKUP = """h = Gather<axis = 0>(T, ids) y = MatMul(h, A) loss = ReduceSum<keepdims = 0>(y)"""
LOOKUP_BACK = """
    ones = Sub(y, y) d = Exp(ones) turned = Transpose<perm = [1, 0]>(A) g = MatMul(d, turned)
    size = Shape(T) zeros = ConstantOfShape(size) index = Unsqueeze(ids, last)
    o2 = ScatterND<reduction = "add">(zeros, index, g)
    hT = Transpose<perm = [1, 0]>(h) o1 = MatMul(hT, d)"""
LAST = "int64[1] last = {-1}"


def test_a_table_and_a_weight(build: Callable[[str], ir.Model]) -> None:
    """The order of the outputs is not that of the parameters."""
    made = text(LOOKUP, LOOKUP_BACK, "float[2, 2] o1, float loss, float[4, 2] o2", f"{W}, {TABLE}, {LAST}")
    model = read_training_graph(build(made))
    assert paired(model) == {"T": "o2", "A": "o1"}
    report = scan(build(made))
    assert [site.parameter for site in report.sites] == ["T"]
    assert report.notes[-1] == "paired 2 gradients with parameters by the flow of data"


HEADS = """y = MatMul(x, A) z = MatMul(x, B) yz = Mul(y, z) loss = ReduceSum<keepdims = 0>(yz)"""


def test_weights_of_one_input_are_told_apart_by_their_own_products(build: Callable[[str], ir.Model]) -> None:
    """dL/dA = xᵀz and dL/dB = xᵀy: z meets A again on its way back to x, and y meets B."""
    back = """
        zero = Sub(yz, yz) one = Exp(zero) dy = Mul(one, z) dz = Mul(one, y)
        xT = Transpose<perm = [1, 0]>(x) o1 = MatMul(xT, dz) o2 = MatMul(xT, dy)
        AT = Transpose<perm = [1, 0]>(A) gy = MatMul(dy, AT) gz = MatMul(dz, folded) dx = Add(gy, gz)"""
    constants = f"{W}, {U}, float[2, 2] folded = {{5, 7, 6, 8}}"
    outputs = "float loss, float[2, 2] o1, float[2, 2] o2, float[3, 2] dx"
    assert paired(read_training_graph(build(text(HEADS, back, outputs, constants)))) == {"A": "o2", "B": "o1"}


def test_weights_that_nothing_tells_apart_are_not_paired(build: Callable[[str], ir.Model]) -> None:
    back = """
        zero = Sub(yz, yz) one = Exp(zero) dy = Mul(one, z) dz = Mul(one, y)
        xT = Transpose<perm = [1, 0]>(x) o1 = MatMul(xT, dz) o2 = MatMul(xT, dy)"""
    made = text(HEADS, back, "float loss, float[2, 2] o1, float[2, 2] o2", f"{W}, {U}")
    with pytest.raises(NoGradientsError) as caught:
        read_training_graph(build(made))
    assert str(caught.value) == (
        "the graph does not say which outputs are the gradients of which parameters\n"
        "  tried: by name: no output is called <parameter>_grad\n"
        "  tried: by position: the shapes differ\n"
        "  tried: by the flow of data: 'o1' could belong to 'A' or 'B'\n"
        "  tried: by the flow of data: 'o2' could belong to 'A' or 'B'\n"
        "  help: name the pairs with --gradients PARAMETER=OUTPUT, or export the gradients as outputs"
    )
    model = read_training_graph(build(made), gradients={"A": "o2", "B": "o1"})
    assert paired(model) == {"A": "o2", "B": "o1"}


BIAS = "float[2] b = {1, 2}"


@pytest.mark.parametrize(
    "forward", ["y = MatMul(x, A) z = Add(y, b)", "y = MatMul(x, A) z = Add(b, y)", "z = Gemm(x, A, b)"]
)
def test_a_bias(forward: str, build: Callable[[str], ir.Model]) -> None:
    forward += " w = Tanh(z) loss = ReduceSum<keepdims = 0>(w)"
    back = """ww = Mul(w, w) d = Sub(one, ww) o1 = ReduceSum<keepdims = 0>(d, rows)
        xT = Transpose<perm = [1, 0]>(x) o2 = MatMul(xT, d)"""
    made = text(forward, back, "float loss, float[2] o1, float[2, 2] o2", f"{W}, {BIAS}, float one = {{1}}")
    assert paired(read_training_graph(build(made))) == {"A": "o2", "b": "o1"}


def test_a_parameter_folded_with_its_scale_is_not_taken_for_it(build: Callable[[str], ir.Model]) -> None:
    """The graph holds T = 2·P alone; o2 = dL/dP = 2·dL/dT has T's shape, and is not its gradient."""
    back = LOOKUP_BACK.replace("o2 = ScatterND", "s = ScatterND") + " o2 = Mul(s, two)"
    constants = f"{W}, {TABLE}, {LAST}, float two = {{2}}"
    made = text(LOOKUP, back, "float[2, 2] o1, float loss, float[4, 2] o2", constants)
    with pytest.raises(NoGradientsError) as caught:
        read_training_graph(build(made))
    assert "by the flow of data: 'o2' could belong to 'T'" in str(caught.value)
    assert not scan(build(made)).trainable


def test_a_gradient_of_a_parameter_that_is_gone_is_reported(build: Callable[[str], ir.Model]) -> None:
    back = LOOKUP_BACK.replace("o2 = ScatterND", "s = ScatterND") + " e_grad = Transpose<perm = [1, 0]>(s)"
    made = text(LOOKUP, back, "float[2, 2] o1, float loss, float[2, 4] e_grad", f"{W}, {TABLE}, {LAST}")
    model = read_training_graph(build(made))
    assert paired(model) == {"A": "o1"}
    (refusal,) = metadata.read_list(model, "refused", metadata.Refusal)
    assert (refusal.parameter, refusal.path) == ("e", "gradient output e_grad")
    assert "the exporter folded it away" in refusal.reason


def test_merged_parameters_are_not_paired(build: Callable[[str], ir.Model]) -> None:
    """Two biases that started equal became one constant: neither of two gradients is its own."""
    forward = """y = MatMul(x, A) z = Add(y, b) v = Tanh(z) u = MatMul(v, B) w = Add(u, b)
        loss = ReduceSum<keepdims = 0>(w)"""
    back = """
        zero = Sub(w, w) dw = Exp(zero) o1 = ReduceSum<keepdims = 0>(dw, rows)
        vT = Transpose<perm = [1, 0]>(v) o2 = MatMul(vT, dw)
        BT = Transpose<perm = [1, 0]>(B) dv = MatMul(dw, BT) vv = Mul(v, v) slope = Sub(one, vv)
        dz = Mul(dv, slope) o3 = ReduceSum<keepdims = 0>(dz, rows)
        xT = Transpose<perm = [1, 0]>(x) o4 = MatMul(xT, dz)"""
    outputs = "float loss, float[2] o1, float[2, 2] o2, float[2] o3, float[2, 2] o4"
    made = text(forward, back, outputs, f"{W}, {U}, {BIAS}, float one = {{1}}")
    with pytest.raises(NoGradientsError) as caught:
        read_training_graph(build(made))
    message = str(caught.value)
    assert "'o1' could belong to 'b'" in message
    assert "'o3' could belong to 'b'" in message
    assert "'o2'" not in message


def test_outputs_that_are_no_gradients_stay_outputs(build: Callable[[str], ir.Model]) -> None:
    """A prediction with the shape of a weight, for a batch of two, is not taken for its gradient."""
    forward = """y = MatMul(x, A) loss = ReduceSum<keepdims = 0>(y) p = Softmax<axis = -1>(y)"""
    back = """zero = Sub(y, y) d = Exp(zero) xT = Transpose<perm = [1, 0]>(x) o1 = MatMul(xT, d)"""
    made = text(forward, back, "float loss, float[2, 2] p, float[2, 2] o1", W, "float[2, 2] x")
    model = read_training_graph(build(made))
    assert paired(model) == {"A": "o1"}
    assert [value.name for value in model.graph.outputs] == ["loss", "p", "o1"]


def test_another_type_is_another_parameter(build: Callable[[str], ir.Model]) -> None:
    """A table folded into half precision is a copy: the gradient is that of what is gone."""
    forward = """h16 = Gather<axis = 0>(T, ids) h = Cast<to = 1>(h16) y = MatMul(h, A)
        loss = ReduceSum<keepdims = 0>(y)"""
    table = TABLE.replace("float", "float16")
    made = text(forward, LOOKUP_BACK, "float[2, 2] o1, float loss, float[4, 2] o2", f"{W}, {table}, {LAST}")
    model = read_training_graph(build(made))
    assert paired(model) == {"A": "o1"}
    assert [item.parameter for item in metadata.read_list(model, "refused", metadata.Refusal)] == [
        "parameter of o2"
    ]
