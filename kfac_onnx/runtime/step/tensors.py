"""Tensors on a device: dtypes, buffers that are bound once, and copies in and out.

On the CPU a buffer is a NumPy array that ONNX Runtime uses as it stands (no copy is made either way). On a
CUDA device it is memory of that device, written and read by one copy each, without a second buffer there.
bfloat16 has no NumPy dtype that ONNX Runtime understands, so its bits travel as uint16 and come out as
`ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.device.providers import require_providers
from kfac_onnx.disk.stored import StoredArray
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.disk.stored import Array

__all__ = [
    "Buffer",
    "Device",
    "aligned",
    "device_of",
    "dtype_name",
    "element_type",
    "host_value",
    "new_value",
    "numpy_dtype",
    "open_session",
    "read_value",
    "same_bits",
    "session_maker",
    "write_value",
]

session_maker: Final[ContextVar[Callable[..., ort.InferenceSession]]] = ContextVar(
    "session_maker", default=ort.InferenceSession
)
"""What makes every session, called as `onnxruntime.InferenceSession` is; a profiler sets its own."""
CACHE_LINE: Final = 64
"""Bytes; of the processors that this runs on."""
BFLOAT16: Final = int(onnx.TensorProto.BFLOAT16)
_DEVICE_OF: Final = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "ROCMExecutionProvider": "cuda",
    "MIGraphXExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "CANNExecutionProvider": "cann",
}
_COPIED_WHOLE: Final = ("cpu", "cuda")
"""Devices of which `OrtValue.numpy` and `update_inplace` copy any dtype that NumPy has."""
_ORT_TYPES: Final = {
    "float": onnx.TensorProto.FLOAT,
    "double": onnx.TensorProto.DOUBLE,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "bool": onnx.TensorProto.BOOL,
    **{
        f"{sign}int{bits}": getattr(onnx.TensorProto, f"{sign}int{bits}".upper())
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Device:
    """Where buffers live, such as `("cpu", 0)` or `("cuda", 1)`."""

    name: str
    index: int

    @property
    def is_cpu(self) -> bool:
        """Whether NumPy arrays can be the buffers themselves."""
        return self.name == "cpu"


def device_of(providers: Providers) -> Device:
    """Return the device of the first provider."""
    first = providers[0]
    name, options = (first, {}) if isinstance(first, str) else first
    return Device(_DEVICE_OF.get(name, "cpu"), int(options.get("device_id", "0")))


def element_type(text: str) -> int:
    """Return the ONNX element type of `float32`, `FLOAT` or `tensor(float)`.

    Raises UserError for anything else.
    """
    inner = text.removeprefix("tensor(").removesuffix(")")
    if text.startswith("tensor(") and inner in _ORT_TYPES:
        return int(_ORT_TYPES[inner])
    plain = {"float32": "FLOAT", "float64": "DOUBLE"}.get(text, text.upper())
    if plain in ir.DataType.__members__:
        return int(ir.DataType[plain])
    raise UserError(f"'{text}' is not a tensor type this runtime can hold")


@cache
def numpy_dtype(element: int) -> np.dtype[np.generic]:
    """Return the NumPy dtype in which the user sees an ONNX element type (bfloat16 by `ml_dtypes`)."""
    return (
        np.dtype(ml_dtypes.bfloat16) if element == BFLOAT16 else onnx.helper.tensor_dtype_to_np_dtype(element)
    )


def dtype_name(element: int) -> str:
    """Return the name users know, such as `float32` or `bfloat16`."""
    return str(numpy_dtype(element))


def _stored(array: np.ndarray, element: int) -> np.ndarray:
    """Return the array as ONNX Runtime takes it: contiguous, bfloat16 as uint16 bits."""
    flat = np.ascontiguousarray(array).reshape(array.shape)
    return flat.view(np.uint16) if element == BFLOAT16 and flat.dtype != np.uint16 else flat


def _wrap(stored: np.ndarray, element: int) -> ort.OrtValue:
    if element == BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, element)
    return ort.OrtValue.ortvalue_from_numpy(stored)


def host_value(array: np.ndarray, element: int) -> ort.OrtValue:
    """Return a CPU value that uses the array's memory where it is contiguous (keep the array alive)."""
    return _wrap(_stored(array, element), element)


