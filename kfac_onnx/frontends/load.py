"""Reading an ONNX file that somebody else made, without trusting it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google.protobuf.message
import onnx
import onnx_ir as ir

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.frontends.values import all_graphs

__all__ = ["Exported", "load"]


@dataclass(frozen=True)
class Exported:
    """A model as its exporter wrote it: the IR, the proto (null when there was none) and the file's name.

    `onnx_ir` drops `ModelProto.training_info`; a reader that needs it looks at `proto`.
    """

    model: ir.Model
    proto: onnx.ModelProto | None
    place: str | None


def load(source: str | Path | ir.Model | onnx.ModelProto) -> Exported:
    """Return a private copy of the model; its external data may not lie outside the file's folder.

    Raises:
        UserError: if the file is missing, is no ONNX model, or its external data is missing or elsewhere.

    """
    if isinstance(source, ir.Model):
        return Exported(source.clone(), None, None)
    if isinstance(source, onnx.ModelProto):
        return Exported(_deserialize(source, None), source, None)
    path = Path(source)
    proto = _read(path)
    model = _deserialize(proto, str(path))
    _check_external_data(model, path)
    return Exported(model, proto, str(path))


def _read(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise UserError(f"'{path}' is a folder, not an ONNX file")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"the file '{path}' does not exist") from error
    except OSError as error:
        raise UserError(f"the file '{path}' cannot be read: {first_line(error)}") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except google.protobuf.message.DecodeError as error:
        raise UserError(f"'{path}' is not an ONNX file", place=str(path)) from error
    if not proto.HasField("graph") or proto.ir_version == 0:
        raise UserError(f"'{path}' is not an ONNX model: it holds no graph", place=str(path))
    return proto


def _deserialize(proto: onnx.ModelProto, place: str | None) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"the ONNX model is malformed: {first_line(error)}", place=place) from error


def _check_external_data(model: ir.Model, path: Path) -> None:
    """Point external tensors at the model's folder and see that each is there and long enough."""
    folder = path.resolve().parent
    for tensor in _external_tensors(model):
        tensor.base_dir = folder
        location = Path(str(tensor.location))  # pyright: ignore[reportUnknownMemberType]  a PathLike of the library
        problem = f"the tensor '{tensor.name}' of '{path}' is stored in '{location}'"
        file = (folder / location).resolve()
        if location.is_absolute() or not file.is_relative_to(folder):
            raise UserError(f"{problem}, which is outside the model's folder", place=str(path))
        if not file.is_file():
            raise UserError(f"{problem}, which does not exist", place=str(path))
        if file.stat().st_size < (tensor.offset or 0) + tensor.nbytes:
            raise UserError(f"{problem}, which is too short to hold it", place=str(path))


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    found: list[Any] = []
    for graph in all_graphs(model.graph):
        found.extend(value.const_value for value in graph.initializers.values())
        for node in graph:
            found.extend(
                attribute.as_tensor()
                for attribute in node.attributes.values()
                if attribute.type == ir.AttributeType.TENSOR
            )
    return [tensor for tensor in found if isinstance(tensor, ir.ExternalTensor)]
