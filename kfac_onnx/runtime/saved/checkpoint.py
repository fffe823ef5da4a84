"""Checkpoints: everything a run needs to go on as if it had not stopped, in one file.

A safetensors file. Tensors: `state/<input>` for every state, `constant/<input>` for values given once, and
`model` (uint8), the model itself without those values. Its metadata entry `kfac_onnx` is JSON: counters,
data position, learning rates, schedule, seed, what the batches were made of, the versions that wrote it, the
model's hash, and for each tensor its dtype, shape and checksum; the entry `sha256` is the checksum of that
JSON. So no byte that is used can change unnoticed. bfloat16 is stored as uint16 bits. The file is written
beside its place, synced and renamed, so it is whole or absent. What is written is held against the rules of
reading first (`require_readable`), by a session already before its first step. Tensors go from their buffers
to the file and back in pieces: a table is never in memory twice.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from kfac_onnx import metadata
from kfac_onnx.disk.models import atomic_path
from kfac_onnx.disk.records import parse
from kfac_onnx.disk.stored import StoredArray, bytes_of, safetensors_arrays, write_safetensors
from kfac_onnx.disk.wellformed import all_tensors, require_wellformed
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.errors.arguments import LARGEST, LARGEST_SEED, shown
from kfac_onnx.metadata import State, Step
from kfac_onnx.runtime.schedules import parse as parse_schedule
from kfac_onnx.runtime.step.tensors import element_type, numpy_dtype
from kfac_onnx.step.plan import partition
from kfac_onnx.step.protos import build_model
from kfac_onnx.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kfac_onnx.disk.stored import Array
    from kfac_onnx.step.plan import Plan

__all__ = [
    "Checkpoint",
    "DamagedError",
    "UnreadableError",
    "different_model",
    "given_values",
    "kfac_metadata",
    "model_bytes",
    "model_hash",
    "proto_of",
    "read_checkpoint",
    "require_complete",
    "require_readable",
    "require_same",
    "versions",
    "write_checkpoint",
]

VERSION: Final = 3
KEY: Final = "kfac_onnx"
CHECKSUM: Final = "sha256"
"""The entry with the checksum of the other; later versions keep it, so that they can be told from damage."""
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)

_NO_FILE: Final = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Errors that say that something else than a file is there."""


class DamagedError(UserError):
    """A file is not the checkpoint that was written: an older one will do."""


class UnreadableError(UserError):
    """The system does not let a file be read: nothing is known of its contents, and it must stay as it is."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: arrays in memory to be written, or arrays in the file that was read.

    `entropy` is what random operators without a seed draw from, `data` describes the batches that `position`
    counts, `source` is the hash of the training graph that the model was made of (see `source_hash`), and
    `versions` are those of the programs that wrote the file. `settings` are those of the command that trains,
    as TOML; `best` is the best held-out metric so far by its name, with its `position`, and how many
    evaluations have `waited` for a better one.
    """

    model: bytes
    states: Mapping[str, Array]
    constants: Mapping[str, Array]
    committed: int
    skipped: int
    position: int
    host_roots: int
    learning_rates: dict[str, float]
    schedule: str | None
    seed: int | None
    entropy: int
    data: dict[str, int | bool | None] | None = None
    source: str | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    settings: str | None = None
    best: dict[str, float] | None = None


_HEADER: Final = tuple(
    item.name for item in dataclasses.fields(Checkpoint) if item.name not in ("model", "states", "constants")
)
"""The fields that go into the JSON entry."""


