"""Strings that a graph only encodes, encoded by the host before a step.

ONNX Runtime binds no strings to memory, so a step cannot take them. Where a graph does nothing with an input
of strings but look them up in a LabelEncoder, the input becomes int64: the number of each string among the
keys, or how many keys there are for any other. The encoder becomes a table of what it makes of each. A
session still takes strings: `kfac.vocabularies` tells it the keys.

Source: ONNX, ai.onnx.ml::LabelEncoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from kfac_onnx.pipeline.log import Log

__all__ = ["EncodeStrings"]

VIEWS: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@register
@dataclass(frozen=True, kw_only=True)
class EncodeStrings(Pass):
    """Make inputs of strings that are only looked up in a LabelEncoder inputs of numbers.

    Reads   inputs of strings, behind views.
    Adds    a table of what the encoder makes of each key, and its default last.
    Writes  `kfac.vocabularies`: the keys, by which a session encodes strings.
    """

    name: ClassVar[str] = "encode-strings"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; inputs that are read otherwise stay."""
        strings = [value for value in model.graph.inputs if value.dtype == ir.DataType.STRING]
        if not strings:
            return NO_CHANGES
        census = Census(model)
        names = Context.of(model)
        vocabularies = metadata.read_list(model, "vocabularies", metadata.Vocabulary)
        for value in strings:
            keys = _encode(value, names)
            if keys is not None:
                vocabularies.append(metadata.Vocabulary(str(value.name), keys))
                log.note(f"the strings of '{value.name}' are encoded by the host: {len(keys)} keys")
        if vocabularies:
            metadata.write(model, "vocabularies", vocabularies)
        return census.changes()


def _encode(value: ir.Value, names: Context) -> tuple[str, ...] | None:
    """Make an input of strings one of numbers; return the keys, None where something else reads it."""
    views, encoders, stack = [value], list[ir.Node](), [value]
    while stack:
        source = stack.pop()
        if source.is_graph_output():
            return None
        for node, index in source.uses():
            if node.op_type == "LabelEncoder" and node.domain == "ai.onnx.ml" and _entries(node) is not None:
                encoders.append(node)
            elif node.op_type in VIEWS and index == 0:
                views.append(node.outputs[0])
                stack.append(node.outputs[0])
            elif node.op_type not in ("Shape", "Size"):
                return None
    tables = [entries for node in encoders if (entries := _entries(node)) is not None]
    if not tables:
        return None
    keys = tuple(dict.fromkeys(key for entries, _ in tables for key in entries))
    for view in views:
        view.type = ir.TensorType(ir.DataType.INT64)
    for node, (entries, default) in zip(encoders, tables, strict=True):
        rows = [entries.get(key, default) for key in keys] + [default]
        lookup = ir.Node("", "Gather", [names.constant(np.array(rows)), node.inputs[0]], num_outputs=1)
        output = node.outputs[0]
        lookup.outputs[0].name, lookup.outputs[0].type, lookup.outputs[0].shape = (
            output.name,
            output.type,
            output.shape,
        )
        graph = node.graph
        if graph is None:
            raise AssertionError("an encoder is in no graph")
        graph.insert_before(node, lookup)
        output.replace_all_uses_with(lookup.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return keys


def _entries(node: ir.Node) -> tuple[dict[str, np.generic], np.generic] | None:
    """Return what an encoder of strings makes of each key, and of all others; None for other encoders.

    Of equal keys the last one counts, as in ONNX Runtime.
    """
    attributes = node.attributes
    if "keys_strings" in attributes:
        keys = list(attributes["keys_strings"].as_strings())
    elif "keys_tensor" in attributes and attributes["keys_tensor"].as_tensor().dtype == ir.DataType.STRING:
        keys = [_text(key) for key in attributes["keys_tensor"].as_tensor().numpy().reshape(-1)]
    else:
        return None
    default = attributes.get("default_tensor")
    if "values_int64s" in attributes:
        values = np.array(attributes["values_int64s"].as_ints(), np.int64)
        other = attributes.get("default_int64")
        fallback = np.array([-1 if other is None else other.as_int()], np.int64)
    elif "values_floats" in attributes:
        values = np.array(attributes["values_floats"].as_floats(), np.float32)
        other = attributes.get("default_float")
        fallback = np.array([-0.0 if other is None else other.as_float()], np.float32)
    elif "values_tensor" in attributes:
        values = attributes["values_tensor"].as_tensor().numpy().reshape(-1)
        fallback = np.full(1, -1 if values.dtype.kind in "iu" else -0.0).astype(values.dtype)
    else:
        return None
    if default is not None:
        fallback = default.as_tensor().numpy().reshape(-1).astype(values.dtype)
    if values.dtype.kind not in "iuf" or len(keys) != len(values) or fallback.size != 1:
        return None
    return dict(zip(keys, values, strict=True)), fallback[0]


def _text(key: object) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)
