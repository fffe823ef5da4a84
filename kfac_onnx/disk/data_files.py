"""Files that belong to another: a model's external data, a training checkpoint's data.

A model and its data are written as a pair. The data of the new pair never takes the name of the data that the
old model refers to: until the new model is in its place, the old pair is whole, and from then on the new one.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["belonging", "data_names", "pair"]

_MODELS = (".onnx", ".ort", ".pb")


def data_names(model: str | Path) -> set[str]:
    """Return the locations of a model's external data, as the model says them; none for anything else."""
    import onnx
    from google.protobuf.message import DecodeError

    from kfac_onnx.disk.wellformed import all_tensors

    try:
        proto = onnx.ModelProto.FromString(Path(model).read_bytes())
    except (OSError, DecodeError):
        return set()
    external = (t for t in all_tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}


def belonging(path: str | Path) -> set[Path]:
    """Return the files that reading a file reads too, where they are there."""
    place = Path(path)
    if place.suffix in _MODELS:
        found = {place.parent / name for name in data_names(place)}
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
