from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from kfac_onnx.canonical.race_free_scatters import make_scatters_race_free
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

HEAD = '<ir_version: 10, opset_import: ["" : 18]> g '
RNG = np.random.default_rng(0)


def reference(base: np.ndarray, indices: np.ndarray, updates: np.ndarray, how: str) -> np.ndarray:
    """Return ScatterND with a reduction, in float64."""
    result = base.astype(np.float64)
    function = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[how]
    function.at(result, tuple(np.moveaxis(indices, -1, 0)), updates.astype(np.float64))
    return result


def kinds(model: ir.Model) -> set[str]:
    return {
        f"{node.op_type} {node.attributes['reduction'].as_string()}"
        for node in model.graph
        if "reduction" in node.attributes
    }


@pytest.mark.parametrize("how", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_reducing_scatter_becomes_scatter_elements(
    how: str,
    columns: int,
    dynamic: bool,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    shape = (4, 3, 2)
    indices = np.array([[0, 2, 1], [3, -1, 0], [0, 2, 1], [-4, 2, -1]])[
        :, :columns
    ]  # one place named three ways
    base = RNG.standard_normal(shape).astype(np.float32)
    updates = RNG.standard_normal((4, *shape[columns:])).astype(np.float32)
    dims = "a,b,c" if dynamic else "4,3,2"
    rest = ["", "c", "b,c"][3 - columns] if dynamic else ["", "2", "3,2"][3 - columns]
    tail = f",{rest}" if rest else ""
    model = build(
        f"{HEAD} (float[{dims}] x, int64[n,{columns}] i, float[n{tail}] u) => (float[{dims}] y)"
        f' {{ y = ScatterND <reduction = "{how}"> (x, i, u) }}'
    )
    assert make_scatters_race_free(model) == 1
    assert kinds(model) == {f"ScatterElements {how}"}
    expected = reference(base, indices, updates, how)
    for threads in (1, 4):
        result = run(model, {"x": base, "i": indices, "u": updates}, threads)["y"]
        check(result, expected, 1e-6)  # sums of at most four float32 terms


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("operator", ["ScatterND", "ScatterElements"])
def test_half_precision_sums_are_made_in_float32(
    dtype: type,
    operator: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    """300 ones sum to 300: float16 would be exact, bfloat16 would stop at 256."""
    kind = np.dtype(dtype).name
    indices = "int64[300,1] i" if operator == "ScatterND" else "int64[300,2] i"
    model = build(
        f"{HEAD} ({kind}[3,2] x, {indices}, {kind}[300,2] u) => ({kind}[3,2] y)"
        f' {{ y = {operator} <reduction = "add"> (x, i, u) }}'
    )
    assert make_scatters_race_free(model) == 1
    i = np.ones((300, 1 if operator == "ScatterND" else 2), np.int64)
    result = run(model, {"x": np.zeros((3, 2), dtype), "i": i, "u": np.ones((300, 2), dtype)})["y"]
    check(result.astype(np.float32), np.array([[0, 0], [300, 300], [0, 0]], np.float32), 2.0**-8)


def test_many_repeats_are_all_added_with_four_threads(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    """A size at which ScatterND with several threads loses updates on this kind of machine."""
    n, dim = 20000, 16
    model = build(
        f"{HEAD} (float[3,{dim}] x, int64[n,1] i, float[n,{dim}] u) => (float[3,{dim}] y)"
        ' { y = ScatterND <reduction = "add"> (x, i, u) }'
    )
    make_scatters_race_free(model)
    i = RNG.integers(0, 3, (n, 1))
    feeds = {"x": np.zeros((3, dim), np.float32), "i": i, "u": np.ones((n, dim), np.float32)}
    counts = np.bincount(i[:, 0], minlength=3)
    for _ in range(3):
        np.testing.assert_array_equal(run(model, feeds, 4)["y"], np.repeat(counts[:, None], dim, 1))


@pytest.mark.parametrize(
    ("constant", "count"),
    [("{0, 2, 1}", 0), ("{0, 2, 0}", 1), ("{0, 2, -4}", 1)],
)
def test_only_indices_that_may_repeat_are_rewritten(
    constant: str, count: int, build: Callable[[str], ir.Model]
) -> None:
    model = build(
        f"{HEAD} (float[4,2] x, float[3,2] u) => (float[4,2] y) <int64[3,1] i = {constant}>"
        ' { y = ScatterND <reduction = "add"> (x, i, u) }'
    )
    assert make_scatters_race_free(model) == count


def test_plain_scatters_stay(build: Callable[[str], ir.Model]) -> None:
    model = build(
        f"{HEAD} (float[4,2] x, int64[3,1] i, float[3,2] u) => (float[4,2] y) {{ y = ScatterND (x, i, u) }}"
    )
    assert make_scatters_race_free(model) == 0


def test_unknown_index_columns_are_refused(build: Callable[[str], ir.Model]) -> None:
    model = build(
        f"{HEAD} (float[4,2] x, int64[n,k] i, float[n] u) => (float[4,2] y)"
        ' { [add] y = ScatterND <reduction = "add"> (x, i, u) }'
    )
    with pytest.raises(UserError) as caught:
        make_scatters_race_free(model)
    assert str(caught.value) == (
        "the scatter node 'add' cannot be made safe for several threads: the number of index columns is not "
        "static\n  help: export the model with static shapes of its index tensors"
    )
