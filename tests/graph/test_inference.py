"""ONNX's inference without lists of every entry of every vector: the same shapes, in bounded time and memory."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from kfac_onnx.graph import inference
from kfac_onnx.graph.inference import LONGEST, inferred

DATA = Path(__file__).parents[1] / "data"
HEAD = '<ir_version: 8, opset_import: ["" : 18, "own" : 1]>'
HUGE = 5_000_000
"""Entries that can be listed, for a test that fails; hostile files have 2^62."""

Shapes = dict[str, tuple[int | str, ...]]


def shapes(proto: onnx.ModelProto) -> Shapes:
    """Return the dimensions of all values by name, '?' where ONNX knows none, also of those in bodies."""
    found: Shapes = {}
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        for item in (*graph.value_info, *graph.output):
            if item.type.tensor_type.HasField("shape"):
                dims = item.type.tensor_type.shape.dim
                found[item.name] = tuple(
                    d.dim_value if d.HasField("dim_value") else re.sub("^unk__.*|^$", "?", d.dim_param)
                    for d in dims
                )
        graphs += [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return found


@pytest.fixture
def longest_given(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Watch what ONNX's propagation reads: the longest vector that it makes a list of."""
    given: list[float] = [0]
    run = onnx.shape_inference.infer_shapes

    def watched(proto: onnx.ModelProto, *, data_prop: bool, **options: bool) -> onnx.ModelProto:
        result = run(proto, data_prop=data_prop, **options)
        if data_prop:
            given[0] = max(given[0], _longest(result.graph))
        return result

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    return given


def _longest(graph: onnx.GraphProto) -> int:
    known = {item.name: item.type.tensor_type.shape.dim for item in (*graph.input, *graph.value_info)}
    read = [
        known[name]
        for node in graph.node
        if node.domain == "" and node.op_type in ("Add", "Cast", "Concat", "Gather", "Mul", "Slice")
        for name in node.input
        if name in known
    ]
    return max((dims[0].dim_value for dims in read if len(dims) == 1), default=0)


