"""ONNX's own training standard: `ModelProto.training_info`, joined with the inference graph.

The standard's training graph is the inference graph followed by an `algorithm` graph, which may read the
inference graph's values by name; `update_binding` says which of its outputs is the next value of which
initializer. `onnx_ir` drops all this, so the two graphs are joined on the proto, before it is read.

Source: onnx.proto3, message TrainingInfoProto.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import onnx
import onnx_ir as ir

from kfac_onnx.canonical.lowering.optimizers import TRAINING_DOMAIN
from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.disk.models import load_proto
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from kfac_onnx.readers.load import Exported

__all__ = ["Training", "initial_values", "with_algorithm"]

GRADIENT: Final = "Gradient"


@dataclass(frozen=True)
class Training:
    """What a model's `training_info` says besides its nodes.

    `updates` maps an initializer to the value that it becomes, `initialized` lists the initializers that
    the file has an initialization for, `optimizers` describes the optimizer nodes, one sentence each.
    """

    updates: dict[str, str]
    initialized: tuple[str, ...]
    optimizers: tuple[str, ...]
    steps: int
    """How many consecutive steps compute gradients."""


def with_algorithm(exported: Exported) -> tuple[Exported, Training | None]:
    """Return the model joined with its training algorithms, and what they bind; without one, as it was.

    Raises:
        UserError: if the joined graph is malformed, or a binding names what is not there.

    """
    proto, place = exported.proto, exported.place
    if proto is None or not any(len(info.algorithm.node) for info in proto.training_info):
        return exported, None
    joined = onnx.ModelProto()
    joined.CopyFrom(proto)
    del joined.training_info[:]
    updates: dict[str, str] = {}
    initialized: list[str] = []
    optimizers: list[str] = []
    steps = 0
    for index, info in enumerate(proto.training_info):
        algorithm = _own_names(info.algorithm, joined.graph, index)
        renamed = dict(zip(_names_of(info.algorithm), _names_of(algorithm), strict=True))
        for item in info.update_binding:
            key, value = renamed.get(item.key, item.key), renamed.get(item.value, item.value)
            if key in updates:
                raise UserError(
                    f"training_info binds '{item.key}' to two new values",
                    place=place,
                    help="an initializer may be a key of update_binding once, in all training_info together",
                )
            updates[key] = value
        initialized += [item.key for item in info.initialization_binding]
        optimizers += [_describe(node, algorithm) for node in algorithm.node if _is_optimizer(node)]
        steps += any(node.op_type == GRADIENT for node in algorithm.node)
        _append(joined.graph, algorithm)
    _check(joined.graph, updates, place)
    try:
        model = ir.from_proto(joined)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the training_info of the ONNX model is malformed: {first_line(error)}", place=place
        ) from error
    training = Training(updates, tuple(dict.fromkeys(initialized)), tuple(optimizers), steps)
    return replace(exported, model=model), training


def _append(graph: onnx.GraphProto, algorithm: onnx.GraphProto) -> None:
    """Add an algorithm's nodes, inputs, outputs and initializers; what is there already stays as it is."""
    computed = {name for node in graph.node for name in node.output}
    held = computed | {item.name for item in (*graph.input, *graph.initializer)}
    held |= {item.values.name for item in graph.sparse_initializer}
    graph.input.extend(item for item in algorithm.input if item.name not in held)
    graph.initializer.extend(item for item in algorithm.initializer if item.name not in held)
    graph.sparse_initializer.extend(algorithm.sparse_initializer)
    graph.node.extend(algorithm.node)
    outputs = {item.name for item in graph.output}
    graph.output.extend(item for item in algorithm.output if item.name not in outputs)
    graph.value_info.extend(algorithm.value_info)
    graph.quantization_annotation.extend(algorithm.quantization_annotation)


def _names_of(graph: onnx.GraphProto) -> list[str]:
    """Return the names that a graph defines, in order: initializers, inputs, results of nodes."""
    names = [item.name for item in graph.initializer]
    names += [item.values.name for item in graph.sparse_initializer]
    names += [item.name for item in graph.input]
    return names + [name for node in graph.node for name in node.output]


