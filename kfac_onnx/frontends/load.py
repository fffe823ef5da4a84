"""The model as its exporter wrote it, as a private copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.files import load_proto

__all__ = ["Exported", "load"]


@dataclass(frozen=True)
class Exported:
    """A model to be read: the IR, the proto (None when there was none) and the file's name.

    `onnx_ir` drops `ModelProto.training_info`; a reader that needs it looks at `proto`.
    """

    model: ir.Model
    proto: onnx.ModelProto | None
    place: str | None


def load(source: str | Path | ir.Model | onnx.ModelProto) -> Exported:
    """Return a private copy of a model; external data is checked and stays mapped from its file.

    Raises:
        UserError: if the file is missing, is no ONNX model, or its external data is missing or lies outside
            the model's folder.

    """
    if isinstance(source, ir.Model):
        return Exported(source.clone(), None, None)
    if isinstance(source, onnx.ModelProto):
        return Exported(_deserialize(source, None), source, None)
    proto = load_proto(source, external=False)
    model = _deserialize(proto, str(source))
    folder = Path.cwd() if str(source) == "-" else Path(source).resolve().parent
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = str(folder)
    return Exported(model, proto, str(source))


def _deserialize(proto: onnx.ModelProto, place: str | None) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"the ONNX model is malformed: {first_line(error)}", place=place) from error