def aligned(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
    """Return an array, not filled, that begins with a cache line: NumPy's own begin 16 bytes into one.

    A row of 64 floats then lies in four lines instead of five.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


class Buffer:
    """A tensor of fixed shape and dtype on a device, bound as input or output of sessions.

    `array` is the buffer's memory on the CPU (the user's dtype), None on other devices. `check` looks at the
    initial contents on the host, before they go to a device.
    """

    def __init__(
        self,
        initial: Array,
        element: int,
        device: Device,
        check: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        own = aligned(tuple(initial.shape), numpy_dtype(element))
        if isinstance(initial, StoredArray):
            initial.read_into(own)
        else:
            own[...] = initial
        if check is not None:
            check(own)
        self.element = element
        self.shape = tuple(own.shape)
        self.array: np.ndarray | None = own if device.is_cpu else None
        if device.is_cpu:
            self.value = host_value(own, element)
        else:
            self.value = new_value(self.shape, element, device)
            self.write(own)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.element).itemsize

    def read(self) -> np.ndarray:
        """Return a copy of the contents."""
        if self.array is not None:
            return self.array.copy()
        return read_value(self.value, self.element)

    def view(self) -> np.ndarray:
        """Return the contents: the buffer's own memory on the CPU, a copy elsewhere."""
        return self.read() if self.array is None else self.array

    def write(self, contents: Array) -> None:
        """Replace the contents; the shape and, for an array in a file, the dtype are the buffer's."""
        if isinstance(contents, StoredArray) and self.array is not None:
            contents.read_into(self.array)
            return
        own = np.asarray(contents, numpy_dtype(self.element)).reshape(self.shape)
        if self.array is not None:
            self.array[...] = own
        else:
            write_value(self.value, own, self.element)


def new_value(shape: Sequence[int], element: int, device: Device) -> ort.OrtValue:
    """Return memory on a device; what is in it is whatever was there.

    Raises UserError where the device has no room for it.
    """
    try:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element, device.name, device.index)
    except Exception as e:
        if not from_onnxruntime(e):
            raise
        size = math.prod(shape) * numpy_dtype(element).itemsize
        raise UserError(
            f"device {device.name}:{device.index} has no room for {size / 1e9:.2f} GB: {first_line(e)}",
            help="give other programs' memory free, or train a smaller table",
        ) from e


def read_value(value: ort.OrtValue, element: int) -> np.ndarray:
    """Return a copy of a value, wherever it is."""
    if element != BFLOAT16 and value.device_name() in _COPIED_WHOLE:
        return np.array(value.numpy())
    result = np.empty(tuple(value.shape()), numpy_dtype(element))
    _transfer(value, host_value(result, element), element)
    return result


def write_value(value: ort.OrtValue, array: np.ndarray, element: int) -> None:
    """Copy an array of the value's shape and dtype into it, wherever it is; done when it returns."""
    if array.size == 0:
        return
    if value.device_name() in _COPIED_WHOLE:
        # The bits are copied as they are: one copy over the bus, and the call waits for its end.
        value.update_inplace(_stored(array, element))
    else:
        _transfer(host_value(array, element), value, element)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays have the same shape, dtype and bits (NaN equals itself)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


@cache
def _copier(element: int, device: str) -> ort.InferenceSession:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["from"], ["to"])],
        "copy",
        [value("from", element, None)],
        [value("to", element, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    available = ort.get_available_providers()
    wanted = [name for name, place in _DEVICE_OF.items() if place == device and name in available]
    return open_session(model, [*wanted[:1], "CPUExecutionProvider"], threads=1)


def _transfer(source: ort.OrtValue, target: ort.OrtValue, element: int) -> None:
    """Copy between the host and a device, for every dtype."""
    device = next((v.device_name() for v in (source, target) if v.device_name() != "cpu"), "cpu")
    session = _copier(element, device)
    binding = session.io_binding()
    binding.bind_ortvalue_input("from", source)
    binding.bind_ortvalue_output("to", target)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


@cache
def _spinning() -> dict[str, str]:
    """Return how long a thread without work looks for some before it sleeps: 100 µs, never after a run.

    Each session has its own threads, and spinning ones take the cores from the session that runs next; with
    no end to it, a step took five times longer where others compute too. From operator to operator it pays:
    a tenth of a step and more (benchmarks/session_options). Before onnxruntime 1.26 the time cannot be set,
    and they do not spin.
    """
    major, minor = (int(part) for part in ort.__version__.split(".")[:2])
    if (major, minor) < (1, 26):
        return {"session.intra_op.allow_spinning": "0"}
    return {
        "session.intra_op.allow_spinning": "1",
        "session.intra_op.spin_duration_us": "100",
        "session.force_spinning_stop": "1",
    }


def open_session(
    model: onnx.ModelProto,
    providers: Providers,
    *,
    threads: int,
) -> ort.InferenceSession:
    """Open a session; `threads` = 0 takes all cores.

    Its own error lines are switched off: a failing run raises, and the caller says it in a sentence.
    Raises UserError where ONNX Runtime refuses the model, or the session came without one of the providers.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    for name, value in _spinning().items():
        options.add_session_config_entry(name, value)
    try:
        session = session_maker.get()(
            model.SerializeToString(),
            options,
            providers=list(providers),
            enable_fallback=0,  # what a provider cannot do is an error, not work for another one
            # It removes Dropout in training mode too, where nothing reads the mask (seen in 1.32).
            disabled_optimizers=["EliminateDropout"],
        )
    except Exception as e:
        if not from_onnxruntime(e):
            raise
        raise UserError(f"onnxruntime cannot open the model: {first_line(e)}") from e
    require_providers(session, providers)
    return session