def _own_names(algorithm: onnx.GraphProto, graph: onnx.GraphProto, index: int) -> onnx.GraphProto:
    """Return an algorithm whose states and results have names of their own, also beside earlier algorithms.

    The first is returned as it is: the standard wants its names to differ from the inference graph's.
    """
    copy = onnx.GraphProto()
    copy.CopyFrom(algorithm)
    if index == 0:
        return copy
    taken = {name for node in graph.node for name in node.output} | {item.name for item in graph.initializer}
    own = [item.name for item in copy.initializer] + [name for node in copy.node for name in node.output]
    mapping = {name: f"{name}.step{index + 1}" for name in own if name and name in taken}
    if mapping:
        _rename(copy, mapping)
    return copy


def _rename(graph: onnx.GraphProto, mapping: dict[str, str]) -> None:
    for item in (*graph.initializer, *graph.output, *graph.value_info):
        item.name = mapping.get(item.name, item.name)
    for node in graph.node:
        _replace(node.input, mapping)
        _replace(node.output, mapping)
        for attribute in node.attribute:
            if node.op_type == GRADIENT and node.domain == TRAINING_DOMAIN:
                attribute.s = mapping.get(attribute.s.decode(), attribute.s.decode()).encode()
                names = [mapping.get(name.decode(), name.decode()).encode() for name in attribute.strings]
                del attribute.strings[:]
                attribute.strings.extend(names)
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, mapping)


def _replace(names: Sequence[str], mapping: dict[str, str]) -> None:
    for index, name in enumerate(names):
        if name in mapping:
            names[index] = mapping[name]  # pyright: ignore[reportIndexIssue]  a repeated field of protobuf


def _check(graph: onnx.GraphProto, updates: dict[str, str], place: str | None) -> None:
    held = {item.name for item in graph.initializer}
    known = held | {name for node in graph.node for name in node.output} | {item.name for item in graph.input}
    for key, value in updates.items():
        if key not in held | {item.name for item in graph.input}:
            raise UserError(
                f"training_info updates '{key}', which is no initializer of the model",
                place=place,
                help="the keys of update_binding are initializers of the graph or of the algorithm",
            )
        if value not in known:
            raise UserError(
                f"training_info updates '{key}' with '{value}', which nothing computes",
                place=place,
                help="the values of update_binding are outputs of the algorithm or of the graph",
            )


def _is_optimizer(node: onnx.NodeProto) -> bool:
    return node.domain == TRAINING_DOMAIN and node.op_type != GRADIENT


def _describe(node: onnx.NodeProto, algorithm: onnx.GraphProto) -> str:
    """Return an optimizer node's name and settings: `Adam (learning rate 0.1, alpha 0.9)`."""
    settings: list[str] = []
    rate = next((item for item in algorithm.initializer if node.input and item.name == node.input[0]), None)
    if rate is not None:
        number = onnx.numpy_helper.to_array(rate).reshape(-1)
        settings += [f"learning rate {float(number[0]):.6g}"] if number.size == 1 else []
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        text = value.decode() if isinstance(value, bytes) else f"{value:.6g}"
        settings.append(f"{attribute.name} {text}")
    return f"{node.op_type} ({', '.join(settings)})"


def initial_values(source: str | Path | onnx.ModelProto) -> dict[str, np.ndarray]:
    """Run a model's own initialization and return what it binds to initializers of the inference graph.

    Random operators without a seed draw anew each time.

    Raises:
        UserError: if the model has no initialization, or onnxruntime cannot run it.

    """
    import onnxruntime

    proto = source if isinstance(source, onnx.ModelProto) else load_proto(source)
    place = None if isinstance(source, onnx.ModelProto) else str(source)
    names = {item.name for item in proto.graph.initializer}
    values: dict[str, np.ndarray] = {}
    for info in proto.training_info:
        bound = {item.key: item.value for item in info.initialization_binding if item.key in names}
        if not bound:
            continue
        model = onnx.ModelProto(
            ir_version=min(proto.ir_version, 10),
            opset_import=[item for item in proto.opset_import if item.domain != TRAINING_DOMAIN],
            functions=proto.functions,
            graph=info.initialization,
        )
        model.graph.name = model.graph.name or "initialization"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            results = session.run(list(bound.values()), {})
        except Exception as error:
            if not from_onnxruntime(error):
                raise
            raise UserError(
                f"the initialization of training_info cannot be run: {first_line(error)}",
                place=place,
                help="leave --initialize out: training then starts from the values that are stored",
            ) from error
        values.update(zip(bound, results, strict=True))
    if not values:
        raise UserError(
            "the model has no initialization: no training_info binds an initializer to a first value",
            place=place,
            help="leave --initialize out: training then starts from the values that are stored",
        )
    return values
