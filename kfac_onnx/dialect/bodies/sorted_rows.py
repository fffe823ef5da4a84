"""Rows that share an id, summed on a device: bodies made of operators that the CUDA provider has kernels for.

`Unique` has none. Ids are sorted instead, by `TopK` on keys id·2^31 + position, which are all different, so
that the order is one and the same on every device and rows of one id stay in the order of the batch. Sorted,
the rows of an id are neighbours. What is known of a position n, its id s and its row x, then spreads to the
whole run of that id in rounds of doubling distance h = 1, 2, 4, ...:

    leader    f[n] ← f[f[n]]                  from f[n] = n where a run begins, n − 1 elsewhere
    sum       x[n] ← x[n] + [s[n+h] = s[n]]·x[n+h]       the first of a run ends with the sum of the run

O(N·D·log N) for the sum, O(N·log N) for the rest. Two kinds of bodies are made of this:

- atomic: `merge_rows_sorted` adds each row to that of its leader by `ScatterND`, whose adds are atomic;
- ordered: no sum depends on the order in which threads come by. Rows are summed by the rounds above, and a
  table is written by one `ScatterND` or `ScatterElements` without reduction, where positions of one id all
  write the same: the old row, read before, and the whole sum. For the deterministic mode.

Sizes that come from `Shape` are on the host; they only go where the kernels want them there (`TopK`'s K,
`Range`, `Slice`, `Expand`), never into arithmetic, so that nothing is copied within a step. A size that
arithmetic needs comes as the one number of `Range(n, n + 1, 1)`, whose kernel reads the host and writes the
device. The text is ONNX's own form; the rounds are unrolled, because a `Loop` would make the host wait for
each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Body",
    "add_rows_ordered",
    "apply_columns_ordered",
    "apply_flat_device",
    "apply_flat_ordered",
    "apply_rows_ordered",
    "input_factor_average_ordered",
    "input_factor_update_ordered",
    "merge_lookups_device",
    "merge_lookups_ordered",
    "merge_rows_ordered",
    "merge_rows_sorted",
    "sample_rows_device",
    "scatter_rows_ordered",
    "take_now_device",
]

ROUNDS: Final = 31
"""Runs of up to 2^31 rows, more than a batch can hold: distances beyond the batch change nothing."""

_HEADER: Final = '<domain: "ai.kfac", opset_import: ["" : 18]>\n'


@dataclass(frozen=True)
class Body:
    """A body in ONNX's text form, used like one that onnxscript compiled."""

    text: str

    def to_function_proto(self) -> onnx.FunctionProto:
        """Return the function that the text describes, its nodes named in their order."""
        import onnx.parser

        function = onnx.parser.parse_function(_HEADER + self.text)
        for index, node in enumerate(function.node):
            node.name = f"n{index}"
        return function


def _wrapped(ids: str, vocab: str) -> str:
    """Make `own`, the ids as rows count from 0; −1 is the last row, and must not pass for another one."""
    return f"""
    {vocab}
    zero = Constant <value_int: int = 0> ()
    below = Less({ids}, zero)
    moved = Add({ids}, V)
    own = Where(below, moved, {ids})
    """


def _sorting(ids: str) -> str:
    """Make `order` (positions in the order of their ids), `s` (the ids in it) and `begins` (of each run)."""
    return f"""
    N = Shape ({ids})
    flat = Constant <value_ints: ints = [-1]> ()
    none = Constant <value_ints: ints = []> ()
    origin = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    limit = Reshape(N, none)
    position = Range(origin, limit, one)
    spread = Constant <value_int: int = 2147483648> ()
    high = Mul({ids}, spread)
    key = Add(high, position)
    sorted_key, order = TopK <axis: int = 0, largest: int = 0, sorted: int = 1> (key, N)
    s = Gather({ids}, order)
    start = Constant <value_ints: ints = [0]> ()
    nobody = Constant <value_ints: ints = [-1]> ()
    but_last = Slice(s, start, nobody)
    before = Concat <axis: int = 0> (nobody, but_last)
    continues = Equal(s, before)
    begins = Not(continues)
    """


