from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.reports.diff import diff

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

GRAPH = """
g (float[N] x, bool c) => (float[N] y) <float[2] w = {1, 2}, float[2] unused = {1, 2}> {
  dead = Abs(x)
  t = LeakyRelu<alpha = 0.5>(x)
  y = If(c) <
    then_branch = a () => (float[N] p) { p = Neg(t) },
    else_branch = b () => (float[N] q) { q = Identity(t) }
  >
  z = Mul(t, w)
}
"""


def test_a_model_does_not_differ_from_itself(parse_model: Callable[[str], ir.Model]) -> None:
    difference = diff(parse_model(GRAPH), parse_model(GRAPH))
    assert not difference
    assert str(difference) == "the models are the same"
    assert difference.to_json()["same"] is True


def test_what_a_pipeline_changed(parse_model: Callable[[str], ir.Model]) -> None:
    before, after = parse_model(GRAPH), parse_model(GRAPH)
    parse_pipeline("dce").run(after)
    difference = diff(before, after)
    assert str(difference) == (
        "initializers: +0 -2 ~0\n"
        f"  - w float32[2] sha256:{digest()}\n"
        f"  - unused float32[2] sha256:{digest()}\n"
        "nodes: +0 -2 ~0\n"
        "  - %dead = Abs(%x)\n"
        "  - %z = Mul(%t, %w)\n"
        "metadata: +1 -0 ~0\n"
        "  + kfac.pipeline = dce"
    )
    data = difference.to_json()
    assert data["same"] is False
    assert data["nodes"]["removed"] == {"dead": "%dead = Abs(%x)", "z": "%z = Mul(%t, %w)"}


def digest() -> str:
    import hashlib

    return hashlib.sha256(np.array([1, 2], np.float32).tobytes()).hexdigest()[:12]


def test_weights_attributes_and_branches_count(parse_model: Callable[[str], ir.Model]) -> None:
    before = parse_model(GRAPH)
    after = parse_model(
        GRAPH.replace("w = {1, 2}", "w = {1, 2.02}")
        .replace("alpha = 0.5", "alpha = 0.25")
        .replace("p = Neg(t)", "p = Exp(t)")
    )
    changed = diff(before, after).to_json()
    assert list(changed["initializers"]["changed"]) == ["w"]
    assert changed["nodes"]["changed"] == {
        "t": {"before": "%t = LeakyRelu(%x) {alpha=0.5}", "after": "%t = LeakyRelu(%x) {alpha=0.25}"},
        "y.then_branch: p": {
            "before": "y.then_branch: %p = Neg(%t)",
            "after": "y.then_branch: %p = Exp(%t)",
        },
    }
    assert str(diff(before, after)).splitlines()[-2:] == [
        "  ~ y.then_branch: %p = Neg(%t)",
        "    y.then_branch: %p = Exp(%t)",
    ]
