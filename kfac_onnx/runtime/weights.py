"""Values of parameters from the files that people have.

`.npz`, `.safetensors`, the initializers of an `.onnx` file, and ONNX Runtime's training `.checkpoint`.
bfloat16 comes out as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.files import load_model, read_npz

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = ["read_weights"]


def _read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]  bare PathLike

    try:
        return dict(load_file(str(path)))  # pyright: ignore[reportUnknownVariableType]  its PathLike has no parameter
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"'{path}' is not a readable .safetensors file: {first_line(e)}") from e


def _read_onnx(path: str | Path) -> dict[str, np.ndarray]:
    model = load_model(path)
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def _read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    from kfac_onnx.runtime.ort_checkpoint import read_ort_checkpoint

    return read_ort_checkpoint(path)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name.

    Raises UserError when the file is missing, damaged or of another kind.
    """
    readers: dict[str, Callable[[str | Path], dict[str, np.ndarray]]] = {
        ".npz": read_npz,
        ".safetensors": _read_safetensors,
        ".onnx": _read_onnx,
        ".checkpoint": _read_checkpoint,
    }
    reader = readers.get(Path(path).suffix)
    if reader is None:
        message = f"parameters cannot be read from '{path}'"
        raise UserError(message, help=f"give a file ending in {', '.join(readers)}")
    if not Path(path).is_file():
        raise UserError(f"there is no file '{path}'")
    return reader(path)
