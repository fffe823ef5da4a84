"""Signs that an exporter merged parameters that start equal, or folded a lookup of positions into a constant.

`torch.onnx.export` with `optimize=True`, its default, keeps one of several initializers with equal contents.
Weights of normalizations (all ones), biases (all zeros), slopes and scales start equal, so that layers share
a parameter that the model does not share. From the graph it is seen where a tensor whose entries are all one
number is read at several places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.disk.mapped import all_same
from kfac_onnx.graph.values import ONNX_DOMAINS, static_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import onnx_ir as ir

__all__ = ["REMEDY", "Merged", "folded_positions", "merged_parameters"]

REMEDY: Final = (
    "export with torch.onnx.export(..., optimize=False), which keeps parameters apart, or with the "
    "parameters as inputs"
)
VIEWS: Final = frozenset(
    {"Cast", "CastLike", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
MATRICES: Final = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul", "Einsum"})
LOOKUPS: Final = frozenset({"Gather", "GatherND", "GatherElements"})


@dataclass(frozen=True)
class Merged:
    """A parameter whose entries all start at `number`, and the places that read it."""

    parameter: ir.Value
    number: float
    places: tuple[ir.Node, ...]
    layers_shared: bool
    """Whether matrices are read as often, as they are where whole layers are shared by design."""

    def __str__(self) -> str:
        """Return the sentence that `check` and `differentiate` say."""
        kinds = sorted({node.op_type for node in self.places})
        return (
            f"'{self.parameter.name}' starts at {self.number:g} everywhere and is read by "
            f"{len(self.places)} nodes ({', '.join(kinds)})"
        )


def merged_parameters(
    parameters: Iterable[ir.Value],
    array_of: Callable[[ir.Value], np.ndarray | None],
    is_forward: Callable[[ir.Node], bool],
) -> list[Merged]:
    """Return the parameters that several layers read and that start at one number everywhere.

    `is_forward` says which nodes lead to the loss: those of a backward part read parameters again.
    """
    parameters = list(parameters)
    most = 1
    for value in parameters:
        readers = _readers(value, is_forward)
        if len(static_shape(value) or ()) > 1 and all(node.op_type in MATRICES for node in readers):
            most = max(most, len(readers))
    results: list[Merged] = []
    for value in parameters:
        shape = static_shape(value)
        if not shape:
            continue
        readers = _readers(value, is_forward)
        if len(readers) < 2 or any(node.op_type in LOOKUPS for node in readers):
            continue
        if int(np.prod(shape)) == 1 and not all(map(_is_of_layer, readers)):
            continue  # one number may be shared by design, as a temperature is
        array = array_of(value)
        if array is None or array.size == 0 or not all_same(array):
            continue
        number = float(array.reshape(-1)[0])
        results.append(Merged(value, number, tuple(readers), len(readers) <= most and most > 1))
    return results


def _is_of_layer(node: ir.Node) -> bool:
    """Say whether a node normalizes, or adds its bias to a product with a matrix."""
    if node.op_type == "Add":
        sources = [value.producer() for value in node.inputs if value is not None]
        return any(source is not None and source.op_type in MATRICES for source in sources)
    return node.op_type in MATRICES | {"PRelu"} or node.op_type.endswith("Normalization")


def _readers(value: ir.Value, is_forward: Callable[[ir.Node], bool]) -> list[ir.Node]:
    """Return the nodes that read a value, behind views, in order; one that reads it twice counts twice."""
    readers: list[ir.Node] = []
    stack = [value]
    while stack:
        source = stack.pop()
        for node, _ in source.uses():
            if node.op_type in ("Shape", "Size") or not is_forward(node):
                continue
            if node.op_type in VIEWS and node.domain in ONNX_DOMAINS and node.inputs[0] is source:
                stack.extend(node.outputs)
            elif node not in readers or node.op_type not in ("Mul", "Add"):  # a square is one reading
                readers.append(node)
    return readers


def folded_positions(
    parameters: Mapping[ir.Value, np.ndarray | None], is_forward: Callable[[ir.Node], bool]
) -> list[tuple[ir.Value, ir.Value]]:
    """Return tensors [.., T, D] that are added, whole, to rows of a table of width D, with that table.

    An exporter that folds constants makes one of a lookup by positions that it knows. A model may also hold
    such a tensor itself; the graph does not tell.
    """
    results: list[tuple[ir.Value, ir.Value]] = []
    for value, array in parameters.items():
        shape = static_shape(value)
        if shape is None or len(shape) < 2 or shape[-2] < 2 or any(dim != 1 for dim in shape[:-2]):
            continue
        if array is None or all_same(array):
            continue
        readers = [node for node, _ in value.uses() if is_forward(node)]
        if len(readers) != 1 or readers[0].op_type not in ("Add", "Sum"):
            continue
        for other in readers[0].inputs:
            table = None if other is None or other is value else _looked_up(other)
            if table is not None and (static_shape(table) or (0,))[-1] == shape[-1]:
                results.append((value, table))
                break
    return results


def _looked_up(value: ir.Value) -> ir.Value | None:
    """Return the table that a value's rows come from, scaled, or with other rows added to them."""
    stack, steps = [value], 0
    while stack and steps < 32:
        steps += 1
        node = stack.pop().producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            continue
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].producer() is None:
            return node.inputs[0]
        if node.op_type in ("Add", "Mul", "Div", "Cast", "Identity", "Dropout"):
            stack.extend(item for item in node.inputs if item is not None)
    return None
