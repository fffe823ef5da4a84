"""Is a run resumed with the graph that it was begun with? Its structure tells, its weights do not."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Final

from kfac_onnx import metadata
from kfac_onnx.disk.models import load_model, load_proto
from kfac_onnx.metadata import Step
from kfac_onnx.runtime.saved.checkpoint import different_model

if TYPE_CHECKING:
    from pathlib import Path

    from kfac_onnx.runtime.session import TrainingSession

__all__ = ["require_source", "source_hash"]

_WEIGHT: Final = 32
"""Entries from which on an initializer counts as a weight: its values are no part of the graph."""
_VALUES: Final = (
    "raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "external_data",
)  # fmt: skip


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
