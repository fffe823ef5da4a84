"""What a checkpoint says of a run without opening it for training: its model, its progress, its roots.

Also whether a run is resumed with the graph that it was begun with: its structure tells, its weights do not.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.disk.models import load_model, load_proto
from kfac_onnx.metadata import State, Step
from kfac_onnx.runtime.health import root_health
from kfac_onnx.runtime.saved.checkpoint import different_model, proto_of, read_checkpoint
from kfac_onnx.runtime.saved.checkpoint_folder import SUFFIXES, read_newest
from kfac_onnx.step.protos import read_source

if TYPE_CHECKING:
    from kfac_onnx.runtime.health import RootHealth
    from kfac_onnx.runtime.session import TrainingSession

__all__ = ["SavedRun", "is_checkpoint", "read_run", "require_source", "source_hash"]

_WEIGHT: Final = 32
"""Entries from which on an initializer counts as a weight: its values are no part of the graph."""
_VALUES: Final = (
    "raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "external_data",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """A run as its checkpoint left it: `committed` and `skipped` steps, data `position`, its roots."""

    path: Path
    model: ir.Model
    committed: int
    skipped: int
    position: int
    root_fallbacks: int
    roots: tuple[RootHealth, ...]
    settings: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data, without the model."""
        names = ("committed", "skipped", "position", "root_fallbacks", "settings")
        data: dict[str, object] = {"path": str(self.path)}
        data.update((name, getattr(self, name)) for name in names)
        data["roots"] = [root.to_json() for root in self.roots]
        return data


def is_checkpoint(path: str | Path) -> bool:
    """Say whether a path is that of a checkpoint, or of a folder of them."""
    return Path(path).is_dir() or Path(path).suffix in SUFFIXES


def read_run(path: str | Path) -> SavedRun:
    """Return what a checkpoint, or the newest whole one of a folder, says of its run.

    Raises UserError as `TrainingSession.resume` does.
    """
    file = Path(path)
    if file.is_dir():
        file, checkpoint, _ = read_newest(file)
    else:
        checkpoint = read_checkpoint(file)
    model = ir.from_proto(proto_of(checkpoint))
    step = metadata.read(model, "step", Step)

    states = metadata.read_list(model, "state", State)
    checks = () if step is None else step.root_checks
    return SavedRun(
        path=file,
        model=model,
        committed=checkpoint.committed,
        skipped=checkpoint.skipped,
        position=checkpoint.position,
        root_fallbacks=checkpoint.host_roots,
        settings=checkpoint.settings,
        roots=root_health(
            read_source(model).items, checks, states, lambda name: np.asarray(checkpoint.states[name])
        ),
    )


def source_hash(path: str | Path) -> str | None:
    """Return the SHA-256 of a model file without the values of its weights; None for stdin.

    Raises UserError when it cannot be read.
    """
    if str(path) == "-":
        return None
    proto = load_proto(path, external=False)
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) >= _WEIGHT:
            for field in (*_VALUES, "data_location"):
                tensor.ClearField(field)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def require_source(session: TrainingSession, path: str | Path) -> None:
    """Raise UserError unless a resumed session trains the graph in a file, transformed or not.

    Where the checkpoint does not say what it was made of, the names of the batch inputs decide.
    """
    found = source_hash(path)
    if found is None or found == session.source:
        return
    model = load_model(path)
    if metadata.read(model, "step", Step) is not None:
        session.require_model(model)
        return
    names = {value.name for value in model.graph.inputs}
    if session.source is None and all(item.name in names for item in session.batch_inputs):
        return
    raise different_model("the checkpoint", f"'{path}'")