def versions() -> dict[str, str]:
    """Return the versions of what decides about the numbers of a run."""
    import onnxruntime

    return {"kfac_onnx": __version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def model_bytes(plan: Plan, entries: Mapping[str, str]) -> bytes:
    """Return the whole-step model without the values of states and constants."""
    source = plan.source
    nodes = [item.node for item in source.items]
    as_inputs = {*source.inputs, *(state.input for state in plan.states), *plan.frozen}
    model = build_model(source, nodes, source.outputs, name="step", as_inputs=as_inputs)
    present = {value.name for value in model.graph.input}
    model.graph.input.extend(source.types[name] for name in source.inputs if name not in present)
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    made = (name for item in source.items for name in item.makes)
    model.graph.value_info.extend(source.types[n] for n in made if n in source.types and n not in given)
    for key, value in sorted(entries.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model.SerializeToString(deterministic=True)


def model_hash(model: bytes) -> str:
    """Return the SHA-256 of a model's bytes, in hexadecimal."""
    return hashlib.sha256(model).hexdigest()


def _plain(array: Array) -> Array:
    if isinstance(array, StoredArray):
        return replace(array, dtype=np.dtype(np.uint16)) if array.dtype == BFLOAT16 else array
    flat = np.ascontiguousarray(array).reshape(array.shape)
    return flat.view(np.uint16) if flat.dtype == BFLOAT16 else flat


def _checksum(array: np.ndarray | StoredArray) -> str:
    """Return the SHA-256 of an array's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    pieces = array.pieces() if isinstance(array, StoredArray) else [bytes_of(np.ascontiguousarray(array))]
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write the file, whole or not at all.

    Raises UserError when the place cannot be written, the disk is full, or the file could not be read again.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]  bare PathLike

    named = {f"state/{name}": array for name, array in checkpoint.states.items()}
    named |= {f"constant/{name}": array for name, array in checkpoint.constants.items()}
    named["model"] = np.frombuffer(checkpoint.model, np.uint8)
    tensors = {name: _plain(array) for name, array in named.items()}
    # Not asdict: it would copy every array.
    header = {key: getattr(checkpoint, key) for key in _HEADER}
    require_readable(header)
    header["version"] = VERSION
    header["model_hash"] = model_hash(checkpoint.model)
    header["tensors"] = {
        name: [str(named[name].dtype), list(array.shape), _checksum(array)] for name, array in tensors.items()
    }
    text = json.dumps(header)
    entries = {KEY: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}
    with atomic_path(path) as temporary:
        stored = {name: array for name, array in tensors.items() if isinstance(array, StoredArray)}
        if stored:
            write_safetensors(temporary, tensors, entries)
            return
        try:
            save_file(tensors, str(temporary), metadata=entries)  # pyright: ignore[reportArgumentType]  none is stored
        except SafetensorError as e:
            raise _system_error(e) from e


def _system_error(error: Exception) -> OSError:
    """Return the operating system's error that safetensors quotes (`... (os error 28)`)."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(first_line(error)) if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return the contents of a checkpoint file.

    Raises DamagedError when there is no such file, it is no checkpoint, or damaged; UnreadableError when the
    system does not let it be read; another UserError when it is one of another version.
    """
    try:
        tensors, entries = safetensors_arrays(path)
        if KEY not in entries:
            raise DamagedError(f"'{path}' is not a checkpoint of a training session")
        text = entries[KEY]
        header: dict[str, Any] = parse(text)
    except FileNotFoundError as e:
        raise DamagedError(f"there is no checkpoint '{path}'") from e
    except OSError as e:
        raise _unreadable(path, e) from e
    except ValueError as e:
        raise _damaged(path, first_line(e)) from e
    written = header.get("version") if isinstance(header, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance]  JSON
    if entries.get(CHECKSUM) != hashlib.sha256(text.encode()).hexdigest():
        if CHECKSUM not in entries and written in range(1, VERSION):
            raise _other_version(path, written)
        raise _damaged(path, "the checksum of its header is wrong")
    if written != VERSION:
        raise _other_version(path, written)
    try:
        return _checked(path, header, tensors)
    except (DamagedError, UnreadableError):
        raise
    except OSError as e:
        raise _unreadable(path, e) from e
    except UserError as e:  # it changed while it was read
        if isinstance(e.__cause__, OSError):
            raise _unreadable(path, e.__cause__) from e
        raise _damaged(path, first_line(e)) from e


def _other_version(path: str | Path, found: object) -> UserError:
    newer = isinstance(found, int) and found > VERSION
    return UserError(
        f"checkpoint '{path}' has version {found}, this program reads {VERSION}",
        help="install the kfac-onnx that wrote it" + (", or a newer one" if newer else ""),
    )


def _unreadable(path: str | Path, error: OSError) -> UserError:
    """Return the error about a file that cannot be read; what is no file at all is damaged."""
    if error.errno in _NO_FILE:
        return _damaged(path, first_line(error))
    return UnreadableError(
        f"checkpoint '{path}' cannot be read: {error.strerror or error}",
        help="mend its rights or its disk, or go on from an older one by its own name",
    )


def _damaged(path: str | Path, detail: str) -> DamagedError:
    return DamagedError(f"checkpoint '{path}' is damaged: {detail}", help="take an older one")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SEED


def _is_rate(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -1e308 <= value <= 1e308  # an int may have any number of digits


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [str, list, str]  # pyright: ignore[reportUnknownArgumentType]  JSON


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))  # pyright: ignore[reportUnknownArgumentType]  JSON


_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    "committed": _is_count,
    "skipped": _is_count,
    "position": _is_count,
    "host_roots": _is_count,
    "learning_rates": _each(_is_rate),
    "schedule": _or_none(_is_text),
    "seed": _or_none(_is_seed),
    "entropy": _is_count,
    "data": _or_none(_each(_or_none(lambda value: isinstance(value, bool) or _is_seed(value)))),
    "source": _or_none(_is_text),
    "versions": _each(_is_text),
    "settings": _or_none(_is_text),
    "best": _or_none(_each(_is_rate)),
    "tensors": _each(_is_entry),
}
"""What each field of the header must be."""


_LATER: Final = ("settings", "best")
"""Fields that checkpoints of this version did not always have."""


def require_readable(header: Mapping[str, Any]) -> None:
    """Raise UserError for a value of a header's fields that reading the checkpoint would refuse."""
    for key, value in header.items():
        if key in _FIELDS and not _FIELDS[key](value):
            raise UserError(
                f"a checkpoint cannot hold the {key.replace('_', ' ')} {shown(value)}",
                help="give numbers of Python's own types that are finite and not negative",
            )
    if header.get("schedule") is not None:
        parse_schedule(header["schedule"])


def _checked(path: str | Path, header: dict[str, Any], tensors: dict[str, StoredArray]) -> Checkpoint:
    for key in _LATER:
        header.setdefault(key, None)
    for key, fits in _FIELDS.items():
        if key not in header or not fits(header[key]):
            raise _damaged(path, f"its header has no right '{key}'")
    expected: dict[str, list[Any]] = header["tensors"]
    for name in sorted(expected.keys() ^ tensors.keys()):
        what = "is missing" if name in expected else "is not in its header"
        raise _damaged(path, f"tensor '{name}' {what}")
    for name, array in tensors.items():
        dtype, shape, checksum = expected[name]
        if [str(array.dtype), list(array.shape)] != ["uint16" if dtype == "bfloat16" else dtype, shape]:
            raise _damaged(path, f"the type or shape of tensor '{name}' is wrong")
        if _checksum(array) != checksum:
            raise _damaged(path, f"the checksum of tensor '{name}' is wrong")
        if dtype == "bfloat16":
            tensors[name] = replace(array, dtype=BFLOAT16)
    if (
        max((array.offset + array.nbytes for array in tensors.values()), default=0)
        != Path(path).stat().st_size
    ):
        raise _damaged(path, "something lies behind its tensors")
    if "model" not in tensors:
        raise _damaged(path, "it holds no model")
    model = np.asarray(tensors["model"]).tobytes()
    if header.get("model_hash") != model_hash(model):
        raise _damaged(path, "the hash of its model is wrong")

    def part(prefix: str) -> dict[str, Array]:
        return {n.removeprefix(prefix): array for n, array in tensors.items() if n.startswith(prefix)}

    fields = {key: header[key] for key in _HEADER}
    checkpoint = Checkpoint(model=model, states=part("state/"), constants=part("constant/"), **fields)
    _require_own(checkpoint, path)
    return checkpoint


def proto_of(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Return the checkpoint's model."""
    return onnx.ModelProto.FromString(checkpoint.model)


def kfac_metadata(model: ir.Model) -> dict[str, str]:
    """Return what a model says about itself."""
    return {key: value for key, value in model.metadata_props.items() if key.startswith("kfac.")}


def given_values(checkpoint: Checkpoint) -> dict[str, Array]:
    """Return the values a new session needs: parameters and constants."""
    model = ir.from_proto(proto_of(checkpoint))
    names = {
        state.input for state in metadata.read_list(model, "state", State) if state.initial == "parameter"
    }
    return {name: checkpoint.states[name] for name in names} | dict(checkpoint.constants)


def require_same(checkpoint: Checkpoint, path: str | Path, model: ir.Model) -> None:
    """Raise UserError unless the checkpoint was made with this model (values of parameters aside)."""
    if model_hash(model_bytes(partition(model), kfac_metadata(model))) != model_hash(checkpoint.model):
        raise different_model(f"checkpoint '{path}'")


def different_model(checkpoint: str, model: str | None = None) -> UserError:
    """Return the sentence about a checkpoint of another model than the one at hand."""
    return UserError(
        f"{checkpoint} was made with another model" + ("" if model is None else f" than {model}"),
        help="resume with the model that it was made with, or start without --resume",
    )


def _require_own(checkpoint: Checkpoint, path: str | Path) -> None:
    """Raise DamagedError unless the model can be read, and states and learning rates are the model's own."""
    try:
        proto = onnx.ModelProto.FromString(checkpoint.model)
        require_wellformed(proto, None)
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in all_tensors(proto)):
            raise ValueError("a tensor of it lies in another file")
        model = ir.from_proto(proto)
        step = metadata.read(model, "step", Step)
        states = metadata.read_list(model, "state", State)
    except (DecodeError, UserError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise _damaged(path, f"its model cannot be read: {first_line(e)}") from e
    if step is None:
        raise _damaged(path, "its model is no training step")
    own = {rate.input for rate in step.learning_rates}
    for name in sorted(checkpoint.learning_rates.keys() ^ own):
        what = "is missing" if name in own else "is none of its model's"
        raise _damaged(path, f"the learning rate '{name}' {what}")
    require_complete(checkpoint, path, states)


def require_complete(checkpoint: Checkpoint, path: str | Path, states: Sequence[State]) -> None:
    """Raise DamagedError unless the checkpoint holds each state's value, in the state's shape and dtype."""
    for state in states:
        array = checkpoint.states.get(state.input)
        if array is None:
            raise _damaged(path, f"the state '{state.input}' is missing")
        wanted = numpy_dtype(element_type(state.dtype))
        if (array.dtype, tuple(array.shape)) != (wanted, tuple(state.shape)):
            raise _damaged(path, f"the state '{state.input}' has another type or shape than in its model")
