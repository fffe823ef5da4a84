"""The rates of a GPU, for the floor of the work that `half` adds (`roofline`).

Measured by ONNX Runtime on the GPU itself, without the time that starting a run takes: a session of K equal
operators and one of a single operator take turns, and an operator's time is the difference of their medians
over K − 1. Products are measured at the very shapes. Reading or adding to N numbers anywhere in a table moves
whole sectors of 32 bytes at the rate of a copy that is larger than the cache:

    gather   N · max(32, 4D) bytes to read, N · 4D to write
    add      N · max(32, 4D) bytes to read and to write
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx
    import onnxruntime as ort

    from kfac_onnx.bench.place import Place
    from kfac_onnx.runtime.step.tensors import Device

__all__ = ["GpuRates"]

_CHAIN: Final = 32
_REPEATS: Final = 20
_LARGE: Final = 64_000_000
"""Floats of a copy that no cache holds."""
_SECTOR: Final = 32


class GpuRates:
    """Measured rates of one GPU, each measured once."""

    def __init__(self, place: Place) -> None:
        from kfac_onnx.device.providers import provider_list
        from kfac_onnx.runtime.step.tensors import device_of

        self._providers = provider_list(place.providers)
        self._device: Device = device_of(self._providers)
        self._known: dict[tuple[object, ...], float] = {}

    def forget_tables(self) -> None:
        """Free what is kept for measuring; nothing is."""

    def _once(self, key: tuple[object, ...], measured: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measured()
        return self._known[key]

    def gather_ms(self, V: int, N: int, D: int) -> float:
        """Return milliseconds to read N random rows of D floats out of V."""
        return (max(_SECTOR, 4 * D) + 4 * D) * N * self._byte_ms()

    def scatter_ms(self, V: int, N: int, D: int) -> float:
        """Return milliseconds to change N random rows of D floats out of V."""
        return 2 * max(_SECTOR, 4 * D) * N * self._byte_ms()

    def _byte_ms(self) -> float:
        return self.copy_ms(_LARGE) / (8 * _LARGE)

    def gram_ms(self, N: int, D: int) -> float:
        """Return milliseconds of gᵀ[D,N] · g[N,D]."""
        return self._once(("gram", N, D), lambda: self._operator("gram", (N, D), (D, D)))

    def product_ms(self, N: int, D: int) -> float:
        """Return milliseconds of g[N,D] · root[D,D]."""
        return self._once(("product", N, D), lambda: self._operator("product", (N, D), (N, D)))

    def copy_ms(self, floats: int) -> float:
        """Return milliseconds to read that many floats and write as many."""
        return self._once(("copy", floats), lambda: self._operator("copy", (floats,), (floats,)))

    def _operator(self, kind: str, given: tuple[int, ...], made: tuple[int, ...]) -> float:
        one, many = (self._run(_chain(kind, count, given, made), given) for count in (1, _CHAIN))
        short, long = _medians(one, many)
        return max(long - short, 0.0) / (_CHAIN - 1)

    def _run(self, model: onnx.ModelProto, given: tuple[int, ...]) -> Callable[[], None]:
        """Return a function that runs the model on the GPU and waits for its end."""
        import onnx

        from kfac_onnx.runtime.step.tensors import Buffer, open_session

        element = int(onnx.TensorProto.FLOAT)
        session = open_session(model, self._providers, threads=1)
        binding = session.io_binding()
        held: list[Buffer] = []
        for item in session.get_inputs():
            shape = tuple(int(str(size)) for size in item.shape)
            array = np.eye(*shape, dtype=np.float32) if shape != given else np.full(shape, 0.5, np.float32)
            held.append(Buffer(array, element, self._device))
            binding.bind_ortvalue_input(item.name, held[-1].value)
        for item in session.get_outputs():
            shape = tuple(int(str(size)) for size in item.shape)
            held.append(Buffer(np.zeros(shape, np.float32), element, self._device))
            binding.bind_ortvalue_output(item.name, held[-1].value)
        return _runner(session, binding, held)


def _runner(session: ort.InferenceSession, binding: ort.IOBinding, held: list[Any]) -> Callable[[], None]:
    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run.__dict__["held"] = held  # what is bound lives as long as the function
    return run


def _chain(kind: str, count: int, given: tuple[int, ...], made: tuple[int, ...]) -> onnx.ModelProto:
    """Return a model of `count` operators: one after the other, or side by side where they cannot follow."""
    import onnx

    value, node, element = (
        onnx.helper.make_tensor_value_info, onnx.helper.make_node, onnx.TensorProto.FLOAT
    )  # fmt: skip
    names = [f"x{n}" for n in range(count + 1)]
    match kind:
        case "copy":
            nodes = [node("Neg", [names[n]], [names[n + 1]]) for n in range(count)]
            inputs, outputs = names[:1], names[-1:]
        case "product":
            nodes = [node("MatMul", [names[n], "root"], [names[n + 1]]) for n in range(count)]
            inputs, outputs = names[:1], names[-1:]
        case _:
            nodes = [node("Gemm", [names[n], names[n]], [f"y{n}"], transA=1) for n in range(count)]
            inputs, outputs = names[:count], [f"y{n}" for n in range(count)]
    fed = [value(name, element, given) for name in inputs]
    if kind == "product":
        fed.append(value("root", element, (given[1], given[1])))
    graph = onnx.helper.make_graph(nodes, "rate", fed, [value(name, element, made) for name in outputs])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def _medians(*kinds: Callable[[], None]) -> Sequence[float]:
    """Return each function's median of milliseconds; they take turns."""
    times: list[list[float]] = [[] for _ in kinds]
    for repeat in range(3 + _REPEATS):
        for own, kind in zip(times, kinds, strict=True):
            start = time.perf_counter()
            kind()
            if repeat >= 3:
                own.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(own)) for own in times]
