"""Reading and writing models and arrays: clear errors in, whole files or none out.

Open to every room, like `errors` and `metadata`. External data stays beside its model: a location
that leaves the model's folder is refused when a file is read.
"""

from __future__ import annotations

import math
import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.atomic import atomic_path, require_file
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

__all__ = [
    "atomic_path",
    "load_model",
    "load_proto",
    "make_folder",
    "read_npz",
    "refuse_overwrite",
    "require_folder",
    "require_writable",
    "save_model",
]

TEXT_SUFFIXES: Final = (".onnxtxt", ".onnxtext")
LARGEST_FILE: Final = 2**31 - 2**20
"""Bytes: protobuf's limit, less room for what is not a tensor."""


def load_proto(path: str | Path, *, external: bool = True) -> onnx.ModelProto:
    """Return the ModelProto in a file: `.onnx` (protobuf), `.onnxtxt` (text), or `-` for stdin.

    With `external` the tensors beside the file are read into the proto.

    Raises UserError when there is no such file, it is not an ONNX model, or its external data is
    missing or lies outside its folder.
    """
    import onnx
    import onnx.external_data_helper
    from google.protobuf.message import DecodeError

    data = _read(path)
    text_form = str(path).endswith(TEXT_SUFFIXES) or (str(path) == "-" and data.lstrip()[:1] in (b"<", b"#"))
    try:
        proto = onnx.parser.parse_model(data.decode()) if text_form else onnx.ModelProto.FromString(data)
    except (DecodeError, onnx.parser.ParseError, UnicodeDecodeError) as e:
        detail = f": {_parser_says(e)}" if text_form else ""
        raise UserError(f"'{path}' is not an ONNX model{detail}") from e
    if not proto.HasField("graph") or not proto.opset_import:
        raise UserError(f"'{path}' is not an ONNX model", help="it holds no graph with operator sets")
    folder = Path.cwd() if str(path) == "-" else Path(path).parent
    _check_external(proto, folder, path)
    if external:
        try:
            onnx.external_data_helper.load_external_data_for_model(proto, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as e:
            raise UserError(f"the external data of '{path}' cannot be read: {first_line(e)}") from e
    return proto


def _read(path: str | Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{path}'") from e
    except OSError as e:
        raise UserError(f"'{path}' cannot be read: {e.strerror or e}") from e


def _parser_says(error: Exception) -> str:
    """Return the place and the complaint of ONNX's text parser in one line."""
    text = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
    lines = text.splitlines()
    return f"{lines[0].strip('[]')}, {lines[-1]}" if lines else type(error).__name__


def _check_external(proto: onnx.ModelProto, folder: Path, path: str | Path) -> None:
    """Raise UserError for a tensor whose data is missing, cut short, or outside the model's folder.

    Writes a missing length into the proto.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    root = folder.resolve()
    for tensor in proto.graph.initializer:
        if not uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        target = (root / location).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(root):
            raise UserError(
                f"tensor '{tensor.name}' of '{path}' keeps its data outside the model's folder",
                place=f"location '{location}'",
                help="put the data file beside the model",
            )
        if not target.is_file():
            raise UserError(
                f"the data of tensor '{tensor.name}' of '{path}' is missing: there is no file '{location}'"
            )
        needed = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        held = target.stat().st_size - int(entries.get("offset", "0"))
        if held < needed or int(entries.get("length", needed)) != needed:
            raise UserError(
                f"the data of tensor '{tensor.name}' of '{path}' is damaged: "
                f"it takes {needed} bytes of '{location}'",
                help="copy the model and its data file again",
            )
        if "length" not in entries:  # optional in the format; without it a reader takes the whole file
            tensor.external_data.add(key="length", value=str(needed))


def load_model(path: str | Path) -> ir.Model:
    """Return the model in a file as onnx_ir; formats and errors as `load_proto`."""
    import onnx_ir as ir

    proto = load_proto(path)
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"'{path}' is not an ONNX model: {first_line(e)}") from e


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file by name; objects are refused.

    Raises UserError when the file is missing, damaged or something else.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path):  # anything else, NumPy would take for a single array or for a pickle
            pass
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{path}'") from e
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"'{path}' is not a readable .npz file: {first_line(e)}") from e


def refuse_overwrite(output: str | Path, *inputs: str | Path) -> None:
    """Raise UserError when `output` is one of the files that are read."""
    target = Path(output)
    for item in inputs:
        if str(item) != "-" and target.exists() and Path(item).exists() and target.samefile(item):
            raise UserError(
                f"'{output}' is the input and will not be overwritten", help="choose another name"
            )


def require_writable(path: str | Path) -> None:
    """Raise UserError for a place that `atomic_path` could not write to: sooner than after hours of work."""
    require_file(Path(path))
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"'{path}' cannot be written: its folder does not exist or is read-only")


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it where they are missing.

    Raises UserError when that cannot be done.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"the folder '{path}' cannot be made: {e.strerror or e}") from e


def require_folder(path: str | Path) -> None:
    """Raise UserError unless files can be written into a folder, or `make_folder` can make it."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "not a folder" if not folder.is_dir() else "read-only"
        raise UserError(f"nothing can be written into the folder '{path}': '{folder}' is {what}")


def save_model(model: ir.Model, path: str | Path) -> None:
    """Write a model as one file, whole or not at all; above 2 GB its tensors go to `<name>.data`.

    Raises UserError when the place cannot be written.
    """
    import onnx_ir as ir

    size = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    with atomic_path(path) as temporary:
        if str(path).endswith(TEXT_SUFFIXES):
            temporary.write_text(ir.to_onnx_text(model))
        elif size > LARGEST_FILE:
            ir.save(model, str(temporary), external_data=f"{temporary.name}.data")  # pyright: ignore[reportUnknownMemberType]  its PathLike has no parameter
        else:
            temporary.write_bytes(ir.to_proto(model).SerializeToString())
