"""Segment sums as tf2onnx lowers them become scatters, with the same numbers; anything else stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.canonical.segment_sums import raise_segment_sums
from kfac_onnx.graph.shapes import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

RNG = np.random.default_rng(5)
TOLERANCE = 1e-6  # sums of at most twelve float32 terms in another order
LINES = {
    "count": "n = Shape(ids)",
    "topk": "sorted, order = TopK<axis = 0, largest = 0, sorted = 1>(ids, n)",
    "unique": "values, first, inverse, counts = Unique<axis = 0, sorted = 1>(sorted)",
    "length": "length = Squeeze(n, first_axis)",
    "numbers": "numbers = Range(zero, length, one)",
    "occurs": "occurs = Gather(counts, inverse)",
    "place": "place = Mod(numbers, occurs)",
    "most": "most = ReduceMax<keepdims = 1>(counts, first_axis)",
    "size": "size = Concat<axis = 0>(segments, most)",
    "empty": "empty = ConstantOfShape<value = int64[1] {-1}>(size)",
    "left": "left = Unsqueeze(sorted, last_axis)",
    "right": "right = Unsqueeze(place, last_axis)",
    "places": "places = Concat<axis = 1>(left, right)",
    "grid": "grid = ScatterND(empty, places, order)",
    "shape": "shape = Shape(rows)",
    "tail": "tail = Slice(shape, one_axis, end, first_axis)",
    "nothing": "nothing = ConstantOfShape<value = float[1] {0}>(tail)",
    "zero_row": "zero_row = Unsqueeze(nothing, first_axis)",
    "padded": "padded = Concat<axis = 0>(rows, zero_row)",
    "picked": "picked = Gather<axis = 0>(padded, grid)",
    "result": "y = ReduceSum<keepdims = 0>(picked, one_axis)",
}
CONSTANTS = """int64 zero = {0}, int64 one = {1}, int64[1] first_axis = {0}, int64[1] one_axis = {1},
    int64[1] last_axis = {-1}, int64[1] end = {9223372036854775807}, int64[1] segments = {7}"""


def segment_sum(
    inputs: str = "int64[n] ids, float[n, 3] rows",
    output: str = "float[7, 3] y",
    constants: str = CONSTANTS,
    head: str = "",
    kind: str = "float",
    **lines: str,
) -> str:
    """Return the text of a graph that sums `rows` by `ids`, with some of its lines replaced."""
    body = "\n".join({**LINES, **lines}.values()).replace("float[1] {0}", f"{kind}[1] {{0}}")
    return f"""<ir_version: 10, opset_import: ["" : 18]>
    g ({inputs}) => ({output}) <{constants}> {{ {head} {body} }}"""


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in used(model)}


def used(model: ir.Model) -> list[ir.Node]:
    """Return the nodes that the outputs depend on."""
    found: dict[ir.Node, None] = {}
    stack = [value.producer() for value in model.graph.outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack.extend(value.producer() for value in node.inputs if value is not None)
    return list(found)


def summed(ids: np.ndarray, rows: np.ndarray, segments: int = 7) -> np.ndarray:
    result = np.zeros((segments, *rows.shape[1:]))
    np.add.at(result, ids, np.asarray(rows, np.float64))
    return result


IDS = [np.array([3, 0, 3, 3, 6, 0, 2]), np.array([5]), np.array([4] * 12), np.arange(7)[::-1].copy()]


@pytest.mark.parametrize("ids", IDS, ids=["mixed", "one", "all the same", "each once"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_lowered_segment_sum_becomes_a_scatter(
    ids: np.ndarray,
    threads: int,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = build(segment_sum())
    feed = {"ids": ids, "rows": RNG.standard_normal((len(ids), 3)).astype(np.float32)}
    before = run(model, feed)["y"]
    assert raise_segment_sums(model) == 1
    assert operators(model) == {"ScatterElements", "ConstantOfShape", "Reshape", "Expand", "Shape"}
    after = run(model, feed, threads)["y"]
    check(after, summed(ids, feed["rows"]), TOLERANCE)
    check(before, summed(ids, feed["rows"]), TOLERANCE)


VARIANTS = {
    "float64": {
        "inputs": "int64[n] ids, double[n, 3] rows",
        "output": "double[7, 3] y",
        "kind": "double",
    },
    "half": {"inputs": "int64[n] ids, float16[n, 3] rows", "output": "float16[7, 3] y", "kind": "float16"},
    "vector": {"inputs": "int64[n] ids, float[n] rows", "output": "float[7] y"},
    "rank three": {"inputs": "int64[n] ids, float[n, 3, 2] rows", "output": "float[7, 3, 2] y"},
    "static": {"inputs": "int64[5] ids, float[5, 3] rows"},
    "static, folded": {
        "inputs": "int64[5] ids, float[5, 3] rows",
        "constants": CONSTANTS + ", int64[1] n = {5}, float[1, 3] zero_row = {0, 0, 0}, "
        "int64[5] numbers = {0, 1, 2, 3, 4}",
        "count": "",
        "length": "",
        "numbers": "",
        "shape": "",
        "tail": "",
        "nothing": "",
        "zero_row": "",
    },
    "int32 ids": {"inputs": "int32[n] short, float[n, 3] rows", "head": "ids = Cast<to = 7>(short)"},
    "largest first": {"topk": "sorted, order = TopK<axis = 0, largest = 1, sorted = 1>(ids, n)"},
    "length of the sorted": {"count": "n = Shape(ids) m = Size(ids)", "length": "length = Identity(m)"},
    "other way of writing columns": {
        "constants": CONSTANTS + ", int64[2] column = {-1, 1}",
        "left": "left = Reshape(sorted, column)",
        "places": "places = Concat<axis = -1>(left, right)",
    },
    "number of segments at run time": {
        "inputs": "int64[n] ids, float[n, 3] rows, int64[1] segments",
        "output": "float[m, 3] y",
        "constants": CONSTANTS.replace(", int64[1] segments = {7}", ""),
    },
    "unknown shapes": {
        "inputs": "int64[n] ids, float[n, k] rows, int64[1] segments",
        "output": "float[m, k] y",
        "constants": CONSTANTS.replace(", int64[1] segments = {7}", ""),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_same_sum(
    variant: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = build(segment_sum(**VARIANTS[variant]))
    infer_shapes(model)
    ids = np.array([3, 0, 3, 6, 3])
    rows = next(value for value in model.graph.inputs if value.name == "rows")
    tail = [dim if isinstance(dim, int) else 3 for dim in list(rows.shape)[1:]]
    feed = {
        "ids": ids,
        "short": ids.astype(np.int32),
        "rows": RNG.standard_normal((5, *tail)).astype(rows.dtype.numpy()),
        "segments": np.array([7]),
    }
    assert raise_segment_sums(model) == 1
    assert "ReduceSum" not in operators(model)
    tolerance = 1e-3 if variant == "half" else TOLERANCE  # float16 keeps eleven bits
    check(run(model, feed)["y"], summed(ids, feed["rows"]), tolerance)


OTHERS = {
    "another sum": {"result": "y = ReduceSum<keepdims = 0>(picked, zero_axis)"},
    "a maximum": {"result": "y = ReduceMax<keepdims = 0>(picked, one_axis)"},
    "kept axis": {"result": "y = ReduceSum<keepdims = 1>(picked, one_axis)", "output": "float[7, 1, 3] y"},
    "an extra row that is not zero": {"nothing": "nothing = ConstantOfShape<value = float[1] {0.5}>(tail)"},
    "an extra row in front": {"padded": "padded = Concat<axis = 0>(zero_row, rows)"},
    "empty places read the first row": {"empty": "empty = ConstantOfShape<value = int64[1] {0}>(size)"},
    "places that add up": {"grid": 'grid = ScatterND<reduction = "add">(empty, places, order)'},
    "the order of another sort": {
        "topk": LINES["topk"] + " other, order2 = TopK<axis = 0, largest = 1, sorted = 1>(ids, n)",
        "grid": "grid = ScatterND(empty, places, order2)",
    },
    "ids that were not sorted": {"left": "left = Unsqueeze(ids, last_axis)"},
    "counts of other ids": {
        "unique": "values, first, inverse, counts = Unique<axis = 0, sorted = 1>(ids)",
    },
    "only some of the ids": {
        "topk": "sorted, order = TopK<axis = 0, largest = 0, sorted = 1>(ids, one_axis)",
        "output": "float[7, 3] y",
    },
    "numbers that start at one": {"numbers": "numbers = Range(one, length, one)"},
    "every second number": {"numbers": "numbers = Range(zero, length, two)"},
    "unsorted": {"topk": "sorted, order = TopK<axis = 0, largest = 0, sorted = 0>(ids, n)"},
    "columns swapped": {"places": "places = Concat<axis = 1>(right, left)"},
    "another width": {"size": "size = Concat<axis = 0>(segments, segments)"},
}


@pytest.mark.parametrize("variant", OTHERS)
def test_a_structure_that_differs_is_left_alone(variant: str, build: Callable[[str], ir.Model]) -> None:
    constants = CONSTANTS + ", int64 two = {2}, int64[1] zero_axis = {0}"
    model = build(segment_sum(**{"constants": constants, **OTHERS[variant]}))
    infer_shapes(model)
    assert raise_segment_sums(model) == 0


JOINED = "ids = Concat<axis = 0>(a, b) rows = Concat<axis = 0>(r, s)"
SPLITS = {
    "named lengths": ("int64[n] a, int64[m] b, float[n, 3] r, float[m, 3] s", JOINED, False),
    "numbers": ("int64[4] a, int64[2] b, float[4, 3] r, float[2, 3] s", JOINED, False),
    "as TensorFlow reshapes": (
        "int64[n, 2] a2, int64[m] b2, float[n, 6] r2, float[m, 3] s2",
        """p = Size(a2) p1 = Unsqueeze(p, first_axis) ps = Concat<axis = 0>(p1, three)
           q = Size(b2) q1 = Unsqueeze(q, first_axis) qs = Concat<axis = 0>(q1, three)
           a = Reshape(a2, p1) b = Reshape(b2, q1) r = Reshape(r2, ps) s = Reshape(s2, qs)"""
        + JOINED,
        False,
    ),
    "int32, joined before the cast": (
        "int32[n] a, int32[m] b, float[n, 3] r, float[m, 3] s",
        "both = Concat<axis = 0>(a, b) ids = Cast<to = 7>(both) rows = Concat<axis = 0>(r, s)",
        False,
    ),
    "rows not joined": (
        "int64[n] a, int64[m] b, float[k, 3] rows",
        "ids = Concat<axis = 0>(a, b)",
        True,
    ),
    "lengths unknown": (
        "int64[n] a, int64[m] b, float[x, 3] r, float[y, 3] s",
        JOINED,
        True,
    ),
}


@pytest.mark.parametrize("variant", SPLITS)
def test_joined_lookups_get_a_scatter_each(
    variant: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    inputs, head, split = SPLITS[variant]
    constants = CONSTANTS + ", int64[1] three = {3}"
    model = build(segment_sum(inputs=inputs, constants=constants, head=head))
    infer_shapes(model)
    assert raise_segment_sums(model) == 1
    scatters = [node for node in used(model) if node.op_type == "ScatterElements"]
    assert len(scatters) == 2
    assert ("Split" in operators(model)) is split
    whole = np.array([3, 0, 3, 6, 3, 0])
    rows = RNG.standard_normal((6, 3)).astype(np.float32)
    feed: dict[str, np.ndarray] = {}
    for name, array in {"a": whole[:4], "b": whole[4:], "a2": whole[:4], "b2": whole[4:]}.items():
        value = next((item for item in model.graph.inputs if item.name == name), None)
        if value is not None:
            feed[name] = array.reshape(2, 2) if len(value.shape) == 2 else array
            feed[name] = feed[name].astype(value.dtype.numpy())
    feed |= {"r": rows[:4], "s": rows[4:], "rows": rows, "r2": rows[:4].reshape(2, 6), "s2": rows[4:]}
    check(run(model, feed)["y"], summed(whole, rows), TOLERANCE)


def test_nested_joins_and_whole_numbers(
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    """Three lookups joined in two steps; sums of integers stay one scatter, since Sum takes floats alone."""
    inputs = "int64[n] a, int64[m] b, int64[k] c, float[n, 3] r, float[m, 3] s, float[k, 3] t"
    head = """ab = Concat<axis = 0>(a, b) ids = Concat<axis = 0>(ab, c)
              rs = Concat<axis = 0>(r, s) rows = Concat<axis = 0>(rs, t)"""
    ids, rows = np.array([3, 0, 3, 6]), RNG.standard_normal((4, 3)).astype(np.float32)
    feed = {"a": ids[:2], "b": ids[2:3], "c": ids[3:], "r": rows[:2], "s": rows[2:3], "t": rows[3:]}
    model = build(segment_sum(inputs=inputs, head=head))
    assert raise_segment_sums(model) == 1
    assert sum(node.op_type == "ScatterElements" for node in used(model)) == 3
    check(run(model, feed)["y"], summed(ids, rows), TOLERANCE)

    short = inputs.replace("float", "int32")
    model = build(segment_sum(inputs=short, output="int32[7, 3] y", head=head, kind="int32"))
    infer_shapes(model)
    assert raise_segment_sums(model) == 1
    assert sum(node.op_type == "ScatterElements" for node in used(model)) == 1
    whole = np.arange(12, dtype=np.int32).reshape(4, 3)
    feed |= {"r": whole[:2], "s": whole[2:3], "t": whole[3:]}
    np.testing.assert_array_equal(run(model, feed)["y"], summed(ids, whole))