def _leaders() -> str:
    """Make `leader`: for each sorted position the first one of its run."""
    lines = ["neighbour = Sub(position, one)", "f_0 = Where(begins, position, neighbour)"]
    lines += [f"f_{k + 1} = Gather(f_{k}, f_{k})" for k in range(ROUNDS)]
    return "\n".join([*lines, f"leader = Identity(f_{ROUNDS})"])


def _summing(rows: str, *, flat: bool, wide: bool) -> str:
    """Make `x`: sorted rows ([N, D], or [N] where `flat`), the first of each run the sum of the run.

    Rows are float32, or float64 where `wide`.
    """
    end = "end = Constant <value_ints: ints = [9223372036854775807]> ()"
    lines = [end, f"x_0 = Gather({rows}, order)"]
    for k in range(ROUNDS):
        same = f"same_{k}" if flat else f"same_column_{k}"
        lines += [
            f"h_{k} = Constant <value_ints: ints = [{2**k}]> ()",
            f"later_id_{k} = Slice(s, h_{k}, end)",
            f"rest_{k} = Shape(later_id_{k})",
            f"id_{k} = Slice(s, start, rest_{k})",
            f"same_{k} = Equal(later_id_{k}, id_{k})",
            *([] if flat else [f"same_column_{k} = Unsqueeze(same_{k}, one_axis)"]),
            f"later_{k} = Slice(x_{k}, h_{k}, end, start)",
            f"here_{k} = Slice(x_{k}, start, rest_{k}, start)",
            f"tail_{k} = Slice(x_{k}, rest_{k}, end, start)",
            f"taken_{k} = Where({same}, later_{k}, nothing)",
            f"more_{k} = Add(here_{k}, taken_{k})",
            f"x_{k + 1} = Concat <axis: int = 0> (more_{k}, tail_{k})",
        ]
    head = ["nothing = Constant <value_float: float = 0.0> ()"]
    if wide:
        head = ["zero32 = Constant <value_float: float = 0.0> ()", "nothing = Cast <to: int = 11> (zero32)"]
    head += [] if flat else ["one_axis = Constant <value_ints: ints = [1]> ()"]
    return "\n".join([*head, *lines, f"x = Identity(x_{ROUNDS})"])


def _totals(ids: str, rows: str, *, flat: bool = False, wide: bool = False) -> str:
    """Make `s`, as [N, 1] too (`index`), and at each sorted position `total`, the sum of its id's rows."""
    return f"""
    {_sorting(ids)}
    {_summing(rows, flat=flat, wide=wide)}
    {_leaders()}
    total = Gather(x, leader)
    last_axis = Constant <value_ints: ints = [-1]> ()
    index = Unsqueeze(s, last_axis)
    """


_ROWS_OF_W: Final = _wrapped("ids", "V = Shape <start: int = 0, end: int = 1> (W)")
_COLUMNS_OF_W: Final = _wrapped("ids", "V = Shape <start: int = 1, end: int = 2> (W)")
_ENTRIES_OF_A: Final = _wrapped("ids", "V = Shape <start: int = 0, end: int = 1> (A)")

merge_rows_sorted: Final = Body(f"""
merge_rows (ids, rows) => (unique_ids, sums) {{
    {_sorting("ids")}
    {_leaders()}
    column = Unsqueeze(order, flat)
    by_position = ScatterND(order, column, leader)
    place = Unsqueeze(by_position, flat)
    size = Shape(rows)
    nothing = Constant <value_float: float = 0.0> ()
    zeros = Expand(nothing, size)
    added = ScatterND <reduction: string = "add"> (zeros, place, rows)
    found = NonZero(begins)
    first = Reshape(found, flat)
    unique_ids = Gather(s, first)
    sums = Gather(added, first)
}}""")
"""Distinct ids in ascending order and the sum of the rows of each, added atomically."""

merge_rows_ordered: Final = Body(f"""
merge_rows (ids, rows) => (unique_ids, sums) {{
    {_sorting("ids")}
    {_summing("rows", flat=False, wide=False)}
    found = NonZero(begins)
    first = Reshape(found, flat)
    unique_ids = Gather(s, first)
    sums = Gather(x, first)
}}""")
"""Distinct ids in ascending order and the sum of the rows of each, in one order."""

