"""Each rewrite of a loop: the same numbers as the loop, and what is left of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kfac_onnx.canonical.loops import open_loops
from kfac_onnx.graph.shapes import infer_shapes

HEADER = '<ir_version: 9, opset_import: ["" : 18]>'
LOOPS = {"Loop", "Scan", "If", "SequenceInsert", "ConcatFromSequence"}
# The same products and sums, at most added up in another order: float32 rounding of the largest entry.
CLOSE = 2e-6


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEADER}\n{text}")


def opened(proto: onnx.ModelProto) -> tuple[ir.Model, list[str]]:
    model = ir.from_proto(proto)
    infer_shapes(model)
    notes = open_loops(model)
    infer_shapes(model)
    onnx.checker.check_model(ir.to_proto(model))
    return model, notes


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})


def check(text: str, *feeds: dict[str, np.ndarray], scaled: float = 1.0) -> tuple[ir.Model, set[str]]:
    """Compare a graph with its opened form; return that and the operators in all its graphs."""
    proto = parsed(text)
    model, notes = opened(proto)
    assert notes
    for feed in feeds:
        for got, want in zip(run(ir.to_proto(model), feed), run(proto, feed), strict=True):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            scale = max(float(np.abs(want).max(initial=0)), 1e-6)
            assert np.abs(got * scaled - want).max(initial=0) <= CLOSE * scale
    return model, {node.op_type for graph in (model.graph, *model.graph.subgraphs()) for node in graph}


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ids(high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape)


def bodies(model: ir.Model) -> list[str]:
    return [node.op_type for graph in model.graph.subgraphs() for node in graph]


SCAN = """
g (float[7, 3] W, int64[{ids}] ids, float[2, 3] h) => (float[2, 3] last, float[N, 2, 3] ys) {{
    last, ys = Scan<num_scan_inputs = 1, {settings} body = b (float[m, n] s, int64[m] i)
        => (float[m, n] s_n, float[m, n] y) {{
        e = Gather(W, i)
        a = Add(e, s)
        s_n = Tanh(a)
        y = Mul(s_n, e)
    }}>(h, ids)
}}
"""


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ("", (4, 2)),
        ("scan_input_directions = [1],", (4, 2)),
        ("scan_input_axes = [1],", (2, 4)),
        ("scan_input_axes = [-1], scan_input_directions = [1], scan_output_directions = [1],", (2, 4)),
    ],
)
def test_scan_reads_rows_that_were_looked_up_before(settings: str, shape: tuple[int, int]) -> None:
    text = SCAN.format(ids=", ".join(map(str, shape)), settings=settings)
    model, _ = check(text, {"W": floats(7, 3), "ids": ids(7, *shape), "h": floats(2, 3, seed=1)})
    assert "Gather" not in bodies(model)
    assert sum(node.op_type == "Gather" for node in model.graph) == 1


def test_comparison_notices_one_percent() -> None:
    text = SCAN.format(ids="4, 2", settings="")
    with pytest.raises(AssertionError):
        check(text, {"W": floats(7, 3), "ids": ids(7, 4, 2), "h": floats(2, 3, seed=1)}, scaled=1.01)


LOOP = """
g (float[7, 3] W, {inputs}, float[2, 3] h) => (float[2, 3] last)
<int64 four = {{4}}, int64 one = {{1}}, bool yes = {{1}}> {{
    {before}
    last{more} = Loop<body = b (int64 i, bool go, float[m, n] s{starts}) => (bool on, float[m, n] s_n{ends}) {{
        on = Identity(go)
        {ids}
        e = Gather({table}, k)
        s_n = Sub(e, s)
        {rest}
    }}>({trip}, yes, h{firsts})
}}
"""


def loop(
    ids: str = "k = Gather(ids, i)",
    inputs: str = "int64[4, 2] ids",
    *,
    before: str = "",
    table: str = "W",
    trip: str = "four",
    state: str = "",
    rest: str = "",
) -> str:
    """Return a Loop that looks up W; `state` is the name of the outer value of a further state `w`."""
    return LOOP.format(
        ids=ids,
        inputs=inputs,
        before=before,
        table=table,
        trip=trip,
        rest=rest,
        more=", unused" if state else "",
        starts=", float[p, q] w" if state else "",
        ends=", float[p, q] w_n" if state else "",
        firsts=f", {state}" if state else "",
    )


FEED = {"W": floats(7, 3), "ids": ids(7, 4, 2), "h": floats(2, 3, seed=1)}


@pytest.mark.parametrize(
    "text",
    [
        loop(),
        loop("j = Identity(i)\n k = Gather(ids, j)"),
        loop("j = Sub(three, i)\n k = Gather(ids, j)", before="three = Constant<value_int = 3>()"),
        loop("j = Gather(ids, i)\n m = Neg(j)\n k = Sub(m, one)"),
        loop("k_0 = Gather(ids, i)\n k_1 = Mul(k_0, i)\n k = Mod(k_1, four)"),
        loop("j = Gather(ids, i)\n z = Less(j, one)\n a = Add(j, four)\n k = Where(z, a, j)"),
        loop("r = Gather<axis = 1>(flipped, i)\n k = Identity(r)", before="flipped = Transpose(ids)"),
        loop(trip="count", before="lengths = Shape<start = 0, end = 1>(ids)\n count = Squeeze(lengths)"),
    ],
)
def test_ids_by_number_are_known_before_a_loop(text: str) -> None:
    model, _ = check(text, FEED)
    assert all(
        node.inputs[0] is not model.graph.inputs[0] for graph in model.graph.subgraphs() for node in graph
    )


def test_table_that_a_loop_carries_unchanged_is_read_from_outside() -> None:
    text = loop(table="w", state="W", rest="w_n = Identity(w)")
    model, _ = check(text, FEED)
    (node,) = [node for node in model.graph if node.op_type == "Loop"]
    assert len(node.inputs) == 3


def test_ids_that_a_permutation_brings_in_order_are_the_original_ids() -> None:
    text = loop(
        "k = Gather(back, i)",
        before="turn = Constant<value_ints = [3, 2, 1, 0]>()\n back = Gather(ids, turn)",
    )
    model, _ = check(text, FEED)
    table = model.graph.inputs[0]
    lookup = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[0] is table)
    assert lookup.inputs[1] is model.graph.inputs[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            """
            g (float[7, 3] W, float[2, 3] h) => (float[2, 3] last) <int64 four = {4}, bool yes = {1}> {
                k_0 = ArgMax<axis = 1, keepdims = 0>(h)
                last, j = Loop<body = b (int64 i, bool go, float[m, n] s, int64[m] k)
                    => (bool on, float[m, n] s_n, int64[m] k_n) {
                    on = Identity(go)
                    e = Gather(W, k)
                    s_n = Add(s, e)
                    k_n = ArgMax<axis = 1, keepdims = 0>(s_n)
                }>(four, yes, h, k_0)
            }""",
            "ids of a state",
        ),
        (
            """
            g (float[7, 3] W, int64[4, 2] ids, float[2, 3] h) => (float[2, 3] last)
            <int64 four = {4}, bool yes = {1}, float limit = {1.0}> {
                last = Loop<body = b (int64 i, bool go, float[m, n] s) => (bool on, float[m, n] s_n) {
                    k = Gather(ids, i)
                    e = Gather(W, k)
                    s_n = Add(s, e)
                    top = ReduceMax<keepdims = 0>(s_n)
                    on = Less(top, limit)
                }>(four, yes, h)
            }""",
            "early end",
        ),
    ],
)
def test_lookups_that_are_not_known_before_stay(text: str, why: str) -> None:
    proto = parsed(text)
    model, _ = opened(proto)
    assert "Gather" in bodies(model), why
    for got, want in zip(run(ir.to_proto(model), FEED), run(proto, FEED), strict=True):
        np.testing.assert_array_equal(got, want)


BAG = """
g (float[9, 3] W, int64[N] ids, int64[B] starts, float[N] weights) => ({result}) {{
    size = Shape(ids)
    {offsets}
    counted = Shape<start = 0, end = 1>(from)
    count = Squeeze(counted)
    yes = Constant<value = bool {{1}}>()
    zero = Constant<value_ints = [0]>()
    bags = Loop<body = b (int64 i, bool go) => (bool on, float[D] bag) {{
        on = Identity(yes)
        f = Gather(from, i)
        t = Gather(to, i)
        f_1 = Unsqueeze(f, zero)
        t_1 = Unsqueeze(t, zero)
        k = Slice(ids, f_1, t_1, zero)
        rows = Gather(W, k)
        {rows}
    }}>(count, yes)
}}
"""
OFFSETS = """all = Concat<axis = 0>(starts, size)
    one = Constant<value_ints = [1]>()
    last = Constant<value_ints = [9223372036854775807]>()
    from = Identity(starts)
    to = Slice(all, one, last, zero_0)
    zero_0 = Constant<value_ints = [0]>()"""
OFFSETS = "zero_0 = Constant<value_ints = [0]>()\n" + OFFSETS.rsplit("\n", 1)[0]
SUM = "bag = ReduceSum<keepdims = 0>(rows, zero)"
WEIGHTED = """w = Slice(weights, f_1, t_1, zero)
        last_axis = Constant<value_ints = [1]>()
        column = Unsqueeze(w, last_axis)
        scaled = Mul(rows, column)
        bag = ReduceSum<keepdims = 0>(scaled, zero)"""
MEAN = "bag = ReduceMean<keepdims = 0>(rows, zero)"


@pytest.mark.parametrize("rows", [SUM, WEIGHTED], ids=["sum", "weighted"])
@pytest.mark.parametrize(
    "starts", [[0, 3, 3, 5, 9], [2, 3, 8], [0, 9, 4], [0, 11, 11], [0, -2]], ids=lambda item: str(item)
)
def test_bags_are_segment_sums_for_any_offsets(rows: str, starts: list[int]) -> None:
    """Empty bags, ids before the first bag, bags that overlap or run backwards, negative offsets."""
    text = BAG.format(result="float[B, D] bags", offsets=OFFSETS, rows=rows)
    feed = {"W": floats(9, 3), "ids": ids(9, 11), "starts": np.array(starts), "weights": floats(11)}
    _, left = check(text, feed)
    assert not left & LOOPS


def test_mean_bags_without_entries_are_zero() -> None:
    text = BAG.format(result="float[B, D] bags", offsets=OFFSETS, rows=MEAN)
    feed = {"W": floats(9, 3), "ids": ids(9, 11), "starts": np.array([0, 3, 3, 11]), "weights": floats(11)}
    model, _ = opened(parsed(text))
    (got,) = run(ir.to_proto(model), feed)
    rows = feed["W"][feed["ids"]]
    want = [rows[:3].mean(0), np.zeros(3), rows[3:].mean(0), np.zeros(3)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


ACCUMULATE = """
g (int64[4, 2] ids, float[4, 2, 3] g_rows, float[7, 3] start, float[2, 3] h) => (float[7, 3] total, float[2, 3] last)
<int64 four = {{4}}, bool yes = {{1}}, int64[1] end = {{-1}}, int64[2] size = {{7, 3}}> {{
    zeros = ConstantOfShape(size)
    last, total = Loop<body = b (int64 i, bool go, float[m, n] s, float[p, q] acc)
        => (bool on, float[m, n] s_n, float[p, q] acc_n) {{
        on = Identity(go)
        k = Gather(ids, i)
        g_i = Gather(g_rows, i)
        s_n = Sub(g_i, s)
        at = Unsqueeze(k, end)
        {body}
    }}>(four, yes, h, {first})
}}
"""
ELEMENTS = """shape = Shape(s_n)
        at_all = Expand(at, shape)
        acc_n = ScatterElements<axis = 0, reduction = "add">(acc, at_all, s_n)"""


@pytest.mark.parametrize("first", ["zeros", "start"])
@pytest.mark.parametrize(
    "body",
    [
        'acc_n = ScatterND<reduction = "add">(acc, at, s_n)',
        ELEMENTS,
        'part = ScatterND<reduction = "add">(zeros, at, s_n)\n acc_n = Add(acc, part)',
        'part = ScatterND<reduction = "add">(zeros, at, s_n)\n acc_n = Add(part, acc)',
        'one = ScatterND<reduction = "add">(acc, at, s_n)\n acc_n = ScatterND<reduction = "add">(one, at, g_i)',
        'one = ScatterND<reduction = "add">(acc, at, s_n)\n acc_n = Add(one, start)',
    ],
)
def test_rows_are_added_once_after_the_loop(body: str, first: str) -> None:
    feed = {
        "ids": ids(7, 4, 2),
        "g_rows": floats(4, 2, 3),
        "start": floats(7, 3, seed=2),
        "h": floats(2, 3, seed=1),
    }
    model, left = check(ACCUMULATE.format(body=body, first=first), feed)
    assert not {"ScatterND", "ScatterElements"} & set(bodies(model))
    assert "Loop" in left


@pytest.mark.parametrize(
    "body",
    [
        'acc_n = ScatterND<reduction = "add">(acc, at, s_n)\n again = Neg(acc)\n read = ReduceSum(again)',
        "acc_n = ScatterND(acc, at, s_n)",
        'half = Add(acc, acc)\n acc_n = ScatterND<reduction = "add">(half, at, s_n)',
    ],
    ids=["read otherwise", "overwrites", "doubles"],
)
def test_accumulators_that_are_more_than_sums_stay(body: str) -> None:
    if "read" in body:
        body = body.replace("read = ReduceSum(again)", "") + "\n"
        body = body.replace("again = Neg(acc)", "") + "unused = Identity(on)"
        text = ACCUMULATE.format(body=body, first="zeros").replace(
            "s_n = Sub(g_i, s)", "seen = Gather(acc, k)\n s_n = Sub(seen, s)"
        )
    else:
        text = ACCUMULATE.format(body=body, first="zeros")
    feed = {"ids": ids(7, 4, 2), "g_rows": floats(4, 2, 3), "start": floats(7, 3), "h": floats(2, 3, seed=1)}
    proto = parsed(text)
    model, _ = opened(proto)
    assert "ScatterND" in bodies(model)
    for got, want in zip(run(ir.to_proto(model), feed), run(proto, feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("new_axis", [0, 1])
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_while_that_appends_to_a_sequence_is_a_stack(new_axis: int, limit: int) -> None:
    text = f"""
    g (float[N, 2, 3] x, int64 limit) => (float z{"[a, b, c]" if new_axis else "[a, b]"})
    <int64 zero = {{0}}, int64 one = {{1}}> {{
        empty = SequenceEmpty()
        first = Less(zero, limit)
        parts, i = Loop<body = b (int64 t, bool go, seq(float[2, 3]) s, int64 i) => (bool on, seq(float[2, 3]) s_n, int64 i_n) {{
            entry = Gather(x, i)
            part = Neg(entry)
            s_n = SequenceInsert(s, part)
            i_n = Add(i, one)
            on = Less(i_n, limit)
        }}>(, first, empty, zero)
        z = ConcatFromSequence<axis = 0, new_axis = {new_axis}>(parts)
    }}"""
    text = text.replace("float z[", "float[").replace("])\n", "] z)\n", 1)
    proto = parsed(text)
    model, _ = opened(proto)
    assert not {node.op_type for node in model.graph} & LOOPS
    x = floats(5, 2, 3)
    (got,) = run(ir.to_proto(model), {"x": x, "limit": np.array(limit)})
    want = -x[:limit]
    np.testing.assert_array_equal(got, want if new_axis else want.reshape(-1, 3))


def test_branch_that_is_always_taken_takes_the_place_of_the_if() -> None:
    text = """
    g (float[N, 1] x) => (float[N] y) <int64[1] one = {1}> {
        shape = Shape(x)
        last = Gather(shape, one)
        same = Equal(last, one)
        y = If<then_branch = t () => (float[N] p) { p = Squeeze(x, one) },
            else_branch = e () => (float[N, 1] q) { q = Identity(x) }>(same)
    }"""
    model, left = check(text, {"x": floats(4, 1)})
    assert "If" not in left
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_branches_by_iteration_are_chosen_entry_by_entry() -> None:
    """A division that would not take place divides by one, so that no gradient is 0 / 0."""
    text = """
    g (float[5, 3] x, float[5] by) => (float[5, 3] ys) <int64 five = {5}, bool yes = {1}, float zero = {0.0}> {
        ys = Loop<body = b (int64 i, bool go) => (bool on, float[3] y) {
            on = Identity(go)
            part = Gather(x, i)
            d = Gather(by, i)
            none = Equal(d, zero)
            y = If<then_branch = t () => (float[3] p) { p = Mul(part, zero) },
                else_branch = e () => (float[3] q) { q = Div(part, d) }>(none)
        }>(five, yes)
    }"""
    feed = {"x": floats(5, 3), "by": np.array([1, 0, 2, 0, -4], np.float32)}
    model, left = check(text, feed)
    assert not left & LOOPS
    (divided,) = [node for node in model.graph if node.op_type == "Div"]
    assert divided.inputs[1].producer().op_type == "Where"


def test_graph_without_loops_stays_as_it_is() -> None:
    model = ir.from_proto(parsed("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    before = ir.to_proto(model).SerializeToString()
    assert open_loops(model) == []
    assert ir.to_proto(model).SerializeToString() == before


def test_opened_graph_stays_as_it_is() -> None:
    model, _ = opened(parsed(SCAN.format(ids="4, 2", settings="")))
    before = ir.to_proto(model).SerializeToString()
    assert open_loops(model) == []
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(("middle", "dropped"), [(11, True), (10, False)], ids=["float64", "float16"])
def test_a_matrix_that_is_cast_before_a_loop_and_back(middle: int, dropped: bool) -> None:
    """float64 holds every float32, and onnxruntime's optimizer loses what the body reads; float16 rounds."""

    def text(dtype: int) -> str:
        return f"""
        g (float[3, 3] W, int64[5, 2] ids, float[2, 3] h, float[7, 3] T) => (float[2, 3] last, float[N, 2, 3] ys) {{
            c = Cast<to = {dtype}>(W)
            M = Cast<to = 1>(c)
            last, ys = Scan<num_scan_inputs = 1, body = b (float[m, n] s, int64[m] i)
                => (float[m, n] t, float[m, n] y) {{
                r = Gather(T, i)
                a = MatMul(r, M)
                u = Add(s, a)
                t = Tanh(u)
                y = Identity(t)
            }}>(h, ids)
        }}
        """

    feed = {"W": floats(3, 3), "ids": ids(7, 5, 2), "h": floats(2, 3, seed=1), "T": floats(7, 3, seed=2)}
    model, notes = opened(parsed(text(middle)))
    assert ("casts to a wider type and back: 1" in notes) is dropped
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    plain = text(middle).replace("MatMul(r, M)", "MatMul(r, W)") if dropped else text(middle)
    want = run(parsed(plain), feed)  # as it is, onnxruntime cannot run the first
    for got, value in zip(session.run(None, feed), want, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5)
