"""Whose fault an exception is: the graph's, if ONNX's own checks refuse the graph, otherwise ours.

The rules that read graphs rely on what the specification promises: a permutation permutes, an axis exists,
a body fits its node. Checking all of that for every graph would cost more than reading it. So it is checked
when a rule has failed: if ONNX's checker or its shape inference says that the graph is invalid, that is the
error. If they find nothing, the exception goes on, and is a bug to report.
"""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeAlias, TypeVar, cast

from kfac_onnx.disk.models import load_proto
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.graph.operators import TABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx
    import onnx_ir as ir

    Source: TypeAlias = str | Path | ir.Model | onnx.ModelProto

__all__ = ["blames_the_graph", "invalid"]

P = ParamSpec("P")
R = TypeVar("R")

LOG: Final = logging.getLogger(__name__)
LARGE: Final = 1000
"""Bytes above which only the shape of an initializer is given to ONNX's checks."""
NO_LISTS: Final = frozenset({"Squeeze", "Unsqueeze"})
"""Operators whose axes may be one number too: ONNX Runtime takes it, and some exporters write it."""
LISTS: Final = {row.name: row.lists for row in TABLE if row.name not in NO_LISTS}
"""Operator -> the inputs that are lists of integers."""


def blames_the_graph(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that it raises UserError where it fails on a graph that is invalid.

    The graph is its first argument, or the one called `source`.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            source = cast("Source", args[0] if args else kwargs["source"])
            place = str(source) if isinstance(source, (str, Path)) else None
            problem = invalid(source)
            if problem is None:
                raise
            LOG.debug("%s: %s", type(error).__name__, error)
            raise UserError(
                f"the ONNX model is invalid: {problem}", place=place, help="export it again, or copy it again"
            ) from error

    return wrapped


def invalid(source: Source) -> str | None:
    """Return why ONNX itself calls a graph invalid, None where it does not."""
    proto = _outline(source)
    for check in (_unsound, _checked, _inferred):
        problem = check(proto)
        if problem is not None:
            return problem
    return None


def _outline(source: Source) -> onnx.ModelProto:
    """Return a copy of the model in which large initializers are inputs."""
    import onnx
    import onnx_ir as ir

    proto = onnx.ModelProto()
    if isinstance(source, (str, Path)):
        proto = load_proto(source, external=False)
    elif isinstance(source, ir.Model):
        proto.CopyFrom(ir.to_proto(source))
    else:
        proto.CopyFrom(source)
    inputs = {item.name for item in proto.graph.input}
    kept: list[onnx.TensorProto] = []
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= LARGE:
            kept.append(tensor)
        elif tensor.name not in inputs:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    smaller = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(smaller)
    return proto


def _unsound(proto: onnx.ModelProto) -> str | None:
    from kfac_onnx.disk.sparse import write_out_sparse
    from kfac_onnx.disk.wellformed import require_wellformed

    try:
        write_out_sparse(proto, None)
        require_wellformed(proto, None)
    except UserError as error:
        return error.message.partition(": ")[2]
    return None


def _checked(proto: onnx.ModelProto) -> str | None:
    import onnx

    try:
        onnx.checker.check_model(proto)  # pyright: ignore[reportUnknownMemberType]  its PathLike has no parameter
    except (onnx.checker.ValidationError, RuntimeError, ValueError, UnicodeDecodeError) as error:
        return _told(error)
    return None


def _inferred(proto: onnx.ModelProto) -> str | None:
    import onnx

    from kfac_onnx.graph.inference import inferred

    try:
        found = inferred(proto, strict=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, UnicodeDecodeError) as error:
        return _told(error)
    return _no_list(found.graph, {})


def _no_list(graph: onnx.GraphProto, around: Mapping[str, int]) -> str | None:
    """Return which node reads a number or a table as a list of integers, which inference lets pass."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for item in (*graph.input, *graph.value_info, *graph.output):
        if item.type.tensor_type.HasField("shape"):
            ranks[item.name] = len(item.type.tensor_type.shape.dim)
    known = {**around, **ranks}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        for place in LISTS.get(node.op_type, ()):
            name = node.input[place] if place < len(node.input) else ""
            if known.get(name, 1) != 1:
                return f"{node.op_type} '{node.output[0]}' reads '{name}' of rank {known[name]} as a list"
        for attribute in node.attribute:
            problem = _no_list(attribute.g, known) if attribute.HasField("g") else None
            if problem is not None:
                return problem
    return None


def _told(error: Exception) -> str:
    """Return what ONNX says in one line, without its marks."""
    text = " ".join(str(error).split()) or first_line(error)
    return re.sub(r"^\[\w+\] ", "", text)[:500].rstrip(" .")
