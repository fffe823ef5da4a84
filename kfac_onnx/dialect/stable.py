"""The same bytes for a body in every process: onnxscript orders what a loop carries by Python's hashes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

__all__ = ["stabilize"]


def stabilize(function: onnx.FunctionProto) -> None:
    """Order the carried values of a function's loops by name, and number names in the order of their making.

    Inputs and outputs keep their names. Formulas are written so that names without their numbers differ
    among the values that one loop carries.
    """
    for node in function.node:
        if node.op_type == "Loop":
            _order(node)
    taken = {*function.input, *function.output}
    _rename(function.node, {name: name for name in taken}, taken)


def _base(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _order(loop: onnx.NodeProto) -> None:
    body = next(attribute.g for attribute in loop.attribute if attribute.name == "body")
    count = len(loop.input) - 2
    order = sorted(range(count), key=lambda index: _base(body.input[2 + index].name))
    loop.input[2:] = [loop.input[2 + index] for index in order]
    loop.output[:count] = [loop.output[index] for index in order]
    for values, first in ((body.input, 2), (body.output, 1)):
        chosen = [type(values[0]).FromString(values[first + index].SerializeToString()) for index in order]
        for place, value in enumerate(chosen):
            values[first + place].CopyFrom(value)


def _rename(nodes: Iterable[onnx.NodeProto], names: dict[str, str], taken: set[str]) -> None:
    """Rename what the nodes make and read; `names` are the new names of what was made before."""

    def fresh(name: str) -> str:
        if name and name not in names:
            number, new = 0, _base(name)
            while new in taken:
                number, new = number + 1, f"{_base(name)}_{number}"
            names[name] = new
            taken.add(new)
        return names.get(name, name)

    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                for value in graph.input:
                    value.name = fresh(value.name)
                _rename(graph.node, names, taken)
                for value in graph.output:
                    value.name = names.get(value.name, value.name)
        node.output[:] = [fresh(name) for name in node.output]
