"""The least time that the work added by preset `half` can take on this machine.

For each table with N lookups of width D the block adds, counted once each:

    gather a      read N of V counts at the looked-up rows
    count         read and write N of V counts
    gᵀg           2·N·D² operations
    rows · root   2·N·D² operations
    row scaling   read and write N·D floats
    finite check  read N·D floats

Random access and matrix products are measured at these very shapes, copies at N·D floats; each rate is
the best of what NumPy and ONNX Runtime reach. The root itself (each tenth step) is in no median step, and
is not counted.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from kfac_onnx.bench.results import Roofline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.bench.results import Timing
    from kfac_onnx.bench.workloads import Case

__all__ = ["Machine", "Rates", "achieved", "floor_of"]

_REPEATS: Final = 15
_ID_SETS: Final = 8
"""Different ids in turn, so that rows are not always in the cache."""


class Rates(Protocol):
    """How long pieces of work take on a machine, in milliseconds; the methods of `Machine`."""

    def gather_ms(self, V: int, N: int, D: int) -> float:
        """N random rows of D floats out of V, read."""
        ...

    def scatter_ms(self, V: int, N: int, D: int) -> float:
        """N random rows of D floats out of V, written."""
        ...

    def gram_ms(self, N: int, D: int) -> float:
        """gᵀ[D,N] · g[N,D]."""
        ...

    def product_ms(self, N: int, D: int) -> float:
        """g[N,D] · root[D,D]."""
        ...

    def copy_ms(self, floats: int) -> float:
        """So many floats from one place to another."""
        ...

    def forget_tables(self) -> None:
        """Free the tables that rows are read from."""
        ...


def floor_of(case: Case, machine: Rates) -> Roofline:
    """Return the floor for the work that `half` adds to the SGD step of a case."""
    parts: dict[str, float] = dict.fromkeys(
        ("gather a", "count", "gᵀg", "rows · root", "row scaling", "finite check"), 0.0
    )
    rates: dict[str, float] = {}
    for name, (V, D) in case.tables.items():
        N = case.lookups[name]
        gather, scatter = machine.gather_ms(V, N, 1), machine.scatter_ms(V, N, 1)
        gram, product = machine.gram_ms(N, D), machine.product_ms(N, D)
        per_byte = machine.copy_ms(N * D) / (8 * N * D)
        parts["gather a"] += gather
        parts["count"] += scatter
        parts["gᵀg"] += gram
        parts["rows · root"] += product
        parts["row scaling"] += 8 * N * D * per_byte
        parts["finite check"] += 4 * N * D * per_byte
        rates[f"counts of {V:,}: gather, M/s"] = N / gather / 1e3
        rates[f"counts of {V:,}: add, M/s"] = N / scatter / 1e3
        rates[f"[{D},{N}]·[{N},{D}], GFLOP/s"] = 2 * N * D**2 / gram / 1e6
        rates[f"[{N},{D}]·[{D},{D}], GFLOP/s"] = 2 * N * D**2 / product / 1e6
        rates[f"copy of {N * D:,} floats, GB/s"] = 1e-6 / per_byte
        rates[f"rows of {D} of {V:,}: gather, GB/s"] = 8e-6 * N * D / machine.gather_ms(V, N, D)
        rates[f"rows of {D} of {V:,}: write, GB/s"] = 8e-6 * N * D / machine.scatter_ms(V, N, D)
    rates["copy of 64 MB, GB/s"] = 128e6 / machine.copy_ms(16_000_000) / 1e6
    return Roofline(parts=parts, rates=rates, floor_ms=sum(parts.values()))


def achieved(floor: Roofline, half: Timing | None, sgd: Timing | None) -> Roofline:
    """Return the floor with the time that was added, and the share of it that the floor is."""
    if half is None or sgd is None or half.ms is None or half.ratio_sgd is None:
        return floor
    added = half.ms - half.ms / half.ratio_sgd
    return replace(floor, added_ms=added, share=floor.floor_ms / added if added > 0 else None)


def _best(*kinds: Callable[[int], object]) -> float:
    """Return the milliseconds of the fastest kind, each at its median; they get the number of the repeat."""
    medians: list[float] = []
    for kind in kinds:
        times: list[float] = []
        for repeat in range(3 + _REPEATS):
            start = time.perf_counter()
            kind(repeat)
            times.append(time.perf_counter() - start)
        medians.append(1e3 * float(np.median(times[3:])))
    return min(medians)


class Machine:
    """Measured rates of this machine, each measured once; `threads` as in the arms (None: all cores)."""

    def __init__(self, threads: int | None) -> None:
        import os

        self._threads = threads or os.cpu_count() or 1
        self._known: dict[tuple[object, ...], float] = {}
        self._tables: dict[tuple[int, int], np.ndarray] = {}

    def _once(self, key: tuple[object, ...], measured: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measured()
        return self._known[key]

    def forget_tables(self) -> None:
        """Free the tables that rows are read from."""
        self._tables.clear()

    def _ids(self, V: int, N: int) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        return [random.integers(0, V, N) for _ in range(_ID_SETS)]

    def _table(self, V: int, D: int) -> np.ndarray:
        if (V, D) not in self._tables:
            table = np.empty((V, D), np.float32)
            table[...] = 1.0  # every page is there before it is timed
            self._tables = {(V, D): table}
        return self._tables[V, D]

    def gather_ms(self, V: int, N: int, D: int) -> float:
        """Return milliseconds to read N random rows of D floats out of V."""

        def measured() -> float:
            table, ids = self._table(V, D), self._ids(V, N)
            out = np.empty((N, D), np.float32)
            feeds = [{"data": table, "ids": each} for each in ids]
            runs = _bound("Gather", ("data", "ids"), feeds, out, self._threads)
            return _best(
                lambda k: np.take(table, ids[k % _ID_SETS], 0, out, "clip"), lambda k: runs[k % _ID_SETS]()
            )

        return self._once(("gather", V, N, D), measured)

    def scatter_ms(self, V: int, N: int, D: int) -> float:
        """Return milliseconds to write N random rows of D floats into V (D = 1: to add to them)."""

        def measured() -> float:
            table, ids = self._table(V, D), self._ids(V, N)
            rows = np.ones((N, D), np.float32)
            feeds = [{"data": table, "ids": each[:, None], "rows": rows} for each in ids]
            added = {"reduction": "add"} if D == 1 else {}
            runs = _bound("ScatterND", ("data", "ids", "rows"), feeds, table, 1, **added)

            def by_numpy(k: int) -> None:
                if D == 1:
                    np.add.at(table[:, 0], ids[k % _ID_SETS], rows[:, 0])
                else:
                    table[ids[k % _ID_SETS]] = rows

            return _best(by_numpy, lambda k: runs[k % _ID_SETS]())

        return self._once(("scatter", V, N, D), measured)

    def gram_ms(self, N: int, D: int) -> float:
        """Return milliseconds of gᵀ[D,N] · g[N,D]."""
        return self._once(("gram", N, D), lambda: self._gemm((N, D), (N, D), transposed=True))

    def product_ms(self, N: int, D: int) -> float:
        """Return milliseconds of g[N,D] · root[D,D]."""
        return self._once(("product", N, D), lambda: self._gemm((N, D), (D, D), transposed=False))

    def _gemm(self, left: tuple[int, int], right: tuple[int, int], *, transposed: bool) -> float:
        random = np.random.default_rng(0)
        a = random.standard_normal(left, dtype=np.float32)
        b = random.standard_normal(right, dtype=np.float32)
        out = np.empty((left[1] if transposed else left[0], right[1]), np.float32)
        run = _bound("Gemm", ("a", "b"), [{"a": a, "b": b}], out, self._threads, transA=int(transposed))[0]
        kinds: list[Callable[[int], object]] = [lambda _: run()]
        if self._threads == len(_cores()):  # NumPy takes all of them
            kinds.append(lambda _: np.matmul(a.T if transposed else a, b, out=out))
        return _best(*kinds)

    def copy_ms(self, floats: int) -> float:
        """Return milliseconds to copy that many floats from one place to another."""

        def measured() -> float:
            source, target = np.ones(floats, np.float32), np.empty(floats, np.float32)
            pieces = list(
                zip(
                    np.array_split(source, self._threads),
                    np.array_split(target, self._threads),
                    strict=True,
                )
            )
            with ThreadPoolExecutor(self._threads) as pool:

                def one(pair: tuple[np.ndarray, np.ndarray]) -> None:
                    np.copyto(pair[1], pair[0])

                def together(_: int) -> None:
                    list(pool.map(one, pieces))

                return _best(lambda _: np.copyto(target, source), together)

        return self._once(("copy", floats), measured)


def _cores() -> Sequence[int]:
    import os

    return range(os.cpu_count() or 1)


def _bound(
    operator: str,
    names: tuple[str, ...],
    feeds: Sequence[dict[str, np.ndarray]],
    out: np.ndarray,
    threads: int,
    **attributes: Any,
) -> list[Callable[[], object]]:
    """Return one function for each set of inputs that runs a model of one operator into `out`."""
    import onnx
    import onnxruntime as ort

    value, element = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, list(names), ["out"], **attributes)],
        "rate",
        [value(name, element(feeds[0][name].dtype), feeds[0][name].shape) for name in names],
        [value("out", element(out.dtype), out.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    runs: list[Callable[[], object]] = []
    for feed in feeds:
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        # `out` may be an input too: the operator then works in place.
        same = next((name for name, array in feed.items() if array is out), None)
        target = ort.OrtValue.ortvalue_from_numpy(feed[same] if same else out)
        binding.bind_ortvalue_output("out", target)
        runs.append(partial(session.run_with_iobinding, binding))
    return runs
