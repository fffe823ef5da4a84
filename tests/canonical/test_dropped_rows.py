"""Scatters of selected rows become scatters of masked rows, with the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.dropped_rows import mask_dropped_rows
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

RNG = np.random.default_rng(3)
IDS = np.array([[4], [-2], [0], [7], [4]], np.int64)
ROWS = RNG.standard_normal((5, 3)).astype(np.float32)
BASE = RNG.standard_normal((5, 3)).astype(np.float32)
WANT = BASE.astype(np.float64)
np.add.at(WANT, [4, 0, 4], ROWS[[0, 2, 4]])

VALID = """
    low = GreaterOrEqual (ids, zero)
    high = LessOrEqual (ids, most)
    both = And (low, high)
    valid = Squeeze (both, one)
    at = NonZero (valid)"""
SELECTIONS = {
    "Gather, squeezed": "t = Transpose (at) kept = Squeeze (t, one) i = Gather (ids, kept) r = Gather (rows, kept)",
    "Gather, reshaped": "kept = Reshape (at, flat) i = Gather (ids, kept) r = Gather (rows, kept)",
    "Gather, first row": "kept = Gather (at, nil) i = Gather (ids, kept) r = Gather (rows, kept)",
    "GatherND": "kept = Transpose (at) i = GatherND (ids, kept) r = GatherND (rows, kept)",
    "Compress": "i = Compress <axis = 0> (ids, valid) r = Compress <axis = 0> (rows, valid)",
    "recomputed": """t = Transpose (at) kept = Squeeze (t, one) i = Gather (ids, kept)
        low2 = GreaterOrEqual (ids, zero) high2 = LessOrEqual (ids, most) both2 = And (low2, high2)
        valid2 = Squeeze (both2, one) at2 = NonZero (valid2) t2 = Transpose (at2) kept2 = Squeeze (t2, one)
        r = Gather (rows, kept2)""",
}


def model_of(build: Callable[[str], ir.Model], selection: str, scatter: str) -> ir.Model:
    model = build(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (int64[N, 1] ids, float[N, 3] rows, float[5, 3] base) => (float[5, 3] out)
    <int64 zero = {{0}}, int64 most = {{4}}, int64[1] one = {{1}}, int64[1] flat = {{-1}}, int64 nil = {{0}}> {{
        {VALID} {selection} {scatter}
    }}""")
    infer_shapes(model)
    return model


SCATTER = 'out = ScatterND <reduction = "add"> (base, i, r)'


@pytest.mark.parametrize("name", SELECTIONS)
def test_masked_scatter_adds_the_same(
    name: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = model_of(build, SELECTIONS[name], SCATTER)
    feed = {"ids": IDS, "rows": ROWS, "base": BASE}
    check(run(model, feed)["out"], WANT, 1e-6)  # float32 sums of two
    assert mask_dropped_rows(model) == 1
    check(run(model, feed)["out"], WANT, 1e-6)
    scatter = next(node for node in model.graph if node.op_type == "ScatterND")
    for value, rank in zip(scatter.inputs[1:], (2, 2), strict=True):
        assert value is not None
        assert value.shape is not None
        assert len(value.shape) == rank
        node = value.producer()
        assert node is not None
        assert node.op_type == "Where"
    assert mask_dropped_rows(model) == 0


def test_rows_of_one_entry(
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = build(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (int64[N, 1] ids, float[N] rows, float[5] base) => (float[5] out)
    <int64 zero = {{0}}, int64 most = {{4}}, int64[1] one = {{1}}> {{
        {VALID} {SELECTIONS["Gather, squeezed"]} {SCATTER}
    }}""")
    infer_shapes(model)
    assert mask_dropped_rows(model) == 1
    feed = {"ids": IDS, "rows": ROWS[:, 0].copy(), "base": BASE[:, 0].copy()}
    check(run(model, feed)["out"], WANT[:, 0], 1e-6)


def test_ids_that_are_always_valid_need_no_mask(
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = build(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[3, 3] rows, float[5, 3] base) => (float[5, 3] out)
    <int64[3, 1] ids = {{4, 0, 4}}, int64 zero = {{0}}, int64 most = {{4}}, int64[1] one = {{1}}> {{
        {VALID} {SELECTIONS["Gather, squeezed"]} {SCATTER}
    }}""")
    infer_shapes(model)
    assert mask_dropped_rows(model) == 1
    scatter = next(node for node in model.graph if node.op_type == "ScatterND")
    assert [value.name for value in scatter.inputs[1:] if value is not None] == ["ids", "rows"]
    check(run(model, {"rows": ROWS[[0, 2, 4]], "base": BASE})["out"], WANT, 1e-6)


@pytest.mark.parametrize(
    ("selection", "scatter"),
    [
        # rows selected by another condition than ids
        (
            """t = Transpose (at) kept = Squeeze (t, one) i = Gather (ids, kept)
            other = Squeeze (low, one) at2 = NonZero (other) kept2 = Reshape (at2, flat) r = Gather (rows, kept2)""",
            SCATTER,
        ),
        # only the ids are selected
        ("kept = Reshape (at, flat) i = Gather (ids, kept) r = Slice (rows, one, one)", SCATTER),
        # what is scattered replaces instead of being added
        (SELECTIONS["Gather, squeezed"], "out = ScatterND (base, i, r)"),
    ],
)
def test_what_is_no_dropping_of_rows_stays(
    selection: str, scatter: str, build: Callable[[str], ir.Model]
) -> None:
    assert mask_dropped_rows(model_of(build, selection, scatter)) == 0
