"""Nodes that do nothing to a number are left out of the stages, and only those."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kfac_onnx.graph.inference import inferred
from kfac_onnx.step.protos import build_model, read_source
from kfac_onnx.step.slots import prune
from kfac_onnx.step.unneeded import spare


def kinds(body: str, *, constants: str = "", wanted: tuple[str, ...] = ()) -> list[str]:
    """Return the operators that are left of a graph over g float[N, 1], x float[N, 4] and w float[4].

    What is left makes the same of random numbers, bit for bit.
    """
    text = (
        '<ir_version: 9, opset_import: ["" : 18]> graph (float[N, 1] g, float[N, 4] x, float[4] w, float[M, 4] z)'
        f" => (float[N, 4] y) <{constants}> {{ {body} }}"
    )
    proto = inferred(onnx.parser.parse_model(text))
    source = read_source(ir.from_proto(proto))
    roots = {"y", *wanted}
    items = prune(spare(source, source.items, roots), roots)
    inputs = set(source.inputs)
    built = build_model(source, [item.node for item in items], sorted(roots), name="left", as_inputs=inputs)
    random = np.random.default_rng(0)
    sizes = {"g": (5, 1), "x": (5, 4), "w": (4,), "z": (5, 4)}
    feeds = {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    (want,) = run(proto, feeds, ["y"])
    (got,) = run(built, feeds, ["y"])
    assert got.tobytes() == want.tobytes()
    assert got.shape == want.shape
    return [item.node.op_type for item in items]


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {info.name for info in session.get_inputs()}
    return session.run(outputs, {name: array for name, array in feeds.items() if name in given})


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_an_expand_before_an_operator_that_broadcasts(operator: str) -> None:
    assert kinds(f"s = Shape(x) e = Expand(g, s) y = {operator}(e, x)") == [operator]
    assert kinds(f"s = Shape(x) e = Expand(g, s) y = {operator}(x, e)") == [operator]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("s = Shape(x) e = Expand(g, s) y = Mul(e, w)", "the other operand is smaller"),
        ("s = Shape(x) e = Expand(g, s) y = Mul(e, z)", "the other operand's size has another name"),
        ("s = Shape(x) e = Expand(g, s) y = Mul(e, e)", "there is no other operand"),
        ("s = Shape(x) e = Expand(g, s) y = Concat<axis = 1>(e, x)", "another operator"),
        ("s = Shape(x) e = Expand(g, s) a = Mul(e, x) b = Neg(e) y = Add(a, b)", "another reader"),
    ],
    ids=["smaller", "named", "twice", "operator", "reader"],
)
def test_an_expand_that_somebody_needs(body: str, why: str) -> None:
    assert "Expand" in kinds(body), why


def test_of_two_expands_that_meet_one_stays() -> None:
    left = kinds("s = Shape(x) e = Expand(g, s) f = Expand(w, s) y = Mul(e, f)")
    assert left.count("Expand") == 1


def test_what_is_wanted_is_still_made() -> None:
    assert "Expand" in kinds("s = Shape(x) e = Expand(g, s) y = Mul(e, x)", wanted=("e",))
    assert "Expand" in kinds("s = Shape(x) e = Expand(g, s) y = Mul(e, x)", wanted=("g",))


@pytest.mark.parametrize("shape", ["{-1, 4}", "{0, 4}", "{0, -1}", "{0, 0}"])
def test_a_reshape_to_the_same_shape(shape: str) -> None:
    left = kinds("r = Reshape(x, s) y = Neg(r)", constants=f"int64[2] s = {shape}")
    assert left == ["Neg"]


def test_a_chain_of_reshapes() -> None:
    body = "r = Reshape(x, s) q = Reshape(r, s) y = Neg(q)"
    assert kinds(body, constants="int64[2] s = {-1, 4}") == ["Neg"]


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ("int64[2] s = {4, -1}", "r = Reshape(x, s) t = Reshape(r, u) y = Neg(t)"),
        ("int64[1] s = {-1}", "r = Reshape(x, s) t = Reshape(r, u) y = Neg(t)"),
        ("int64[2] s = {5, 4}", "r = Reshape(x, s) y = Neg(r)"),
        ("int64[2] s = {-1, 4}", "r = Reshape<allowzero = 1>(x, s) y = Neg(r)"),
    ],
    ids=["turned", "flat", "checked", "allowzero"],
)
def test_a_reshape_that_changes_or_checks_something(shape: str, body: str) -> None:
    assert "Reshape" in kinds(body, constants=f"{shape}, int64[2] u = {{-1, 4}}")
