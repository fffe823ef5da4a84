"""Tables that are looked up inside a body are refused, with the path to the lookup and the reason."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from small_graphs import HEADER

from kfac_onnx.api import scan

REMEDY = "unroll the loop when exporting, or leave the table to the ordinary optimizer (allow-fallback=W)"
INSIDE = "Gather looks it up inside the body of a Loop, Scan or If: "


def report(body: str):
    text = f"""{HEADER}
    training (float[6, 3] W, float[2, 3] h, int64[4, 2] ids) => (float loss, float[6, 3] W_grad)
    <int64 four = {{4}}, bool yes = {{1}}, float limit = {{3.0}}, int64 zero = {{0}}> {{
        {body}
        loss = ReduceSum<keepdims = 0>(last)
        W_grad = Neg(W)
    }}"""
    return scan(ir.from_proto(onnx.parser.parse_model(text)))


CASES = {
    "ids of a state": (
        """k_0 = ArgMax<axis = 1, keepdims = 0>(h)
        last, unused = Loop<body = b (int64 i, bool go, float[m, n] s, int64[m] k)
            => (bool on, float[m, n] s_n, int64[m] k_n) {
            on = Identity(go)
            e = Gather(W, k)
            s_n = Add(s, e)
            k_n = ArgMax<axis = 1, keepdims = 0>(s_n)
        }>(four, yes, h, k_0)""",
        "W -> e (Gather)",
        "its ids cannot be known before the loop: a state that the iterations change is needed for it",
    ),
    "early end": (
        """last = Loop<body = b (int64 i, bool go, float[m, n] s) => (bool on, float[m, n] s_n) {
            k = Gather(ids, i)
            e = Gather(W, k)
            s_n = Add(s, e)
            top = ReduceMax<keepdims = 0>(s_n)
            on = Less(top, limit)
        }>(four, yes, h)""",
        "W -> e (Gather)",
        "the loop ends by its own data, so that the number of its lookups is not known before",
    ),
    "table that changes": (
        """last, unused = Loop<body = b (int64 i, bool go, float[m, n] s, float[6, 3] w)
            => (bool on, float[m, n] s_n, float[6, 3] w_n) {
            on = Identity(go)
            k = Gather(ids, i)
            e = Gather(w, k)
            s_n = Add(s, e)
            w_n = Mul(w, limit)
        }>(four, yes, h, W)""",
        "W -> last (Loop) -> e (Gather)",
        "the table that it reads is a state that the iterations change",
    ),
    "branch": (
        """k = Gather(ids, zero)
        top = ReduceMax<keepdims = 0>(h)
        low = Less(top, limit)
        last = If<then_branch = b () => (float[2, 3] n) { n = Gather(W, k) },
            else_branch = c () => (float[2, 3] o) { o = Identity(h) }>(low)""",
        "W -> n (Gather)",
        "it runs under a condition, so that the number of its lookups is not known before",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refusal_says_where_and_why(name: str) -> None:
    body, path, reason = CASES[name]
    found = report(body)
    assert not found.sites
    (refusal,) = found.refused
    assert (refusal.parameter, refusal.path) == ("W", path)
    assert refusal.reason == INSIDE + reason
    assert refusal.remedy == REMEDY


def test_entries_read_by_number_are_no_lookups() -> None:
    """A stack of biases, one per iteration, is an ordinary parameter, as it is where a Scan reads it."""
    found = report(
        """last = Loop<body = b (int64 i, bool go, float[m, n] s) => (bool on, float[m, n] s_n) {
            on = Identity(go)
            bias = Gather(W, i)
            s_n = Add(s, bias)
        }>(four, yes, h)"""
    )
    assert not found.sites
    assert not found.refused


def test_weights_of_a_body_are_no_tables() -> None:
    found = report(
        """last = Loop<body = b (int64 i, bool go, float[m, n] s) => (bool on, float[m, n] s_n) {
            on = Identity(go)
            back = Transpose(W)
            wide = MatMul(s, back)
            s_n = MatMul(wide, W)
        }>(four, yes, h)"""
    )
    assert not found.sites
    assert not found.refused
