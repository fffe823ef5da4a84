"""What a batch must look like, checked before anything runs.

A batch is a mapping from input name to array. The dtype must be the graph's own, except that a narrower
integer is widened; nothing else is converted, because a silent cast hides mistakes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.data.objects import host_value as host_array
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.runtime.step.tensors import BFLOAT16, dtype_name, host_value, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnxruntime as ort

__all__ = ["BatchInput", "as_inputs", "checked_batch", "examples_in", "rows_in"]


@dataclass(frozen=True)
class BatchInput:
    """A batch input: its ONNX element type and dimensions (a number, a shared name, or None).

    With `keys` it takes strings as well: the i-th key is i, any other string is their count.
    """

    name: str
    element: int
    dims: tuple[int | str | None, ...] | None
    keys: tuple[str, ...] = ()


def checked_batch(
    batch: Mapping[str, np.ndarray], inputs: Sequence[BatchInput], *, allowed: Sequence[str] = ()
) -> dict[str, np.ndarray | ort.OrtValue]:
    """Return the batch as ONNX Runtime takes it; names in `allowed` may be there and are left out.

    Raises UserError for a missing or unknown name, another dtype, rank or size, and where two inputs
    disagree about a dimension that the graph gives one name.
    """
    known = [item.name for item in inputs]
    if not isinstance(batch, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  it comes from the user
        message = f"a batch is a dict of arrays by input name, not of type {type(batch).__name__}"
        raise UserError(message, help=_line_for(batch, known))
    for name in batch:
        if name not in known and name not in allowed:
            message = f"the batch has an unknown input '{name}'{did_you_mean(str(name), known)}"
            raise UserError(message, help=f"the graph's batch inputs are {_listed(known)}")
    sizes: dict[str, tuple[str, int]] = {}
    result: dict[str, np.ndarray | ort.OrtValue] = {}
    for item in inputs:
        if item.name not in batch:
            message = f"the batch has no input '{item.name}'"
            raise UserError(message, help=f"the graph's batch inputs are {_listed(known)}")
        array = _typed(_array_of(batch[item.name]), item)
        _check_shape(array, item, sizes)
        result[item.name] = host_value(array, item.element) if item.element == BFLOAT16 else array
    return result


def as_inputs(batch: Mapping[str, np.ndarray], inputs: Sequence[BatchInput]) -> Mapping[str, np.ndarray]:
    """Return the batch with its arrays as `checked_batch` makes them, as far as that can be done.

    What is wrong with a batch stays as it is, for `checked_batch` to name. Order and further names are kept.
    """
    if not isinstance(batch, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  it comes from the user
        return batch
    ready = copy.copy(batch) if isinstance(batch, dict) else dict(batch)
    for item in inputs:
        if item.name in batch:
            try:
                ready[item.name] = _typed(_array_of(batch[item.name]), item)
            except UserError:
                return batch
    return ready


def _line_for(batch: object, known: Sequence[str]) -> str:
    """Return the remedy for a batch that is no mapping: of a tuple, the line that names its parts."""
    listed = f"the graph's batch inputs are {_listed(known)}"
    if not isinstance(batch, (tuple, list)):
        return listed
    parts = ", ".join(f"'{name}': batch[{index}]" for index, name in enumerate(known))
    return f"{listed}; name its parts: ({{{parts}}} for batch in batches)"


def _array_of(value: object) -> np.ndarray:
    """Return what the user gives as an array; tensors of PyTorch's and TensorFlow's come to the host."""
    return np.asarray(host_array(value))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _typed(array: np.ndarray, item: BatchInput) -> np.ndarray:
    if item.keys and array.dtype.kind in "UOST":
        return _encoded(array, item)
    wanted = numpy_dtype(item.element)
    if array.dtype == wanted:
        return np.ascontiguousarray(array).reshape(array.shape)
    if item.element == BFLOAT16 and array.dtype == np.uint16:
        return np.ascontiguousarray(array).reshape(array.shape).view(wanted)
    integers = array.dtype.kind in "iu" and wanted.kind in "iu"
    if integers and np.can_cast(array.dtype, wanted, casting="safe"):
        return array.astype(wanted, order="C")
    message = f"batch input '{item.name}' must be {dtype_name(item.element)}, got {array.dtype}"
    raise UserError(message, help=f"convert it: array.astype('{dtype_name(item.element)}')")


def _encoded(array: np.ndarray, item: BatchInput) -> np.ndarray:
    """Return the number of each string among the keys; how many there are for any other string."""
    texts = array.reshape(-1).tolist()
    for text in texts:
        if not isinstance(text, (str, bytes)):
            raise UserError(f"batch input '{item.name}' must hold strings, got {type(text).__name__}")
    numbers = {key: number for number, key in enumerate(item.keys)}
    plain = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts)
    return np.array([numbers.get(text, len(numbers)) for text in plain], np.int64).reshape(array.shape)


def _check_shape(array: np.ndarray, item: BatchInput, sizes: dict[str, tuple[str, int]]) -> None:
    if item.dims is None:
        return
    fits = array.ndim == len(item.dims)
    if not fits or any(isinstance(dim, int) and dim != size for size, dim in zip(array.shape, item.dims)):  # noqa: B905  their lengths are equal here
        wanted = f"[{', '.join('?' if size is None else str(size) for size in item.dims)}]"
        got = f"[{', '.join(str(size) for size in array.shape)}]"
        raise UserError(f"batch input '{item.name}' must have shape {wanted}, got {got}")
    for size, dim in zip(array.shape, item.dims, strict=True):
        if isinstance(dim, str):
            other, first = sizes.setdefault(dim, (item.name, size))
            if first != size:
                message = (
                    f"batch inputs '{other}' and '{item.name}' disagree about dimension '{dim}':"
                    f" {first} and {size}"
                )
                raise UserError(message)


def rows_in(batch: Mapping[str, np.ndarray]) -> int | None:
    """Return of how many rows a batch says that it is made; None where it does not say."""
    return getattr(batch, "examples", None)


def examples_in(batch: Mapping[str, np.ndarray]) -> int:
    """Return the number of examples.

    A batch of rows says it; of another it is the first dimension of the first input that has one, or 1.
    """
    if (examples := rows_in(batch)) is not None:
        return examples
    return next((int(np.shape(array)[0]) for array in batch.values() if np.ndim(array) > 0), 1)
