"""Values are numbered alike where the same operators compute them from the same sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.graph.numbering import Numbering

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (int64[N] a, int64[N] b) => (int64[N] z)
<int64 one = {1}, int64 uno = {1}, int64 two = {2}> {
    p = Add (a, one)
    q = Add (a, uno)
    r = Add (a, two)
    s = Add (b, one)
    same = Identity (p)
    pp = Mul (same, p)
    qq = Mul (q, q)
    c = Cast <to = 6> (pp)
    d = Cast <to = 6> (qq)
    e = Cast <to = 1> (qq)
    u = RandomUniformLike <dtype = 1> (a)
    v = RandomUniformLike <dtype = 1> (a)
    left, right = Split <axis = 0, num_outputs = 2> (p)
    gauche, droite = Split <axis = 0, num_outputs = 2> (q)
    z = Add (a, b)
}"""


def values(model: ir.Model) -> dict[str | None, ir.Value]:
    found = {value.name: value for node in model.graph for value in node.outputs}
    return found | {value.name: value for value in model.graph.inputs}


def test_equal_computations_have_equal_numbers(build: Callable[[str], ir.Model]) -> None:
    by_name = values(build(TEXT))
    numbering = Numbering()
    for one, other in (("p", "q"), ("same", "q"), ("pp", "qq"), ("c", "d"), ("left", "gauche")):
        assert numbering.same(by_name[one], by_name[other]), (one, other)


def test_other_sources_attributes_outputs_and_random_numbers_differ(build: Callable[[str], ir.Model]) -> None:
    by_name = values(build(TEXT))
    numbering = Numbering()
    for one, other in (("p", "r"), ("p", "s"), ("d", "e"), ("u", "v"), ("left", "right"), ("a", "b")):
        assert not numbering.same(by_name[one], by_name[other]), (one, other)
    assert not numbering.same(None, by_name["a"])


def test_a_long_chain_needs_no_recursion(build: Callable[[str], ir.Model]) -> None:
    def chain(name: str) -> str:
        links = [f"{name}0 = Neg (a)", *(f"{name}{i} = Neg ({name}{i - 1})" for i in range(1, 3000))]
        return "\n".join(links)

    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (int64[N] a) => (int64[N] z)
    {{ {chain("x")} {chain("y")} z = Add (x2999, y2999) }}"""
    by_name = values(build(text))
    assert Numbering().same(by_name["x2999"], by_name["y2999"])
    assert not Numbering().same(by_name["x2999"], by_name["y2997"])
