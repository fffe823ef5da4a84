"""Values of parameters from the files that people have.

`.npz`, `.safetensors`, the initializers of an `.onnx` file, and ONNX Runtime's training `.checkpoint`.
bfloat16 comes out as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.disk.models import load_model
from kfac_onnx.disk.stored import npz_arrays, safetensors_arrays
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.graph.lifting import lift_constants

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.disk.stored import Array

__all__ = ["read_weights", "stored_weights"]

ODTC: Final = b"ODTC"
"""What ONNX Runtime's checkpoints have at byte 4."""


def _read_safetensors(path: str | Path) -> dict[str, Array]:
    try:
        return {**safetensors_arrays(path)[0]}
    except (OSError, ValueError) as e:
        raise UserError(f"'{path}' is not a readable .safetensors file: {first_line(e)}") from e


def _read_npz(path: str | Path) -> dict[str, Array]:
    return {**npz_arrays(path)}


def _read_onnx(path: str | Path) -> dict[str, Array]:
    model = load_model(path)
    lift_constants(model)
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def _read_checkpoint(path: str | Path) -> dict[str, Array]:
    from kfac_onnx.runtime.saved.ort_checkpoint import read_ort_checkpoint

    return {**read_ort_checkpoint(path)}


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name, in memory.

    Raises UserError when the file is missing, damaged or of another kind.
    """
    return {name: np.asarray(array) for name, array in stored_weights(path).items()}


def stored_weights(path: str | Path) -> dict[str, Array]:
    """Return the arrays of a file by name; those of `.npz` and `.safetensors` stay in it until they are read.

    Raises UserError when the file is missing, damaged or of another kind.
    """
    readers: dict[str, Callable[[str | Path], dict[str, Array]]] = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".onnx": _read_onnx,
        ".checkpoint": _read_checkpoint,
    }
    if not Path(path).is_file():
        if Path(path).suffix not in readers and not Path(path).exists():
            message = f"parameters cannot be read from '{path}'"
            raise UserError(message, help=f"give a file ending in {', '.join(readers)}")
        raise UserError(f"there is no file '{path}'")
    reader = readers.get(_kind_of(path) or Path(path).suffix)
    if reader is None:
        message = f"parameters cannot be read from '{path}'"
        raise UserError(message, help=f"give a file ending in {', '.join(readers)}")
    return reader(path)


def _kind_of(path: str | Path) -> str | None:
    """Return the suffix that a file's first bytes stand for; None where they show nothing.

    ONNX Runtime writes its checkpoints without a suffix.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(16)
    except OSError as e:
        raise UserError(f"'{path}' cannot be read: {e.strerror or e}") from e
    if start[4:8] == ODTC:
        return ".checkpoint"
    if start[:4] == b"PK\x03\x04":
        return ".npz"
    return ".safetensors" if start[8:9] == b"{" and Path(path).suffix not in (".onnx", ".npz") else None
