"""Placements that onnxruntime wrote down: profiles, and the models it optimized.

A profile (`SessionOptions.enable_profiling`) has an event for each node that ran, with its provider; copies
are events of the operators `MemcpyFromHost` and `MemcpyToHost`. The optimized model
(`SessionOptions.optimized_model_filepath`) has those as nodes, with the values they copy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from kfac_onnx.device.placement.records import CPU, Copy, Node, Placement, is_inserted
from kfac_onnx.disk.records import parse
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx

__all__ = ["copies_of", "operator_of", "read_optimized", "read_profile"]

_DIRECTIONS: Final = {"MemcpyFromHost": "to device", "MemcpyToHost": "to host"}
_KERNEL: Final = "_kernel_time"


def read_profile(path: str | Path, stage: str, provider: str, version: str = "") -> Placement:
    """Return what a profile of a session says; each node once, however often it ran.

    A profile does not name the values that are copied: a copy is named after its node, and is ours only
    when that says so.

    Raises UserError for a file that is no profile of onnxruntime.
    """
    try:
        events = parse(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"'{path}' cannot be read as a profile of onnxruntime: {e}") from e
    if not isinstance(events, list):
        raise UserError(f"'{path}' is no profile of onnxruntime: it holds no list of events")
    nodes: dict[str, Node] = {}
    copies: dict[str, Copy] = {}
    for event in events:  # pyright: ignore[reportUnknownVariableType]  JSON
        found = _kernel(event)  # pyright: ignore[reportUnknownArgumentType]
        if found is None:
            continue
        name, op_type, ran_on = found
        if op_type in _DIRECTIONS:
            copies.setdefault(name, _copy(stage, name, op_type, is_inserted(name), ()))
        else:
            nodes.setdefault(name, _node(stage, name, op_type, ran_on, provider))
    return Placement(provider, True, version, tuple(nodes.values()), tuple(copies.values()))


def _kernel(event: Any) -> tuple[str, str, str] | None:
    """Return the node, operator and provider of an event, None for an event of another kind."""
    fields = _fields(event)
    name, details = str(fields.get("name", "")), _fields(fields.get("args"))
    if fields.get("cat") != "Node" or not name.endswith(_KERNEL) or "provider" not in details:
        return None
    return name.removesuffix(_KERNEL), str(details.get("op_name", "")), str(details["provider"])


def _fields(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _node(stage: str, name: str, op_type: str, ran_on: str, provider: str) -> Node:
    return Node(stage, name, op_type, ran_on, is_inserted(name), operator_of(name), False, None)


def operator_of(name: str) -> str | None:
    """Return the `ai.kfac` operator whose body onnxruntime put a node of this name in place of."""
    if not name.startswith("_inlfunc_") or not is_inserted(name):
        return None
    return name.removeprefix("_inlfunc_").partition("_")[0]


def _copy(stage: str, value: str, op_type: str, inserted: bool, because: tuple[str, ...]) -> Copy:
    direction = "to host" if op_type == "MemcpyToHost" else "to device"
    return Copy(stage, value, direction, inserted, because)


def copies_of(model: onnx.ModelProto, stage: str, providers: Mapping[str, str]) -> tuple[Copy, ...]:
    """Return the Memcpy nodes of an optimized model, and the copies that its inputs and outputs imply.

    Inputs and outputs lie on the device: the runtime binds them there. Who makes a value on the host, or
    reads it there, is why it is copied. `providers` is where nodes run, by name: it tells which of the
    readers are meant; of those it does not know all are.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    found: list[Copy] = []
    for node in model.graph.node:
        if node.op_type not in _DIRECTIONS:
            continue
        if node.op_type == "MemcpyFromHost" and node.input[0] in makers:
            causes, value = [makers[node.input[0]]], node.input[0]
        else:
            value = node.output[0] if node.op_type == "MemcpyToHost" else node.input[0]
            readers = [item for item in model.graph.node if value in item.input and item is not node]
            causes = [item for item in readers if providers.get(item.name, CPU) == CPU] or readers
        names = tuple(item.name for item in causes)
        found.append(_copy(stage, value, node.op_type, any(is_inserted(name) for name in names), names))
    return (*found, *_implicit(model, stage, providers))


def _implicit(model: onnx.ModelProto, stage: str, providers: Mapping[str, str]) -> Iterator[Copy]:
    """Yield inputs that only nodes on the host read, and outputs that such nodes make."""
    values = {tensor.name for tensor in model.graph.initializer}
    for given in model.graph.input:
        readers = [node.name for node in model.graph.node if given.name in node.input]
        if readers and given.name not in values and all(providers.get(name) == CPU for name in readers):
            yield _implied(stage, given.name, "MemcpyToHost", readers)
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if providers.get(node.name) == CPU:
            for name in outputs.intersection(node.output):
                yield _implied(stage, name, "MemcpyFromHost", [node.name])


def _implied(stage: str, value: str, op_type: str, because: list[str]) -> Copy:
    inserted = any(is_inserted(name) for name in because)
    return dataclasses.replace(_copy(stage, value, op_type, inserted, tuple(because)), implicit=True)


def read_optimized(path: str | Path, stage: str, provider: str, version: str = "") -> Placement:
    """Return the copies in a model that onnxruntime optimized; it does not say where other nodes run.

    Raises UserError for a file that is no model.
    """
    from kfac_onnx.disk.models import load_proto

    model = load_proto(path)
    return Placement(provider, True, version, (), copies_of(model, stage, {}))
