"""An exception is the graph's fault just if ONNX calls the graph invalid."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx.errors import UserError, VerifyError
from kfac_onnx.graph.invalid import blames_the_graph, invalid

TEXT = """<ir_version: 9, opset_import: ["" : 18]>
g (float[4, 2] x) => (float[2, 4] y) { y = Transpose <perm = [1, 0]> (x) }
"""


def model(old: str = "", new: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT.replace(old, new) if old else TEXT)


BAD_PERM = ("[1, 0]", "[7, 0]")
BAD_SHAPE = ("float[2, 4] y", "float[9, 9] y")


@blames_the_graph
def fails(source: object, error: Exception | None = None) -> str:
    if error is not None:
        raise error
    return "fine"


def test_a_valid_graph_leaves_the_exception() -> None:
    assert invalid(model()) is None
    assert fails(model()) == "fine"
    assert fails(model(*BAD_PERM)) == "fine"  # nothing failed, so nobody asks
    for error in (IndexError("a rule"), VerifyError("a pass"), RecursionError(), MemoryError()):
        with pytest.raises(type(error)) as caught:
            fails(model(), error)
        assert caught.value is error


@pytest.mark.parametrize("change", [BAD_PERM, BAD_SHAPE])
def test_an_invalid_graph_is_the_error(change: tuple[str, str]) -> None:
    proto = model(*change)
    error = IndexError("a rule")
    for source in (proto, ir.from_proto(proto)):
        with pytest.raises(UserError, match="the ONNX model is invalid: ") as caught:
            fails(source, error)
        assert caught.value.__cause__ is error
    with pytest.raises(UserError):
        fails(source=proto, error=error)


def test_the_users_errors_pass() -> None:
    error = UserError("said already")
    with pytest.raises(UserError) as caught:
        fails(model(*BAD_PERM), error)
    assert caught.value is error


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_lists_that_are_none(rank: int, inside: bool) -> None:
    """ONNX's inference says nothing of them; ONNX Runtime refuses them."""
    add = "s = ReduceSum <keepdims = 0> (y, axes)"
    if inside:
        add = f"b = If (c) <then_branch = t () => (float[] s) {{ {add} }},"
        add += " else_branch = e () => (float[] u) { u = ReduceMax <keepdims = 0> (y) }>"
    text = TEXT.replace("> (x) }", f"> (x) {add} }}").replace("(float[4, 2] x)", "(float[4, 2] x, bool c)")
    proto = onnx.parser.parse_model(text)
    tensor = onnx.numpy_helper.from_array(np.ones((1,) * rank, np.int64), "axes")
    proto.graph.initializer.append(tensor)
    assert invalid(proto) == f"ReduceSum 's' reads 'axes' of rank {rank} as a list"
    tensor.dims[:] = [1]
    proto.graph.initializer[0].CopyFrom(tensor)
    assert invalid(proto) is None


def test_large_tensors_are_not_copied_into_the_judgement() -> None:
    proto = model()
    tensor = onnx.numpy_helper.from_array(np.zeros((4, 200), np.float32), "w")
    proto.graph.initializer.append(tensor)
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["y", "w"], ["z"]))
    assert invalid(proto) is None
    proto.graph.initializer[0].dims[:] = [200, 4]
    assert "incompatible" in str(invalid(proto)).lower()
    assert len(proto.graph.initializer) == 1