merge_lookups_device: Final = Body("""
merge_lookups (slot, ids, rows) => (slot_out, every_id, place, merged) {
    zero = Constant <value: tensor = int64 {0}> ()
    one = Constant <value: tensor = int64 {1}> ()
    length = Shape (ids)
    count = Squeeze (length)
    positions = Range (zero, count, one)
    small = Cast <to: int = 6> (positions)
    slot_out = ScatterElements <axis: int = 0> (slot, ids, small)
    winner = GatherElements <axis: int = 0> (slot_out, ids)
    place = Cast <to: int = 7> (winner)
    shape = Shape (rows)
    nothing = Constant <value_float: float = 0.0> ()
    zeros = Expand (nothing, shape)
    last = Constant <value_ints: ints = [-1]> ()
    index = Unsqueeze (place, last)
    merged = ScatterND <reduction: string = "add"> (zeros, index, rows)
    every_id = Identity (ids)
}""")
"""The sum of each id's rows at one of its lookups and 0 at the others: nothing waits for their number."""

merge_lookups_ordered: Final = Body(f"""
merge_lookups (slot, ids, rows) => (slot_out, every_id, place, merged) {{
    {_wrapped("ids", "V = Shape <start: int = 0, end: int = 1> (slot)")}
    {_sorting("own")}
    {_leaders()}
    {_summing("rows", flat=False, wide=False)}
    first = Gather(order, leader)
    column = Unsqueeze(order, flat)
    place = ScatterND(order, column, first)
    begins_column = Unsqueeze(begins, flat)
    summed = Where(begins_column, x, nothing)
    merged = ScatterND(rows, column, summed)
    small = Cast <to: int = 6> (place)
    slot_out = ScatterElements <axis: int = 0> (slot, ids, small)
    every_id = Identity (ids)
}}""")
"""The sum of each id's rows at the first of its lookups and 0 at the others, in one order."""

add_rows_ordered: Final = Body(f"""
add_rows (W, ids, rows) => (W_out) {{
    {_ROWS_OF_W}
    {_totals("own", "rows")}
    old = Gather(W, s)
    new = Add(old, total)
    W_out = ScatterND(W, index, new)
}}""")
"""W[ids] += rows, repeated ids adding up in one order; W is [V, D]."""

apply_rows_ordered: Final = Body(f"""
apply_rows (W, ids, update, lr) => (W_out) {{
    {_ROWS_OF_W}
    {_totals("own", "update")}
    old = Gather(W, s)
    move = Mul(lr, total)
    new = Sub(old, move)
    W_out = ScatterND(W, index, new)
}}""")
"""W[ids] −= lr·update, repeated ids adding up in one order; W is [V, D]."""

apply_columns_ordered: Final = Body(f"""
apply_columns (W, ids, update, lr) => (W_out) {{
    {_COLUMNS_OF_W}
    {_totals("own", "update")}
    old = Gather <axis: int = 1> (W, s)
    move = Mul(lr, total)
    columns = Transpose <perm: ints = [1, 0]> (move)
    new = Sub(old, columns)
    row = Unsqueeze(s, start)
    size = Shape(new)
    places = Expand(row, size)
    W_out = ScatterElements <axis: int = 1> (W, places, new)
}}""")
"""W[:, ids] −= lr·updateᵀ, repeated ids adding up in one order; W is [D, V]."""

_WIDTH: Final = """
    unit = Constant <value_int: int = 1> ()
    nil = Constant <value_int: int = 0> ()
    top = Constant <value_ints: ints = [0]> ()
    rowwise = Constant <value_ints: ints = [-1]> ()
    columnwise = Constant <value_ints: ints = [1]> ()
    scalar = Constant <value_ints: ints = []> ()
    columns = Shape <start: int = 1, end: int = 2> (update)
    width = Reshape(columns, scalar)
    past_width = Add(width, unit)
    D = Range(width, past_width, unit)
    inside = Range(nil, width, unit)
    inside_row = Unsqueeze(inside, top)
"""
"""Make `D`, the width of a table stored as one vector, and `inside_row`, 0..D−1 as [1, D]."""

