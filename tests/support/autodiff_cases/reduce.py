"""Cases of reductions, cumulative sums and sorting."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, floats, positive

X = {"x": floats(2, 3, 4)}
POSITIVE = {"x": positive(2, 3, 4)}

REDUCTIONS = {
    "ReduceSum": "torch.sum(x, {axes}, keepdim={keep})",
    "ReduceMean": "torch.mean(x, {axes}, keepdim={keep})",
    "ReduceMax": "torch.amax(x, {axes}, keepdim={keep})",
    "ReduceMin": "torch.amin(x, {axes}, keepdim={keep})",
    "ReduceL1": "torch.sum(torch.abs(x), {axes}, keepdim={keep})",
    "ReduceL2": "torch.linalg.vector_norm(x, 2, {axes}, keepdim={keep})",
    "ReduceSumSquare": "torch.sum(x * x, {axes}, keepdim={keep})",
    "ReduceLogSum": "torch.log(torch.sum(x, {axes}, keepdim={keep}))",
    "ReduceLogSumExp": "torch.logsumexp(x, {axes}, keepdim={keep})",
    "ReduceProd": "R.product(x, {axes}, {keep})",
}
AXES = {"last": (2,), "from_the_end": (-2,), "two": (0, 2), "every": (0, 1, 2), "unsorted": (-1, 0)}


def axes_case(op: str, call: str, name: str, axes: tuple[int, ...], keep: int) -> Case:
    return Case(
        f"{op.lower()}_{name}_{'kept' if keep else 'dropped'}",
        f"z = {op}<keepdims = {keep}>(x, axes)",
        call.format(axes=axes, keep=bool(keep)),
        POSITIVE if op == "ReduceLogSum" else X,
        {"axes": np.array(axes, np.int64)},
    )


TIES = {"x": np.array([[1, 3, 3, 0], [-2, -2, -2, -2], [5, 4, 4, 5]], np.float32)}
ZEROS = {"x": np.array([[2, 0, 3, 4], [0, 5, 0, 6], [1, -2, 3, 0.5]], np.float32)}
LAST = {"axes": np.array([-1], np.int64)}

CASES = [
    *(
        axes_case(op, call, name, axes, keep)
        for op, call in REDUCTIONS.items()
        for name, axes in AXES.items()
        for keep in (0, 1)
    ),
    *(
        Case(
            f"{op.lower()}_all_{'kept' if keep else 'dropped'}",
            f"z = {op}<keepdims = {keep}>(x)",
            call.format(axes=(0, 1, 2), keep=bool(keep)),
            POSITIVE if op == "ReduceLogSum" else X,
        )
        for op, call in REDUCTIONS.items()
        for keep in (0, 1)
    ),
    *(
        Case(
            f"{op.lower()}_axes_at_run_time_{'kept' if keep else 'dropped'}",
            f"z = {op}<keepdims = {keep}>(x, axes)",
            call.format(axes=(0, 2), keep=bool(keep)),
            {**(POSITIVE if op == "ReduceLogSum" else X), "axes": np.array([0, -1], np.int64)},
            static=("axes",),
        )
        for op, call in REDUCTIONS.items()
        for keep in (0, 1)
    ),
    *(
        Case(f"{op.lower()}_no_axes", f"z = {op}<noop_with_empty_axes = 1>(x)", "x * 1", X)
        for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")
    ),
    Case(
        "reducesum_empty_axes_at_run_time",
        "z = ReduceSum<noop_with_empty_axes = 1>(x, axes)",
        "x * 1",
        {**X, "axes": np.zeros(0, np.int64)},
        static=("axes",),
    ),
    Case(
        "reducesum_empty_axes_that_mean_all",
        "z = ReduceSum<keepdims = 0>(x, axes)",
        "torch.sum(x)",
        X,
        {"axes": np.zeros(0, np.int64)},
    ),
    Case("max_ties", "z = ReduceMax(x, axes)", "torch.amax(x, -1, keepdim=True)", TIES, LAST),
    Case("min_ties", "z = ReduceMin<keepdims = 0>(x, axes)", "torch.amin(x, -1)", TIES, LAST),
    Case("max_of_all_ties", "z = ReduceMax<keepdims = 0>(x)", "torch.amax(x)", TIES),
    Case("product_with_zeros", "z = ReduceProd(x, axes)", "torch.prod(x, -1, keepdim=True)", ZEROS, LAST),
    Case(
        "product_of_all_with_one_zero",
        "z = ReduceProd<keepdims = 0>(x)",
        "torch.prod(x)",
        {"x": ZEROS["x"][0]},
    ),
    Case("l1_zeros", "z = ReduceL1(x, axes)", "torch.sum(torch.abs(x), -1, keepdim=True)", ZEROS, LAST),
    Case(
        "l2_of_zeros",
        "z = ReduceL2(x, axes)",
        "torch.linalg.vector_norm(x, 2, -1, keepdim=True)",
        {"x": np.array([[0, 0, 0], [3, 0, 4]], np.float32)},
        LAST,
    ),
    Case(
        "log_sum_exp_far",
        "z = ReduceLogSumExp(x, axes)",
        "torch.logsumexp(x, -1, keepdim=True)",
        {"x": np.array([[500, 499, -500], [-1000, -1001, -1000]], np.float32)},
        LAST,
    ),
    *(
        Case(
            f"cum_sum_{name}",
            f"z = CumSum<exclusive = {exclusive}, reverse = {reverse}>(x, axis)",
            call,
            X,
            {"axis": np.array(axis, np.int64)},
        )
        for name, exclusive, reverse, axis, call in (
            ("plain", 0, 0, 1, "torch.cumsum(x, 1)"),
            ("reverse", 0, 1, -1, "torch.flip(torch.cumsum(torch.flip(x, [-1]), -1), [-1])"),
            ("exclusive", 1, 0, 0, "torch.cumsum(x, 0) - x"),
            ("both", 1, 1, 2, "torch.flip(torch.cumsum(torch.flip(x, [2]), 2), [2]) - x"),
        )
    ),
    Case(
        "top_k",
        "z, i = TopK(x, k)",
        "torch.topk(x, 2)",
        X,
        {"k": np.array([2], np.int64)},
        outputs=("z", "i"),
    ),
    Case(
        "top_k_smallest",
        "z, i = TopK<axis = 1, largest = 0>(x, k)",
        "torch.topk(x, 2, 1, largest=False)[0]",
        X,
        {"k": np.array([2], np.int64)},
    ),
    Case(
        "sorted",
        "z, i = TopK<axis = 0>(x, k)",
        "torch.sort(x, 0, descending=True)[0]",
        {"x": floats(5, 2), "k": np.array([5], np.int64)},
        static=("x", "k"),
    ),
    Case(
        "arg_max_passes_nothing",
        "i = ArgMax<axis = 1>(x) f = Cast<to = 1>(i) z = Mul(x, f)",
        "x * torch.argmax(x, 1, keepdim=True)",
        X,
    ),
]
