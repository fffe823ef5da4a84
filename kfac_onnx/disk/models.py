"""Reading and writing models and arrays: clear errors in, whole files or none out.

Open to every room, like `errors` and `metadata`. External data stays beside its model: a location
that leaves the model's folder is refused when a file is read.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from kfac_onnx.disk.atomic import atomic_path, link_target, require_file
from kfac_onnx.disk.external import belonging, check_external, data_folder, load_external, pair
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "as_model",
    "atomic_path",
    "load_model",
    "load_proto",
    "make_folder",
    "refuse_overwrite",
    "require_folder",
    "require_writable",
    "save_model",
]

TEXT_SUFFIXES: Final = (".onnxtxt", ".onnxtext")
LARGEST_FILE: Final = 2**31 - 2**20
"""Bytes: protobuf's limit, less room for what is not a tensor."""


def load_proto(path: str | Path, *, external: bool = True, mapped: bool = False) -> onnx.ModelProto:
    """Return the ModelProto in a file: `.onnx` (protobuf), `.onnxtxt` (text), or `-` for stdin.

    With `external` the tensors beside the file are read into the proto; with `mapped` too, large weights stay
    beside it, for `disk.mapped.map_initializers`.

    Raises UserError when there is no such file, it is not an ONNX model, or its external data is
    missing or lies outside its folder.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from kfac_onnx.disk.sparse import write_out_sparse
    from kfac_onnx.disk.wellformed import require_wellformed

    data = _read(path)
    text_form = str(path).endswith(TEXT_SUFFIXES) or (str(path) == "-" and data.lstrip()[:1] in (b"<", b"#"))
    try:
        proto = onnx.parser.parse_model(data.decode()) if text_form else onnx.ModelProto.FromString(data)
    except (DecodeError, onnx.parser.ParseError, RuntimeError, ValueError) as e:
        detail = f": {_parser_says(e)}" if text_form else ""
        raise UserError(f"'{path}' is not an ONNX model{detail}") from e
    if not proto.HasField("graph") or not proto.opset_import:
        raise UserError(f"'{path}' is not an ONNX model", help="it holds no graph with operator sets")
    write_out_sparse(proto, str(path))
    require_wellformed(proto, str(path))
    check_external(proto, path)
    if external:
        load_external(proto, path, mapped=mapped and not proto.training_info)
    return proto


def _read(path: str | Path) -> bytes:
    try:
        return _whole(sys.stdin.buffer) if str(path) == "-" else Path(path).read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{path}'") from e
    except OSError as e:
        raise UserError(f"'{path}' cannot be read: {e.strerror or e}") from e


@functools.lru_cache(maxsize=1)
def _whole(stream: BinaryIO) -> bytes:
    """Return everything in a stream, again where it has been read: a pipe can be read only once."""
    return stream.read()


def _parser_says(error: Exception) -> str:
    """Return the place and the complaint of ONNX's text parser in one line."""
    text = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
    lines = text.splitlines()
    return f"{lines[0].strip('[]')}, {lines[-1]}" if lines else type(error).__name__


def load_model(path: str | Path) -> ir.Model:
    """Return the model in a file as onnx_ir; formats and errors as `load_proto`.

    Large weights beside the file stay there, as `MappedTensor`s.
    """
    import onnx_ir as ir

    from kfac_onnx.disk.mapped import map_initializers

    proto = load_proto(path, mapped=True)
    try:
        model = ir.from_proto(proto)
        map_initializers(model, data_folder(proto, path))
        return model
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(f"'{path}' is not an ONNX model: {first_line(e)}") from e


def as_model(source: str | Path | ir.Model | onnx.ModelProto) -> ir.Model:
    """Return a model as onnx_ir: one in a file, one of protobuf, or the one that is given.

    Raises UserError as `load_model`.
    """
    import onnx_ir as ir

    if isinstance(source, ir.Model):
        return source
    if isinstance(source, (str, Path)):
        return load_model(source)
    from kfac_onnx.disk.sparse import holds_sparse, write_out_sparse
    from kfac_onnx.disk.wellformed import require_wellformed

    if holds_sparse(source):
        dense = type(source)()
        dense.CopyFrom(source)
        write_out_sparse(dense, None)
        source = dense
    require_wellformed(source, None)
    return ir.from_proto(source)


def refuse_overwrite(output: str | Path, *inputs: str | Path) -> None:
    """Raise UserError when writing `output` would change what is read: a file, its data, a folder's file.

    Links of either kind are seen through.
    """
    target = link_target(output)
    written = [place for place in (target, Path(f"{target}.data"), Path(f"{target}.data2")) if place.exists()]
    if not written:
        return
    for item in (Path(item) for item in inputs if str(item) != "-"):
        if target.exists() and item.exists() and target.samefile(item):
            raise UserError(
                f"'{output}' is the input and will not be overwritten", help="choose another name"
            )
        read = set(item.glob("*.npz")) if item.is_dir() else belonging(item)
        for place, other in itertools.product(written, read):
            if place.samefile(other):
                raise UserError(
                    f"'{place}' belongs to the input '{item}' and will not be overwritten",
                    help="choose another name",
                )


def require_writable(path: str | Path) -> None:
    """Raise UserError for a place that `atomic_path` could not write to: sooner than after hours of work."""
    require_file(Path(path))
    folder = link_target(path).absolute().parent
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

    Where a model is there already that uses that file, they go to `<name>.data2`, and the old data are
    deleted afterwards: there is a whole pair at any time.

    Raises UserError when the place cannot be written.
    """
    import onnx_ir as ir

    from kfac_onnx.disk.streamed import holds_mapped, write_external, write_inline

    size = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    place = link_target(path)  # its data lie beside the file itself, not beside a link to it
    with pair(place) as data, atomic_path(place) as temporary:
        if str(path).endswith(TEXT_SUFFIXES):
            temporary.write_text(ir.to_onnx_text(model))
        elif holds_mapped(model):
            with temporary.open("wb") as file:
                if size <= LARGEST_FILE:
                    write_inline(model, file)
                else:
                    with (temporary.parent / data).open("wb") as beside:
                        write_external(model, file, beside, data)
        elif size > LARGEST_FILE:
            ir.save(model, str(temporary), external_data=data)  # pyright: ignore[reportUnknownMemberType]  its PathLike has no parameter
        else:
            temporary.write_bytes(ir.to_proto(model).SerializeToString())
