"""What onnxruntime will do with a small model, step by step as it does it."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from kfac_onnx.device.placement import Placement, predict
from kfac_onnx.dialect import attach

HEADER = '<ir_version: 9, opset_import: ["" : 18, "ai.kfac" : 1, "my" : 1]>\n'
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def place(text: str, variant: str | None = None) -> Placement:
    model = ir.from_onnx_text(HEADER + text)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"node_{index}"
    if variant is not None:
        attach(model, variant)  # type: ignore[arg-type]
    return predict([("stage", ir.to_proto(model))])


def providers(found: Placement) -> dict[str, str]:
    return {node.op_type: node.provider for node in found.nodes}


def test_what_has_a_kernel_is_on_the_device() -> None:
    found = place("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    assert providers(found) == {"Relu": CUDA}
    assert found.copies == ()
    assert (found.measured, found.provider) == (False, CUDA)


def test_what_has_none_falls_back_and_its_values_are_copied() -> None:
    found = place("g (float[N] x) => (float[N] y) { a = Relu (x)\n b = Unique (a)\n y = Abs (b) }")
    assert providers(found) == {"Relu": CUDA, "Unique": CPU, "Abs": CUDA}
    assert [node.op_type for node in found.user_fallbacks] == ["Unique"]
    assert found.user_fallbacks[0].reason == "the provider has no kernel for Unique"
    assert {(copy.value, copy.direction) for copy in found.user_copies} == {
        ("a", "to host"),
        ("b", "to device"),
    }
    assert found.fallbacks == found.own_copies == ()


def test_arithmetic_on_sizes_moves_to_the_host_and_its_result_is_copied() -> None:
    found = place(
        "g (float[N] x) => (float[N] y) { r = Relu (x)\n n = Size (r)\n f = Cast <to: int = 1> (n)\n y = Div (r, f) }"
    )
    assert providers(found) == {"Relu": CUDA, "Size": CUDA, "Cast": CPU, "Div": CUDA}
    cast = next(node for node in found.nodes if node.op_type == "Cast")
    assert cast.reason == "reads only sizes, which are on the host, so onnxruntime runs it there"
    assert not cast.missing
    assert [(copy.value, copy.direction, copy.because) for copy in found.copies] == [
        ("f", "to device", ("node_2",))
    ]


def test_a_kernel_that_wants_a_size_on_the_host_ends_the_chain() -> None:
    found = place(
        "g (float[N] x) => (int64[M] y) <int64 one = {1}> "
        "{ n = Size (x)\n m = Add (n, one)\n r = Range (n, m, one)\n y = Neg (r) }"
    )
    assert providers(found) == {"Size": CUDA, "Add": CPU, "Range": CUDA, "Neg": CUDA}
    assert found.copies == ()


def test_an_input_that_the_host_alone_reads_is_copied_without_a_node() -> None:
    found = place("g (float[N] x, int64 count) => (int64 y) { n = Size (x)\n y = Add (n, count) }")
    assert [(copy.value, copy.direction, copy.implicit) for copy in found.copies] == [
        ("count", "to host", True),
        ("y", "to device", True),
    ]


def test_half_precision_is_not_moved() -> None:
    found = place(
        "g (float16[N] x) => (float16[N] y) { n = Size (x)\n f = Cast <to: int = 10> (n)\n"
        " s = Sqrt (f)\n y = Div (x, s) }"
    )
    assert providers(found) == {"Size": CUDA, "Cast": CPU, "Sqrt": CUDA, "Div": CUDA}


def test_fixed_shapes_and_constants_cost_nothing() -> None:
    found = place(
        "g (float[4,N] x) => (float[4,N] y) <float two = {2}> "
        "{ n = Shape <end: int = 1> (x)\n f = Cast <to: int = 1> (n)\n h = Mul (f, two)\n y = Div (x, h) }"
    )
    assert providers(found) == {"Div": CUDA}
    assert found.copies == ()


def test_functions_are_put_in_place_and_know_whose_they_are() -> None:
    text = """g (int64[N] ids, float[N,2] rows) => (int64[U] u, float[U,2] s, float[N,2] y)
    { u, s = ai.kfac.MergeRows (ids, rows)
      y = Relu (rows) }"""
    found = place(text, "safe")
    assert [(node.op_type, node.operator) for node in found.fallbacks] == [("Unique", "MergeRows")]
    assert {copy.direction for copy in found.own_copies} == {"to host", "to device"}
    assert found.user_fallbacks == found.user_copies == ()
    assert found.by_provider(inserted=False) == {CUDA: 1}
    for variant in ("atomic", "ordered"):
        found = place(text, variant)
        assert found.fallbacks == found.own_copies == ()
        assert found.by_provider(inserted=True)[CUDA] > 20


def test_attributes_of_a_call_reach_the_body() -> None:
    text = (
        "g (int64[N] ids, float[N,2] rows) => (float[V,2] y) "
        "{ y = ai.kfac.ScatterRows <vocab_size: int = 9> (ids, rows) }"
    )
    assert {node.operator for node in place(text, "ordered").nodes} == {"ScatterRows"}


def test_nodes_of_branches_are_looked_at() -> None:
    text = """g (bool c, float[N] x) => (float[M] y) {
      y = If (c) <then_branch = t () => (float[M] a) { a = Unique (x) },
                  else_branch = e () => (float[M] b) { b = Relu (x) }> }"""
    found = place(text)
    assert {node.op_type: node.provider for node in found.nodes} == {"If": CUDA, "Unique": CPU, "Relu": CUDA}
    assert [(copy.value, copy.direction) for copy in found.copies] == [("c", "to host")]


def test_a_size_without_a_kernel_for_it_is_no_fallback() -> None:
    """Products of int64 have no kernel, but a size is on the host anyway."""
    found = place(
        "g (float[N,M] x) => (float[K] y) <int64[1] zero = {0}> "
        "{ s = Shape (x)\n p = ReduceProd <keepdims: int = 1> (s, zero)\n y = Reshape (x, p) }"
    )
    assert providers(found)["ReduceProd"] == CPU
    assert found.user_fallbacks == found.copies == ()


def test_stages_are_added_and_shown_as_json() -> None:
    model = onnx.parser.parse_model(HEADER + "g (float[N] x) => (float[N] y) { y = Relu (x) }")
    both = predict([("one", model), ("two", model)])
    assert [node.stage for node in both.nodes] == ["one", "two"]
    data = both.to_json()
    assert data["user"] == {CUDA: 2}
    assert data["inserted"] == {}
    assert data["measured"] is False
    assert [node["op_type"] for node in data["nodes"]] == ["Relu", "Relu"]
