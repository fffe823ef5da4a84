from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_onnx.canonical.dce import Dce
from kfac_onnx.graph.verifier import problems_of
from kfac_onnx.pipeline.base import Changes
from kfac_onnx.pipeline.log import Log

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'


def test_a_dead_chain_goes_and_inputs_stay(parse_model: Callable[[str], ir.Model]) -> None:
    model = parse_model(
        """g (float[N] x, float[N] unused) => (float[N] y) <float[1] w = {2}, float[1] v = {3}> {
             a = Mul(x, w)
             b = Neg(a)
             y = Mul(x, v)
           }"""
    )
    log = Log()
    assert Dce().run(model, log) == Changes(removed=3)
    assert log.statistics == {"nodes removed": 2, "initializers removed": 1}
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert list(model.graph.initializers) == ["v"]
    assert [value.name for value in model.graph.inputs] == ["x", "unused"]


def test_the_default_of_an_input_stays(parse_model: Callable[[str], ir.Model]) -> None:
    model = parse_model("g (float[1] x, float[1] lr = {2}) => (float[1] y) { y = Neg(x) }")
    assert "lr" in model.graph.initializers
    assert Dce().run(model, Log()) == Changes()


def test_what_only_a_dead_branch_used_goes_too(parse_model: Callable[[str], ir.Model]) -> None:
    model = parse_model(
        """g (float[N] x, bool c) => (float[N] y) {
             t = Abs(x)
             y = Neg(x)
             z = If(c) <
               then_branch = a () => (float[N] p) { s = Abs(t) p = Neg(s) },
               else_branch = b () => (float[N] q) { q = Identity(t) }
             >
           }"""
    )
    assert Dce().run(model, Log()) == Changes(removed=5)
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert problems_of(model) == []


def test_dead_nodes_inside_a_live_branch_go(parse_model: Callable[[str], ir.Model]) -> None:
    model = parse_model(
        """g (float[N] x, bool c) => (float[N] y) {
             y = If(c) <
               then_branch = a () => (float[N] p) { dead = Abs(x) p = Neg(x) },
               else_branch = b () => (float[N] q) { q = Identity(x) }
             >
           }"""
    )
    assert Dce().run(model, Log()) == Changes(removed=1)
    assert problems_of(model) == []


def test_functions_that_nothing_calls_go() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 18, "my" : 1]>
        g (float[N] x) => (float[N] y) { y = my.used(x)  z = my.dead(x) }
        <domain: "my", opset_import: ["" : 18, "my" : 1]> used (x) => (y) { y = my.inner(x) }
        <domain: "my", opset_import: ["" : 18]> inner (x) => (y) { y = Neg(x) }
        <domain: "my", opset_import: ["" : 18, "my" : 1]> dead (x) => (y) { y = my.deeper(x) }
        <domain: "my", opset_import: ["" : 18]> deeper (x) => (y) { y = Abs(x) }
        """
    )
    assert Dce().run(model, Log()) == Changes(removed=3)
    assert [name for _, name, _ in model.functions] == ["used", "inner"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=20), st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_differ_exactly_when_changes_are_counted(
    edges: list[tuple[int, int]], data: st.DataObject
) -> None:
    names = ["x", "w"]
    body = ""
    for number, (left, right) in enumerate(edges):
        body += f"  t{number} = Add({names[left % len(names)]}, {names[right % len(names)]})\n"
        names.append(f"t{number}")
    result = data.draw(st.sampled_from(names[2:]))
    text = f"g (float[1] x) => (float[1] y) <float[1] w = {{1}}> {{\n{body}  y = Neg({result})\n}}"
    model = ir.from_onnx_text(HEADER + text)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    changes = Dce().run(model, Log())
    assert (ir.to_proto(model).SerializeToString(deterministic=True) != before) == bool(changes)
    assert problems_of(model) == []
    assert Dce().run(model, Log()) == Changes()  # a second run finds nothing


@pytest.mark.parametrize("model_text", ["g (float[1] x) => (float[1] y) { y = Neg(x) }"])
def test_running_one_pass_object_on_two_models_does_not_matter(model_text: str) -> None:
    one = Dce()
    first, second = ir.from_onnx_text(HEADER + model_text), ir.from_onnx_text(HEADER + model_text)
    assert one.run(first, Log()) == one.run(second, Log())
