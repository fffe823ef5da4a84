"""Cases of operators that select or place rows by ids."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, Draw, floats, integers


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


TABLE = floats(7, 3)
REPEATED = np.array([[0, 6, 6], [2, 2, 2]])
NEGATIVE = np.array([[-1, 6, -7], [2, -5, 2]])
GATHERS = {
    "rows": ("x[ids]", TABLE, REPEATED, 0),
    "int32": ("x[ids]", TABLE, REPEATED.astype(np.int32), 0),
    "negative": ("x[ids]", TABLE, NEGATIVE, 0),
    "one": ("x[4]", TABLE, np.array(4), 0),
    "vector": ("x[ids]", floats(7), REPEATED, 0),
    "columns": ("x[:, ids]", floats(3, 7), REPEATED, 1),
    "last": ("x[:, ids]", floats(3, 7), REPEATED, -1),
    "middle": ("x[:, ids]", floats(2, 7, 3), REPEATED, 1),
    "middle_negative": ("x[:, ids]", floats(2, 7, 3), NEGATIVE, -2),
    "middle_one": ("x[:, -1]", floats(2, 7, 3), np.array(-1), 1),
    "none": ("x[ids]", TABLE, np.zeros((2, 0), np.int64), 0),
}
CASES = [
    *(
        Case(f"gather_{name}", f"z = Gather<axis: int = {axis}>(x, ids)", torch, {"x": x, "ids": ids})
        for name, (torch, x, ids, axis) in GATHERS.items()
    ),
    Case("gather_constant_ids", "z = Gather(x, ids)", "x[ids]", {"x": TABLE}, {"ids": ints(1, 1, 5)}),
    Case("gather_elements", "z = GatherElements<axis: int = 1>(x, ids)", "x.gather(1, ids)",
         {"x": floats(3, 5), "ids": integers(3, 4, high=5)}),
    Case("gather_elements_rows", "z = GatherElements<axis: int = 0>(x, ids)", "x.gather(0, ids % 5)",
         {"x": floats(5, 2), "ids": integers(4, 2, high=5, low=-5)}),
    Case("gather_elements_last", "z = GatherElements<axis: int = -1>(x, ids)", "x.gather(2, ids)",
         {"x": floats(2, 3, 5), "ids": integers(2, 3, 1, high=5)}),
    Case("gather_nd_rows", "z = GatherND(x, ids)", "x[ids[..., 0]]", {"x": TABLE, "ids": REPEATED[..., None]}, static=("ids",)),
    Case("gather_nd_full", "z = GatherND(x, ids)", "x[ids[..., 0], ids[..., 1]]",
         {"x": floats(4, 3), "ids": integers(5, 2, high=3, low=-3)}, static=("ids",)),
    Case("gather_nd_pairs", "z = GatherND(x, ids)", "x[ids[..., 0], ids[..., 1]]",
         {"x": floats(4, 3, 2), "ids": integers(2, 5, 2, high=3, low=-3)}, static=("ids",)),
    Case("gather_nd_batch", "z = GatherND<batch_dims: int = 1>(x, ids)", "torch.stack([x[i, ids[i, :, 0]] for i in range(2)])",
         {"x": floats(2, 5, 3), "ids": integers(2, 4, 1, high=5, low=-5)}, static=("ids",)),
    Case("gather_nd_batch_full", "z = GatherND<batch_dims: int = 1>(x, ids)",
         "torch.stack([x[i, ids[i, 0], ids[i, 1]] for i in range(3)])",
         {"x": floats(3, 4, 5), "ids": integers(3, 2, high=4)}, static=("ids",)),
    Case("gather_nd_batch_two", "z = GatherND<batch_dims: int = 2>(x, ids)",
         "torch.stack([torch.stack([x[i, j, ids[i, j, :, 0]] for j in range(3)]) for i in range(2)])",
         {"x": floats(2, 3, 5, 2), "ids": integers(2, 3, 4, 1, high=5, dtype="int64")}, static=("ids",)),
    Case("scatter_elements", "z = ScatterElements<axis: int = 1>(x, ids, u)", "x.scatter(1, ids, u)",
         {"x": floats(3, 5), "u": floats(3, 2)}, {"ids": np.array([[0, 3], [4, 1], [2, 0]])}),
    Case("scatter_elements_add", 'z = ScatterElements<axis: int = 0, reduction: string = "add">(x, ids, u)',
         "x.scatter_add(0, ids, u)", {"x": floats(5, 2), "u": floats(6, 2), "ids": integers(6, 2, high=5)}),
    Case("scatter_nd", "z = ScatterND(x, ids, u)", "x.index_put((ids[..., 0],), u)", {"x": TABLE, "u": floats(2, 3)},
         {"ids": np.array([[5], [1]])}),
    Case("scatter_nd_add", 'z = ScatterND<reduction: string = "add">(x, ids, u)',
         "x.index_put((ids[..., 0],), u, accumulate=True)", {"x": TABLE, "u": floats(4, 3)}, {"ids": np.array([[5], [1], [5], [-1]])}),
    Case("one_hot", "z = OneHot<axis: int = -1>(ids, d, v)", "torch.where(F.one_hot(ids, 5).bool(), v[1], v[0])",
         {"ids": integers(3, 2, high=5), "v": floats(2)}, {"d": np.array(5, np.int64)}),
    Case("compress", "z = Compress<axis: int = 1>(x, c)", "x[:, c]", {"x": floats(2, 4), "c": np.array([True, False, True, True])}),
    Case("compress_flat", "z = Compress(x, c)", "x.reshape(-1)[:4][c]", {"x": floats(2, 4), "c": np.array([True, False, True, True])}),
    Case("tied", "h = Gather(x, ids) t = Transpose(x) p = MatMul(h, t) z = Mul(p, p)", "(x[ids] @ x.T) ** 2",
         {"x": TABLE, "ids": REPEATED}),
    Case("two_lookups", "a = Gather(x, ids) b = Gather(x, others) z = Mul(a, b)", "x[ids] * x[others]",
         {"x": TABLE, "ids": REPEATED, "others": Draw((2, 3), "int32", high=7)}),
    Case("lookup_of_view", "t = Transpose(x) h = Gather<axis: int = 0>(t, ids) z = Mul(h, h)", "x.T[ids] ** 2",
         {"x": floats(3, 7), "ids": REPEATED}),
]  # fmt: skip
