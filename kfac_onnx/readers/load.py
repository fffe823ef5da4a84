"""The model as its exporter wrote it, as a private copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from kfac_onnx.disk.external import data_folder
from kfac_onnx.disk.mapped import map_initializers
from kfac_onnx.disk.models import load_proto
from kfac_onnx.disk.sparse import holds_sparse, write_out_sparse
from kfac_onnx.disk.wellformed import require_wellformed
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Exported", "load"]


@dataclass(frozen=True)
class Exported:
    """A model to be read: the IR, the proto (None when there was none) and the file's name.

    `onnx_ir` drops `ModelProto.training_info`; a reader that needs it looks at `proto`. `loss` and `chosen`
    (parameter -> gradient) are what the user named, `updates` (initializer -> new value) what the file binds,
    `keep_optimizer` says that an optimizer inside the graph is to stay.
    """

    model: ir.Model
    proto: onnx.ModelProto | None
    place: str | None
    loss: str | None = None
    chosen: Mapping[str, str] = field(default_factory=dict[str, str])
    updates: Mapping[str, str] = field(default_factory=dict[str, str])
    keep_optimizer: bool = False


def load(source: str | Path | ir.Model | onnx.ModelProto) -> Exported:
    """Return a private copy of a model; large weights beside its file stay there, as `MappedTensor`s.

    Raises:
        UserError: if the file is missing, is no ONNX model, or its external data is missing or lies outside
            the model's folder.

    """
    if isinstance(source, ir.Model):
        return Exported(ir.external_data.load_to_model(_copy(source)), None, None)
    if isinstance(source, onnx.ModelProto):
        if holds_sparse(source):
            dense = onnx.ModelProto()
            dense.CopyFrom(source)
            write_out_sparse(dense, None)
            source = dense
        require_wellformed(source, None)
        return Exported(_deserialize(source, None), source, None)
    proto = load_proto(source, mapped=True)
    model = _deserialize(proto, str(source))
    map_initializers(model, data_folder(proto, source))
    return Exported(model, proto, str(source))


def _copy(model: ir.Model) -> ir.Model:
    """Return a copy; one that is not sorted cannot be cloned and goes through its proto."""
    try:
        return model.clone()
    except RuntimeError:
        return _deserialize(ir.to_proto(model), None)


def _deserialize(proto: onnx.ModelProto, place: str | None) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"the ONNX model is malformed: {first_line(error)}", place=place) from error
