"""Graphs that cannot run are refused with the node, what it combines, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.graph.validity import require_consistent, require_tensors
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"


def graph(inputs: str, node: str, build: Callable[[str], ir.Model], result: str = "float z") -> ir.Model:
    return build(f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({result}) {{ {node} }}""")


def test_the_exporters_lost_transpose() -> None:
    with pytest.raises(UserError) as caught:
        read_training_graph(GRAPHS / "jax2onnx__nplm_plainmatmul.onnx")
    place = GRAPHS / "jax2onnx__nplm_plainmatmul.onnx"
    assert str(caught.value) == (
        "the graph cannot run: Gemm 'dot_out_2' multiplies rows of 100 by columns of B\n"
        f"  --> {place}\n"
        "  path: add_any_out_0 float [B, 100], tanh_out_0 float [B, 16], dot_bias_2 float []\n"
        "  help: jax2onnx writes x.T @ g without the transpose: give dense layers a custom_vjp with explicit "
        "transposes, as in jnp.transpose(x) @ g"
    )


REFUSED = {
    "numbers": (
        "float[7, 3] x, float[7, 5] y",
        "z = MatMul (x, y)",
        "MatMul 'z' multiplies rows of 3 by columns of 7",
    ),
    "transposed": (
        "float[3, 7] x, float[5, 7] y",
        "z = Gemm <transB = 1, transA = 1> (x, y)",
        "Gemm 'z' multiplies rows of 3 by columns of 7",
    ),
    "both begin with the batch": (
        "float[B, 3] x, float[B, 5] y",
        "z = MatMul (x, y)",
        "MatMul 'z' multiplies rows of 3 by columns of B",
    ),
    "broadcast": ("float[B, 3] x, float[1, 4] y", "z = Add (x, y)", "Add 'z' combines dimensions of 3 and 4"),
    "types": ("float[B, 3] x, float16[B, 3] y", "z = Mul (x, y)", "Mul 'z' combines float with float16"),
    "branches": (
        "bool[B] c, float[B] x, bfloat16[B] y",
        "z = Where (c, x, y)",
        "Where 'z' combines float with bfloat16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str, build: Callable[[str], ir.Model]) -> None:
    inputs, node, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        require_consistent(graph(inputs, node, build), "train.onnx")
    assert caught.value.message == f"the graph cannot run: {message}"
    assert caught.value.place == "train.onnx"
    assert caught.value.help == (
        "the exporter wrote an invalid graph: export with another version of it, or another way"
    )


@pytest.mark.parametrize(
    ("inputs", "node"),
    [
        ("float[B, 3] x, float[3, 5] y", "z = MatMul (x, y)"),
        ("float[B, 3] x, float[S, 5] y", "z = MatMul (x, y)"),  # S may be 3
        ("float[8, 8] x, float[S, 5] y", "z = MatMul (x, y)"),  # mixes positions; S may be 8
        ("float[B, 3] x, float[B, 5] y", "z = Gemm <transA = 1> (x, y)"),
        ("float[B, 1] x, float[1, 4] y", "z = Add (x, y)"),
        ("float[B, 3] x, float[C, 3] y", "z = Add (x, y)"),
        ("bool[B, 3] c, float[1] x, float[B, 3] y", "z = Where (c, x, y)"),
        ("float[4, 3] x, float[3] y", "z = MatMul (x, y)"),
    ],
)
def test_what_may_run_passes(inputs: str, node: str, build: Callable[[str], ir.Model]) -> None:
    require_consistent(graph(inputs, node, build), None)


@pytest.mark.parametrize("kind", [ir.SequenceType, ir.OptionalType, ir.SparseTensorType])
def test_inputs_are_tensors(kind: type, build: Callable[[str], ir.Model]) -> None:
    model = graph("float[B, 3] x, float[3] y", "z = Add (x, y)", build)
    require_tensors(model, None)
    inner = ir.TensorType(ir.DataType.FLOAT)
    model.graph.inputs[1].type = (
        ir.SparseTensorType(inner.dtype) if kind is ir.SparseTensorType else kind(inner)
    )
    with pytest.raises(
        UserError, match=r"the input 'y' is an? .*; training graphs take tensors only"
    ) as caught:
        require_tensors(model, "train.onnx")
    assert caught.value.place == "train.onnx"
