"""Cases of matrix products."""

from __future__ import annotations

from autodiff_cases import Case, floats

MATMUL = {
    "matrix": ((3, 4), (4, 5)),
    "batch_by_matrix": ((2, 3, 4), (4, 5)),
    "deep_batch_by_matrix": ((2, 2, 3, 4), (4, 5)),
    "matrix_by_batch": ((3, 4), (2, 4, 5)),
    "batch": ((2, 3, 4), (2, 4, 5)),
    "broadcast_left": ((1, 3, 4), (2, 4, 5)),
    "broadcast_right": ((2, 6, 3, 4), (6, 4, 5)),
    "broadcast_both": ((2, 1, 3, 4), (1, 6, 4, 5)),
    "dot": ((4,), (4,)),
    "vector_by_matrix": ((4,), (4, 5)),
    "matrix_by_vector": ((3, 4), (4,)),
    "vector_by_batch": ((4,), (2, 4, 5)),
    "batch_by_vector": ((2, 3, 4), (4,)),
    "deep_vector": ((4,), (3, 2, 4, 5)),
    "one_row": ((1, 4), (2, 4, 5)),
}
GEMM = {
    "plain": ("alpha: float = 1.0", (3, 4), (4, 5)),
    "b": ("transB: int = 1", (3, 4), (5, 4)),
    "a": ("transA: int = 1", (4, 3), (4, 5)),
    "ab": ("transA: int = 1, transB: int = 1", (4, 3), (5, 4)),
    "scaled": ("transA: int = 1, transB: int = 1, alpha: float = 0.5, beta: float = -2.0", (4, 3), (5, 4)),
}
BIASES = {"full": (3, 5), "row": (5,), "column": (3, 1), "one": (1,), "scalar": (), "row2": (1, 5)}


def gemm(
    name: str, attributes: str, a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...] | None
) -> Case:
    left = "x.T" if "transA" in attributes else "x"
    right = "y.T" if "transB" in attributes else "y"
    scales = (0.5, -2.0) if "beta" in attributes else (1.0, 1.0)
    inputs = {"x": floats(*a), "y": floats(*b)}
    if c is None:
        return Case(
            f"gemm_{name}", f"z = Gemm<{attributes}>(x, y)", f"{scales[0]} * {left} @ {right}", inputs
        )
    return Case(
        f"gemm_{name}",
        f"z = Gemm<{attributes}>(x, y, c)",
        f"{scales[0]} * {left} @ {right} + {scales[1]} * c",
        {**inputs, "c": floats(*c)},
    )


CASES = [
    *(
        Case(f"matmul_{name}", "z = MatMul(x, y)", "torch.matmul(x, y)", {"x": floats(*a), "y": floats(*b)})
        for name, (a, b) in MATMUL.items()
    ),
    *(gemm(name, attributes, a, b, (5,)) for name, (attributes, a, b) in GEMM.items()),
    *(gemm(f"{name}_no_c", attributes, a, b, None) for name, (attributes, a, b) in GEMM.items()),
    *(gemm(f"c_{name}", GEMM["scaled"][0], (4, 3), (5, 4), c) for name, c in BIASES.items()),
    *(
        Case(
            f"fused_matmul_{name}",
            f"z = com.microsoft.FusedMatMul<{attributes}>(x, y)",
            torch,
            {"x": floats(*a), "y": floats(*b)},
        )
        for name, attributes, torch, a, b in (
            ("plain", "alpha: float = 1.0", "x @ y", (3, 4), (4, 5)),
            ("a", "transA: int = 1, alpha: float = 0.5", "0.5 * x.mT @ y", (2, 4, 3), (2, 4, 5)),
            ("b", "transB: int = 1, alpha: float = 0.5", "0.5 * x @ y.mT", (2, 3, 4), (5, 4)),
            ("ab", "transA: int = 1, transB: int = 1", "x.mT @ y.mT", (4, 3), (2, 5, 4)),
        )
    ),
]
