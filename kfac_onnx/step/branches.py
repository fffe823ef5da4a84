"""Turn the `If` nodes of a phase into a sub-model that runs only when their condition holds.

All `If` nodes of one phase with the same condition become one `Branch`: the nodes of their
then-branches side by side, leaving values under the names of the `If` outputs. The else-branches compute
nothing: each output is an `Identity` of an outer value, or a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx
from onnx import numpy_helper

from kfac_onnx.errors import VerifyError
from kfac_onnx.step.protos import rename

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from kfac_onnx.step.protos import Item

__all__ = ["Branch", "merge_branches"]


@dataclass
class Branch:
    """The merged then-branches of one condition; `otherwise` and `fixed` say what holds without it."""

    condition: str
    nodes: list[onnx.NodeProto] = field(default_factory=list[onnx.NodeProto])
    outputs: list[str] = field(default_factory=list[str])
    initializers: list[onnx.TensorProto] = field(default_factory=list[onnx.TensorProto])
    otherwise: dict[str, str] = field(default_factory=dict[str, str])
    fixed: dict[str, np.ndarray] = field(default_factory=dict[str, "np.ndarray"])

    def precede(self, items: Sequence[Item]) -> None:
        """Put nodes that nobody else needs in front; what they make exists only where the branch runs."""
        self.nodes[:0] = [item.node for item in items]
        self.outputs.extend(name for item in items for name in item.makes if name)


def merge_branches(items: Sequence[Item]) -> list[Branch]:
    """Merge `If` nodes by condition, in the order in which the conditions first appear."""
    branches: dict[str, Branch] = {}
    for index, item in enumerate(items):
        condition = item.node.input[0]
        branch = branches.setdefault(condition, Branch(condition))
        graphs = {attribute.name: attribute.g for attribute in item.node.attribute}
        _add_then(branch, item.node, graphs["then_branch"], f"{index}/")
        _add_else(branch, item.node, graphs["else_branch"])
    return list(branches.values())


def _add_then(branch: Branch, owner: onnx.NodeProto, graph: onnx.GraphProto, prefix: str) -> None:
    """Copy the then-branch: inner names get a prefix, except those that are the `If`'s outputs."""
    inner = {name for node in graph.node for name in node.output if name}
    inner.update(tensor.name for tensor in graph.initializer)
    made = {name for node in graph.node for name in node.output}
    names = {name: f"kfac/branch/{prefix}{name}" for name in inner}
    copies: list[tuple[str, str]] = []
    claimed: set[str] = set()
    for value, output in zip(graph.output, owner.output, strict=True):
        if not output:
            continue
        if value.name in made and value.name not in claimed:
            names[value.name] = output
            claimed.add(value.name)
        else:
            copies.append((value.name, output))
        branch.outputs.append(output)
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        rename(copy, names)
        branch.nodes.append(copy)
    for tensor in graph.initializer:
        moved = onnx.TensorProto()
        moved.CopyFrom(tensor)
        moved.name = names[tensor.name]
        branch.initializers.append(moved)
    branch.nodes.extend(
        onnx.helper.make_node("Identity", [names.get(name, name)], [output], name=f"kfac/branch/{output}")
        for name, output in copies
    )


def _add_else(branch: Branch, owner: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    makers = {name: node for node in graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for value, output in zip(graph.output, owner.output, strict=True):
        if not output:
            continue
        name = value.name
        while name in makers and makers[name].op_type == "Identity":
            name = makers[name].input[0]
        if name in tensors:
            branch.fixed[output] = numpy_helper.to_array(tensors[name])
        elif name in makers:
            branch.fixed[output] = _constant(makers[name], output)
        else:
            branch.otherwise[output] = name


def _constant(node: onnx.NodeProto, output: str) -> np.ndarray:
    import numpy as np

    if node.op_type == "Constant":
        attribute = node.attribute[0]
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        if attribute.name in ("value_float", "value_floats"):
            return np.asarray(onnx.helper.get_attribute_value(attribute), np.float32)
        if attribute.name in ("value_int", "value_ints"):
            return np.asarray(onnx.helper.get_attribute_value(attribute), np.int64)
    message = f"the else-branch of '{output}' computes something ({node.op_type})"
    raise VerifyError(message)
