"""Tensors whose data lies in another file: beside the model or below it, and nowhere else.

A location that is absolute, leaves the model's folder, or leaves it through a symbolic link is refused, and
so is data that does not lie within its file. Everything is checked before any of it is read.

A model and its data are written as a pair. The data of the new pair never takes the name of the data that the
old model refers to: until the new model is in its place, the old pair is whole, and from then on the new one.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.disk.memory import require_memory
from kfac_onnx.disk.wellformed import all_tensors, byte_size
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Generator

    import onnx

__all__ = ["belonging", "check_external", "data_folder", "data_names", "load_external", "pair"]

_REMEDY: Final = "copy the model and its data file again"
_MODELS: Final = (".onnx", ".ort", ".pb")


def check_external(proto: onnx.ModelProto, path: str | Path) -> None:
    """Raise UserError for a tensor whose data is missing, cut short, or outside the model's folder.

    Writes a missing length into the proto.
    """
    import onnx

    root = data_folder(proto, path).resolve()
    for tensor in all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check(tensor, root, path)


def data_folder(proto: onnx.ModelProto, path: str | Path) -> Path:
    """Return the folder of a model's data: that of a link to the model, or else that of the model itself."""
    if str(path) == "-":
        return Path.cwd()
    place = Path(path)
    if place.is_symlink() and not any((place.parent / name).is_file() for name in _locations(proto)):
        return place.resolve().parent
    return place.parent


def _locations(proto: onnx.ModelProto) -> set[str]:
    """Return where the tensors of a model have their data, as it says itself."""
    import onnx

    external = (t for t in all_tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}


def _check(tensor: onnx.TensorProto, root: Path, path: str | Path) -> None:
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


def _number(entries: dict[str, str], key: str, default: int, owner: str) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UserError(
            f"the data of {owner} is damaged: its {key} is '{text}', which is no number", help=_REMEDY
        )
    return int(text)


def load_external(proto: onnx.ModelProto, path: str | Path, *, mapped: bool = False) -> None:
    """Read the data of every tensor into the proto; `check_external` must have passed.

    With `mapped` initializers of the main graph that `is_mappable` accepts stay where they are.

    Raises UserError when they cannot be read, or need more memory than there is.
    """
    import onnx
    import onnx.external_data_helper

    from kfac_onnx.disk.mapped import is_mappable

    folder = data_folder(proto, path)
    left: dict[int, onnx.TensorProto] = {}  # holds them: an id is of an object that lives
    if mapped:
        for tensor in proto.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = folder / next(entry.value for entry in tensor.external_data if entry.key == "location")
            if is_mappable(tensor.data_type, byte_size(tensor)) and not place.is_symlink():
                left[id(tensor)] = tensor
    tensors = [
        tensor
        for tensor in all_tensors(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL and id(tensor) not in left
    ]
    require_memory(sum(map(byte_size, tensors)), f"the external data of '{path}'")
    try:
        for tensor in tensors:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    except (OSError, ValueError, onnx.checker.ValidationError) as e:
        raise UserError(f"the external data of '{path}' cannot be read: {first_line(e)}") from e


def data_names(model: str | Path) -> set[str]:
    """Return the locations of a model's external data, as the model says them; none for anything else."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.ModelProto.FromString(Path(model).read_bytes())
    except (OSError, DecodeError):
        return set()
    return _locations(proto)


def belonging(path: str | Path) -> set[Path]:
    """Return the files that reading a file reads too, where they are there."""
    place = Path(path)
    if place.suffix in _MODELS:
        folders = {place.parent, place.resolve().parent}  # a link, and where it leads
        found = {folder / name for name in data_names(place) for folder in folders}
    else:
        found = {place.with_name(f"{place.name}.data")}
    return {item for item in found if item.is_file()}


@contextlib.contextmanager
def pair(path: str | Path) -> Generator[str]:
    """Yield the name that the data of a model written to `path` takes; then delete the old model's data.

    The name is `<name>.data`, or `<name>.data2` where the model that is there now uses that. Nothing is
    deleted when the block ends with an error, or if it is not named like that.
    """
    place = Path(path)
    before = data_names(place) if place.is_file() else set[str]()
    names = (f"{place.name}.data{'' if number == 1 else number}" for number in itertools.count(1))
    name = next(name for name in names if name not in before)
    yield name
    for old in before & {f"{place.name}.data", f"{place.name}.data2"}:
        with contextlib.suppress(OSError):  # the new pair is in its place; the old data only take room
            (place.parent / old).unlink(missing_ok=True)