HOSTILE = {
    "an input of that many entries": f"g (int64[{HUGE}] x) => (float y) {{ c = Cast <to = 6> (x) ",
    "of rows": f"g (int64[{HUGE}] x, float[4, 2] w) => (float y) {{ c = Gather (w, x) ",
    "a constant that asks for them": f"g (int64[1] x) => (float y) <int64[1] n = {{{HUGE}}}> "
    "{ e = Expand (x, n) c = Cast <to = 6> (e) ",
    "a constant that is copied first": f"g (int64[1] x) => (float y) <int64[1] n = {{{HUGE}}}> "
    "{ i = Cast <to = 7> (n) e = Expand (x, i) c = Cast <to = 6> (e) ",
    "sizes that are multiplied first": "g (int64[1] x) => (float y) <int64[1] n = {2500}> "
    "{ m = Mul (n, n) e = Expand (x, m) c = Add (e, e) ",
    "a table made flat": "g (float[2000, 3000] x) => (float y) <int64[1] n = {-1}> "
    "{ e = Reshape (x, n) c = Mul (e, e) ",
    "a vector that is doubled 22 times": "g (int64[1] v0) => (float y) { "
    + " ".join(f"v{i + 1} = Concat <axis = 0> (v{i}, v{i})" for i in range(22))
    + " c = Cast <to = 6> (v22) ",
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("text", list(HOSTILE.values()), ids=list(HOSTILE))
def test_long_vectors_are_never_listed(text: str, strict: bool, longest_given: list[float]) -> None:
    proto = onnx.parser.parse_model(HEAD + text + "d = Cast <to = 1> (c) y = ReduceMax <keepdims = 0> (d) }")
    kept = proto.SerializeToString()
    found = inferred(proto, strict=strict)
    assert longest_given[0] <= LONGEST
    assert proto.SerializeToString() == kept
    assert len(found.opset_import) == 2
    assert {node.domain for node in found.graph.node} == {""}
    assert shapes(found)["y"] == ()
    assert max(shapes(found)["d"]) > 4_000_000


def test_functions_are_not_looked_into(longest_given: list[float]) -> None:
    proto = onnx.parser.parse_model(
        HEAD + f"g (int64[4] x) => (int32[N] y) {{ a = own.Long (x) y = own.Next (a) }}"
        f'<domain: "own", opset_import: ["" : 18]> Long (x) => (y) {{ '
        f"n = Constant <value_ints = [{HUGE}, 1]> () e = Expand (x, n) "
        "f = Constant <value_ints = [-1]> () y = Reshape (e, f) }"
        '<domain: "own", opset_import: ["" : 18]> Next (x) => (y) { y = Cast <to = 6> (x) }'
    )
    found = inferred(proto)
    assert [node.domain for node in found.graph.node] == ["own", "own"]
    assert longest_given[0] <= LONGEST
    assert "a" in shapes(found)


def test_a_file_cannot_say_what_hidden_nodes_are(longest_given: list[float]) -> None:
    proto = onnx.parser.parse_model(
        HEAD.replace("own", "hidden.0")
        + f"g (int64[{HUGE}] x) => (int32[N] y) {{ y = Cast <to = 6> (x) }}"
        + '<domain: "hidden.0", opset_import: ["" : 18]> Cast (x) => (y) { y = Shape (x) }'
    )
    assert shapes(inferred(proto))["y"] == (HUGE,)
    assert longest_given[0] <= LONGEST


BODY = """g (int64[SIZE] x, float[N, 2] w, bool c) => (float[a, b] y) {
  y = If (c) <
    then_branch = t () => (float[p, q] s) { k = Cast <to = 6> (x) s = Gather (w, k) },
    else_branch = e () => (float[r, u] i) { i = Identity (w) }
  >
}"""


@pytest.mark.parametrize("size", [5, HUGE])
def test_bodies(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node in a body reads a long vector from outside: it is hidden from the propagation alone."""
    hidden: list[list[str]] = []
    run = onnx.shape_inference.infer_shapes

    def watched(proto: onnx.ModelProto, *, data_prop: bool, **options: bool) -> onnx.ModelProto:
        if data_prop:
            hidden.append([node.op_type for node in proto.graph.node[0].attribute[0].g.node if node.domain])
        return run(proto, data_prop=data_prop, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    found = inferred(onnx.parser.parse_model(HEAD + BODY.replace("SIZE", str(size))))
    assert hidden == [[] if size == 5 else ["Cast", "Gather"]]
    assert shapes(found)["k"] == (size,)
    body = next(item.g for item in found.graph.node[0].attribute if item.name == "then_branch")
    assert [node.domain for node in body.node] == ["", ""]


def test_vectors_up_to_the_limit_are_propagated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that pass through a vector of four entries, with a limit of four and of three."""
    proto = onnx.parser.parse_model(
        HEAD + "g (float[2, 3, 4, 5] x, float[120] z) => (float[a] y) <int64[2] s = {0, 3}> "
        "{ n = Shape (x) p = Gather (n, s) q = Cast <to = 7> (p) r = Reshape (z, q) y = Neg (r) }"
    )
    proto.graph.initializer.append(helper.make_tensor("unused", TensorProto.FLOAT, [1], [0.0]))
    monkeypatch.setattr(inference, "LONGEST", 6)
    assert shapes(inferred(proto))["r"] == (2, 5)
    monkeypatch.setattr(inference, "LONGEST", 5)
    assert shapes(inferred(proto)).get("r") in (None, ("?", "?"))


def test_every_real_graph_has_the_shapes_that_onnx_infers() -> None:
    """Nothing that the propagation tells of real graphs is lost, and no file waits for a long vector."""
    paths = sorted(DATA.rglob("*.onnx"))
    assert len(paths) > 100
    worse: list[str] = []
    for path in paths:
        proto = onnx.load(path, load_external_data=False)
        try:
            usual = shapes(onnx.shape_inference.infer_shapes(proto, data_prop=True))
        except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
            with pytest.raises(type(error)):
                inferred(proto)
            continue
        ours = shapes(inferred(proto))
        worse += [
            f"{path.name}: {name} {dims} -> {ours.get(name)}"
            for name, dims in usual.items()
            if name not in ours or any(a not in ("?", b) for a, b in zip(dims, ours[name], strict=True))
        ]
    assert worse == []
