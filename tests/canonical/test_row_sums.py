"""Scatters of several lookups at once are taken apart, where they add into zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.race_free_scatters import make_scatters_race_free
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

RNG = np.random.default_rng(8)
ZEROS = "zeros = ConstantOfShape<value = float[1] {0}>(size)"


def graph(index: str = "index = Unsqueeze(ids, last)", base: str = ZEROS, how: str = "add") -> str:
    return f"""<ir_version: 10, opset_import: ["" : 18]>
    g (int64[n] a, int64[m] b, float[n, 3] r, float[m, 3] s) => (float[5, 3] y)
    <int64[1] last = {{-1}}, int64[2] column = {{-1, 1}}, int64[2] size = {{5, 3}},
     float[5, 3] held = {{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}> {{
        ids = Concat<axis = 0>(a, b) rows = Concat<axis = 0>(r, s)
        {base}
        {index}
        y = ScatterND<reduction = "{how}">(zeros, index, rows) }}"""


def scatters(model: ir.Model) -> int:
    return sum(node.op_type == "ScatterElements" for node in model.graph)


CASES = {
    "unsqueezed": (graph(), 2),
    "reshaped": (graph("index = Reshape(ids, column)"), 2),
    "one column each": (
        graph("a1 = Unsqueeze(a, last) b1 = Unsqueeze(b, last) index = Concat<axis = 0>(a1, b1)"),
        1,
    ),
    "a parameter that starts at zero": (graph(base="zeros = Identity(held)").replace("Identity", "Abs"), 1),
    "the parameter itself": (graph(base="").replace("(zeros,", "(held,"), 1),
    "largest instead of sum": (graph(how="max"), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_joined_lookups(
    case: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    text, expected = CASES[case]
    model = build(text)
    infer_shapes(model)
    assert make_scatters_race_free(model) == 1
    assert scatters(model) == expected
    a, b = np.array([3, 0, 3]), np.array([4, 3])
    rows = RNG.standard_normal((5, 3)).astype(np.float32)
    want = np.zeros((5, 3))
    (np.maximum if "largest" in case else np.add).at(want, np.concatenate([a, b]), rows)
    result = run(model, {"a": a, "b": b, "r": rows[:3], "s": rows[3:]})["y"]
    check(result, want, 1e-6)  # sums of at most three float32 terms
