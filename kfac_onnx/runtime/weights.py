"""Values of parameters from the files that people have.

`.npz`, `.safetensors`, the initializers of an `.onnx` file, and ONNX Runtime's training `.checkpoint`.
bfloat16 comes out as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.files import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["read_npz", "read_weights"]


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file; objects are refused.

    Raises UserError when the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path):  # anything else, NumPy would take for a single array or for a pickle
            pass
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{path}'") from e
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise UserError(f"'{path}' is not a readable .npz file: {first_line(e)}") from e


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
