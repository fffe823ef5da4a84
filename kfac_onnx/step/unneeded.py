"""Work that a training step need not do, found by the shapes that the graph declares.

Exporters and derivative rules write graphs for any shape: a Reshape to the shape that a value has already
(a copy, where the result leaves a session), and an Expand to a shape that the operator after it would
broadcast to by itself (a tensor written and read for nothing). Neither changes a number when it goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx

from kfac_onnx.graph.operators import Trait, having
from kfac_onnx.step.protos import Item, free_names, rename

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np

    from kfac_onnx.step.protos import Source

__all__ = ["spare"]

BROADCASTING: Final = having(Trait.BROADCASTS)
LONGEST_SHAPE: Final = 64
"""Entries of a constant that can be a shape."""

Dims = tuple[int | str, ...]


def spare(source: Source, items: Sequence[Item], wanted: Collection[str]) -> list[Item]:
    """Return the nodes so that such work is left over, in order; nobody needs the nodes that do it any more.

    Values in `wanted` are made as they were, and states are read where they were read.
    """
    shapes = _Shapes(source)
    readers: dict[str, list[Item]] = {}
    for item in items:
        for name in item.reads:
            readers.setdefault(name, []).append(item)
    same: dict[str, str] = {}
    full: set[str] = set()
    for item in items:
        node = item.node
        if node.op_type not in ("Expand", "Reshape") or node.domain not in ("", "ai.onnx"):
            continue
        made, read = node.output[0], node.input[0]
        if {made, read} & set(wanted) or made in full:
            continue
        if node.op_type == "Reshape" and shapes.keeps(node):
            same[made] = same.get(read, read)
        elif node.op_type == "Expand":
            others = [shapes.beside(reader.node, made) for reader in readers.get(made, [])]
            if all(other is not None and other not in same for other in others):
                same[made] = same.get(read, read)
                full.update(other for other in others if other is not None)
    return [_renamed(item, same) if any(name in same for name in item.reads) else item for item in items]


def _renamed(item: Item, names: Mapping[str, str]) -> Item:
    node = onnx.NodeProto()
    node.CopyFrom(item.node)
    rename(node, {name: names[name] for name in item.reads if name in names})
    return Item(node, free_names(node), item.makes, item.phase)


class _Shapes:
    """What a model says of shapes."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def of(self, name: str) -> Dims | None:
        """Return the dimensions of a value, numbers and names; None where one is unknown."""
        known = self._source.types.get(name)
        if known is None or not known.type.tensor_type.HasField("shape"):
            return None
        dims = [dim.dim_param or dim.dim_value for dim in known.type.tensor_type.shape.dim]
        return tuple(dims) if all(dims) else None

    def keeps(self, node: onnx.NodeProto) -> bool:
        """Return whether a Reshape leaves the shape as it is: all entries but one are the value's own."""
        target = self._constant(node.input[1])
        known = self._source.types.get(node.input[0])
        if target is None or known is None or not known.type.tensor_type.HasField("shape"):
            return False
        dims = [dim.dim_value for dim in known.type.tensor_type.shape.dim]
        if len(dims) != len(target) or any(item.name == "allowzero" and item.i for item in node.attribute):
            return False
        open_ends = [size for size, wanted in zip(dims, target, strict=True) if wanted not in (0, size)]
        minus = [wanted for wanted in target if wanted == -1]
        # A -1 takes what is left: its own size, where nothing else changes.
        return len(minus) == len(open_ends) <= 1

    def beside(self, node: onnx.NodeProto, name: str) -> str | None:
        """Return the other operand of a node that broadcasts, if it has the shape of this one already."""
        if node.op_type not in BROADCASTING or node.domain not in ("", "ai.onnx"):
            return None
        others = [other for other in node.input if other != name]
        dims = self.of(name)
        return others[0] if len(others) == 1 and dims is not None and self.of(others[0]) == dims else None

    def _constant(self, name: str) -> list[int] | None:
        tensor = self._source.initializers.get(name)
        if tensor is None or name in self._source.inputs or tensor.size > LONGEST_SHAPE:
            return None
        array: np.ndarray = tensor.numpy()
        return [int(entry) for entry in array.reshape(-1)]
