"""What a checkpoint says of a run without opening it for training: its model, its progress, its roots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.metadata import State, Step
from kfac_onnx.runtime.health import root_health
from kfac_onnx.runtime.saved.checkpoint import proto_of, read_checkpoint
from kfac_onnx.runtime.saved.checkpoint_folder import SUFFIXES, read_newest
from kfac_onnx.step.protos import read_source

if TYPE_CHECKING:
    from kfac_onnx.runtime.health import RootHealth

__all__ = ["SavedRun", "is_checkpoint", "read_run"]


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

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data, without the model."""
        names = ("committed", "skipped", "position", "root_fallbacks")
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
        roots=root_health(
            read_source(model).items, checks, states, lambda name: np.asarray(checkpoint.states[name])
        ),
    )
