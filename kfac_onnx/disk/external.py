"""Tensors whose data lies in another file: beside the model or below it, and nowhere else.

A location that is absolute, leaves the model's folder, or leaves it through a symbolic link is refused, and
so is data that does not lie within its file. Everything is checked before any of it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.disk.memory import require_memory
from kfac_onnx.disk.wellformed import all_tensors, byte_size
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    import onnx

__all__ = ["check_external", "load_external"]

_REMEDY: Final = "copy the model and its data file again"


def check_external(proto: onnx.ModelProto, path: str | Path) -> None:
    """Raise UserError for a tensor whose data is missing, cut short, or outside the model's folder.

    Writes a missing length into the proto.
    """
    import onnx

    root = _folder(path).resolve()
    total = 0
    for tensor in all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            total += _check(tensor, root, path)
    require_memory(total, f"the external data of '{path}'")


def _folder(path: str | Path) -> Path:
    return Path.cwd() if str(path) == "-" else Path(path).parent


def _check(tensor: onnx.TensorProto, root: Path, path: str | Path) -> int:
    """Check one tensor; return its size in bytes."""
    import onnx

    owner = f"tensor '{tensor.name}' of '{path}'"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        target = (root / location).resolve()
        outside = not location or Path(location).is_absolute() or not target.is_relative_to(root)
        found = not outside and target.is_file()
        held = target.stat().st_size if found else 0
    except (OSError, ValueError, RuntimeError) as e:  # a name that no file can have, links in a circle
        raise UserError(f"the data of {owner} cannot be read: {first_line(e)}") from e
    if outside:
        raise UserError(
            f"{owner} keeps its data outside the model's folder",
            place=f"location '{location}'",
            help="put the data file beside the model",
        )
    if not found:
        raise UserError(f"the data of {owner} is missing: there is no file '{location}'")
    if tensor.data_type == onnx.TensorProto.STRING:
        raise UserError(f"{owner} keeps strings in another file, which the format does not allow")
    needed = byte_size(tensor)
    offset, length = _number(entries, "offset", 0, owner), _number(entries, "length", needed, owner)
    if held - offset < needed or length != needed:
        raise UserError(
            f"the data of {owner} is damaged: it takes {needed} bytes of '{location}'", help=_REMEDY
        )
    if "length" not in entries:  # optional in the format; without it a reader takes the whole file
        tensor.external_data.add(key="length", value=str(needed))
    return needed


def _number(entries: dict[str, str], key: str, default: int, owner: str) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UserError(
            f"the data of {owner} is damaged: its {key} is '{text}', which is no number", help=_REMEDY
        )
    return int(text)


def load_external(proto: onnx.ModelProto, path: str | Path) -> None:
    """Read the data of every tensor into the proto; `check_external` must have passed.

    Raises UserError when it cannot be read.
    """
    import onnx
    import onnx.external_data_helper

    try:
        onnx.external_data_helper.load_external_data_for_model(proto, str(_folder(path)))
    except (OSError, ValueError, onnx.checker.ValidationError) as e:
        raise UserError(f"the external data of '{path}' cannot be read: {first_line(e)}") from e
