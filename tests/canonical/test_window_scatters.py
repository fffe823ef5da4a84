"""Scatters of a row or column by entries become scatters of rows, with the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.window_scatters import raise_window_scatters
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

RNG = np.random.default_rng(5)
IDS = np.array([[4], [0], [4], [2]], np.int64)
ROWS = RNG.standard_normal((4, 3)).astype(np.float32)
BASE = RNG.standard_normal((3, 5)).astype(np.float32)
WANT = BASE.astype(np.float64)
np.add.at(WANT.T, IDS[:, 0], ROWS)

COLUMN, ROW = "{0, 0, 1, 0, 2, 0}", "{0, 0, 0, 1, 0, 2}"


def model_of(
    build: Callable[[str], ir.Model], *, axis: int = 1, offsets: str | None = None, reduction: str = "add"
) -> ir.Model:
    offsets = offsets or (COLUMN if axis == 1 else ROW)
    order = "nothing, ids" if axis == 1 else "ids, nothing"
    shape = "3, 5" if axis == 1 else "5, 3"
    model = build(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (int64[N, 1] ids, float[N, 3] rows, float[{shape}] base) => (float[{shape}] out)
    <int64[1, 3, 2] offsets = {offsets}, int64[1] flat = {{-1}}, int64[2] pairs = {{-1, 2}},
     int64[3] each = {{-1, 1, 2}}, int64[3] full = {{1, 3, 1}}> {{
        count = Shape (ids)
        nothing = ConstantOfShape <value: tensor = int64[1] {{0}}> (count)
        begins = Concat <axis = 1> ({order})
        begin = Reshape (begins, each)
        wide = Expand (begin, full)
        places = Add (wide, offsets)
        place = Reshape (places, pairs)
        entries = Reshape (rows, flat)
        out = ScatterND <reduction = "{reduction}"> (base, place, entries)
    }}""")
    infer_shapes(model)
    return model


@pytest.mark.parametrize("axis", [0, 1])
def test_windows_become_rows(
    axis: int,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = model_of(build, axis=axis)
    base, want = (BASE, WANT) if axis == 1 else (np.ascontiguousarray(BASE.T), WANT.T)
    feed = {"ids": IDS, "rows": ROWS, "base": base}
    check(run(model, feed)["out"], want, 1e-6)  # float32 sums of two
    assert raise_window_scatters(model) == 1
    check(run(model, feed)["out"], want, 1e-6)
    (scatter,) = [node for node in model.graph if node.op_type == "ScatterND"]
    assert [value.name for value in scatter.inputs[1:] if value is not None] == ["ids", "rows"]
    assert raise_window_scatters(model) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"offsets": "{0, 0, 1, 0, 1, 0}"},  # an entry twice, another never
        {"offsets": "{1, 0, 0, 0, 2, 0}"},  # another order than the rows'
        {"offsets": "{0, 0, 1, 0, 2, 1}"},  # not a column
    ],
)
def test_other_windows_stay(changed: dict[str, str], build: Callable[[str], ir.Model]) -> None:
    assert raise_window_scatters(model_of(build, **changed)) == 0


def test_windows_that_begin_on_two_axes_stay(build: Callable[[str], ir.Model]) -> None:
    model = model_of(build)
    begins = next(node for node in model.graph if node.op_type == "Concat")
    begins.replace_input_with(0, begins.inputs[1])
    assert raise_window_scatters(model) == 0
