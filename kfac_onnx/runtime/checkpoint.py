"""Checkpoints: everything a run needs to go on as if it had not stopped, in one file.

A safetensors file. Tensors: `state/<input>` for every state, `constant/<input>` for values given once, and
`model` (uint8), the model itself without those values. Its metadata entry `kfac_onnx` is JSON: counters,
data position, learning rates, schedule, seed, the model's hash, and for each tensor its dtype and checksum.
bfloat16 is stored as uint16 bits. The file is written beside its place and renamed, so it is whole or absent.
Tensors go from their buffers to the file and back in pieces: a table is never in memory twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.files import atomic_path
from kfac_onnx.metadata import State
from kfac_onnx.passes.partition import partition
from kfac_onnx.passes.partition_graph import build_model
from kfac_onnx.runtime.stored import StoredArray, bytes_of, safetensors_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kfac_onnx.passes.partition import Plan
    from kfac_onnx.runtime.stored import Array

__all__ = [
    "Checkpoint",
    "given_values",
    "kfac_metadata",
    "model_bytes",
    "model_hash",
    "proto_of",
    "read_checkpoint",
    "require_same",
    "write_checkpoint",
]

VERSION: Final = 2
KEY: Final = "kfac_onnx"
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: arrays in memory to be written, or arrays in the file that was read."""

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
    version: int = VERSION
    dtypes: dict[str, str] = field(default_factory=dict[str, str])
    checksums: dict[str, str] = field(default_factory=dict[str, str])


_HEADER: Final = tuple(
    item.name for item in dataclasses.fields(Checkpoint) if item.name not in ("model", "states", "constants")
)
"""The fields that go into the JSON entry."""


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


def _plain(array: Array) -> np.ndarray:
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

    Raises UserError when the place cannot be written.
    """
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]  bare PathLike

    named = {f"state/{name}": array for name, array in checkpoint.states.items()}
    named |= {f"constant/{name}": array for name, array in checkpoint.constants.items()}
    named["model"] = np.frombuffer(checkpoint.model, np.uint8)
    tensors = {name: _plain(array) for name, array in named.items()}
    # Not asdict: it would copy every array.
    header = {key: getattr(checkpoint, key) for key in _HEADER}
    header["model_hash"] = model_hash(checkpoint.model)
    header["dtypes"] = {name: str(array.dtype) for name, array in named.items()}
    header["checksums"] = {name: _checksum(array) for name, array in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={KEY: json.dumps(header)})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return the contents of a checkpoint file.

    Raises UserError when there is no such file, it is no checkpoint, or it is damaged.
    """
    try:
        tensors, entries = safetensors_arrays(path)
        if KEY not in entries:
            raise UserError(f"'{path}' is not a checkpoint of a training session")
        header: dict[str, Any] = json.loads(entries[KEY])
    except FileNotFoundError as e:
        raise UserError(f"there is no checkpoint '{path}'") from e
    except (OSError, ValueError, KeyError) as e:
        raise _damaged(path, first_line(e)) from e
    if header.get("version") != VERSION:
        message = f"checkpoint '{path}' has version {header.get('version')}, this program reads {VERSION}"
        raise UserError(message)
    return _checked(path, header, tensors)


def _damaged(path: str | Path, detail: str) -> UserError:
    return UserError(f"checkpoint '{path}' is damaged: {detail}", help="take an older one")


def _checked(path: str | Path, header: dict[str, Any], tensors: dict[str, StoredArray]) -> Checkpoint:
    checksums: dict[str, str] = header.get("checksums", {})
    dtypes: dict[str, str] = header.get("dtypes", {})
    for name, expected in checksums.items():
        if name not in tensors:
            raise _damaged(path, f"tensor '{name}' is missing")
        if _checksum(tensors[name]) != expected:
            raise _damaged(path, f"the checksum of tensor '{name}' is wrong")
        if dtypes.get(name) == "bfloat16":
            tensors[name] = replace(tensors[name], dtype=BFLOAT16)
    if "model" not in tensors:
        raise _damaged(path, "it holds no model")
    model = np.asarray(tensors["model"]).tobytes()
    if header.get("model_hash") != model_hash(model):
        raise _damaged(path, "the hash of its model is wrong")

    def part(prefix: str) -> dict[str, Array]:
        return {n.removeprefix(prefix): array for n, array in tensors.items() if n.startswith(prefix)}

    keys = ("committed", "skipped", "position", "host_roots", "learning_rates", "schedule", "seed")
    try:
        fields = {key: header[key] for key in keys}
        return Checkpoint(model=model, states=part("state/"), constants=part("constant/"), **fields)
    except KeyError as e:
        raise _damaged(path, f"its header has no {e}") from e


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
        raise UserError(
            f"checkpoint '{path}' was made with another model",
            help="resume with the model that it was made with, or start without --resume",
        )