apply_flat_device: Final = Body(f"""
apply_flat (W, ids, update, lr) => (W_out) {{
    {_WIDTH}
    index = Unsqueeze(ids, columnwise)
    row = Mul(index, D)
    places = Add(row, inside_row)
    at = Reshape(places, rowwise)
    down = Neg(lr)
    move = Mul(down, update)
    moves = Reshape(move, rowwise)
    W_out = ScatterElements <axis: int = 0, reduction: string = "add"> (W, at, moves)
}}""")
"""W[ids·D + d] −= lr·update[:, d], added atomically."""

apply_flat_ordered: Final = Body(f"""
apply_flat (W, ids, update, lr) => (W_out) {{
    {_WIDTH}
    entries = Shape(W)
    {_wrapped("ids", "V = Div(entries, D)")}
    {_totals("own", "update")}
    row = Mul(index, D)
    places = Add(row, inside_row)
    at = Reshape(places, flat)
    old = Gather(W, at)
    move = Mul(lr, total)
    moves = Reshape(move, flat)
    new = Sub(old, moves)
    W_out = ScatterElements <axis: int = 0> (W, at, new)
}}""")
"""W[ids·D + d] −= lr·update[:, d] in one order; W is a table stored as [V·D]."""

input_factor_update_ordered: Final = Body(f"""
input_factor_update (A, ids, increments) => (A_out) {{
    {_ENTRIES_OF_A}
    {_totals("own", "increments", flat=True, wide=True)}
    old = Gather(A, s)
    new = Add(old, total)
    A_out = ScatterND(A, index, new)
}}""")
"""Ã[ids] += increments, repeated ids adding up in one order."""

input_factor_average_ordered: Final = Body(f"""
input_factor_average <decay>(A, ids, weights, lookups) => (A_out) {{
    {_ENTRIES_OF_A}
    {_totals("own", "weights", flat=True)}
    rho = Constant <value_float: float = @decay> ()
    unit = Constant <value_float: float = 1.0> ()
    fresh = Sub(unit, rho)
    empty = Mul(A, nothing)
    batch = ScatterND(empty, index, total)
    share = Div(batch, lookups)
    kept = Mul(rho, A)
    taken = Mul(fresh, share)
    averaged = Add(kept, taken)
    any = Greater(lookups, nothing)
    A_out = Where(any, averaged, A)
}}""")
"""Compute A' = decay·A + (1−decay)·Σ weights at ids / lookups in one order; A with no lookup."""

scatter_rows_ordered: Final = Body(f"""
scatter_rows <vocab_size>(ids, rows) => (grad) {{
    {_wrapped("ids", "V = Constant <value_int: int = @vocab_size> ()")}
    {_totals("own", "rows")}
    height = Reshape(V, flat)
    width = Shape <start: int = 1> (rows)
    size = Concat <axis: int = 0> (height, width)
    zeros = Expand(nothing, size)
    grad = ScatterND(zeros, index, total)
}}""")
"""[V, D] gradient of a table: the rows of each id summed in one order, zero elsewhere."""

sample_rows_device: Final = Body("""
sample_rows (total, size, turn) => (index) {
    origin = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    n = Min(size, total)
    past_total = Add(total, one)
    past_n = Add(n, one)
    total_there = Range(total, past_total, one)
    n_there = Range(n, past_n, one)
    total64 = Cast <to: int = 11> (total_there)
    n64 = Cast <to: int = 11> (n_there)
    j = Range(origin, n, one)
    alpha = Constant <value_int: int = 3242174889> ()
    beta = Constant <value_int: int = 2447445413> ()
    word = Constant <value_int: int = 4294967296> ()
    along = Mul(j, alpha)
    turned = Mul(turn, beta)
    both = Add(along, turned)
    mixed = Mod(both, word)
    mixed64 = Cast <to: int = 11> (mixed)
    word64 = Cast <to: int = 11> (word)
    u = Div(mixed64, word64)
    j64 = Cast <to: int = 11> (j)
    within = Add(j64, u)
    scaled = Mul(within, total64)
    place = Div(scaled, n64)
    place_id = Cast <to: int = 7> (place)
    last = Sub(total_there, one)
    index = Min(place_id, last)
}""")
"""The same rows as `sample_rows`; the sizes come to the device as the one number of a `Range`."""

take_now_device: Final = Body("""
take_now (wanted, now) => (number) {
    number = Identity(wanted)
}""")
"""All rows; those of a step that takes none in are counted as none by who takes them."""
