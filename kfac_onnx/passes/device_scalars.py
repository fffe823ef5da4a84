"""Sizes that arithmetic on a device needs, brought there without a copy.

`Shape` and `Size` give their result on the host. ONNX Runtime then moves all that reads only such results,
inputs and small constants to the host as well, and copies what comes out back to the device in every step:
from one `Cast(Size(ids))` on, that was every counter of a factor. A kernel that *wants* a size on the host
ends such a chain and copies nothing: `Range` takes its bounds there and makes its result on the device. So
where a node of ours has a size n among its numbers, it reads instead

    Range(n, n + 1, 1)         the one number n, on the device; for a vector of sizes, one after the other
    OneHot([0], 1, [x, x])     the same for a float32 x that the user's graph computes of sizes

Only nodes of this package are changed; what the user's graph computes is left as it is, and reported.
Source: onnxruntime/core/framework/fallback_cpu_capability.cc, GetCpuPreferredNodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.operators import SIZES, Trait, having
from kfac_onnx.graph.values import all_graphs
from kfac_onnx.metadata import Phase

__all__ = ["Brought", "bring_sizes_to_device"]

_INT64: Final = ir.DataType.INT64
_PASSING: Final = having(Trait.HOST)
_REST: Final = frozenset(range(1, 16))
_ON_HOST: Final = {
    **dict.fromkeys(("ConstantOfShape", "If"), frozenset({0})),
    "Loop": frozenset({0, 1}),
    "Range": frozenset({0, 1, 2}),
    **dict.fromkeys(having(Trait.SETTINGS), _REST),
}
"""Inputs that kernels take from the host anyway."""
_LONGEST: Final = 16
"""Sizes in a vector that is brought over one by one; a shape has fewer."""


@dataclass(frozen=True)
class Brought:
    """Changes: nodes added, and inputs of other nodes that read what those make."""

    added: int
    edited: int


def bring_sizes_to_device(model: ir.Model) -> Brought:
    """Rewrite, in place, what nodes of this package read; a size of unknown shape stays as it is."""
    edited = 0
    emitter = Emitter(model, "lower")
    for graph in all_graphs(model.graph):
        bridge = _Bridge(graph, emitter)
        for node in list(graph):
            if not _is_ours(node) or _is_host_work(node):
                continue
            for place, value in enumerate(node.inputs):
                if value is None or place in _ON_HOST.get(node.op_type, ()):
                    continue
                kind = _host_kind(value)
                brought = None if kind is None else bridge.over(value, kind, node)
                if brought is not None:
                    node.replace_input_with(place, brought)
                    edited += 1
    return Brought(emitter.changes.added, edited)


def _is_ours(node: ir.Node) -> bool:
    """Say whether a node is this package's; operators of the dialect see to their sizes themselves."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return "kfac.pass" in node.metadata_props or (node.name or "").startswith("kfac/")


def _is_host_work(node: ir.Node) -> bool:
    """Say whether a node reads sizes and constants alone and makes sizes of them."""
    if node.op_type in SIZES:
        return True
    return _passes(node) and all(
        value is None or _is_constant(value) or _host_kind(value) == _INT64 for value in node.inputs
    )


def _passes(node: ir.Node) -> bool:
    """Say whether a node makes sizes of sizes; a cast does where it stays with int64."""
    if node.op_type not in _PASSING or node.domain not in ("", "ai.onnx"):
        return False
    return node.op_type != "Cast" or node.attributes.get_int("to") == _INT64


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None:
        return node.op_type == "Constant"
    return value.const_value is not None and not value.is_graph_input()


def _host_kind(value: ir.Value) -> ir.DataType | None:
    """Return the type of a value that is computed from sizes and constants, a size at least; None of others.

    A node of ours that makes anything but sizes is on the device.
    """
    sizes = 0
    floats = False
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        node = item.producer()
        if node is None or node.op_type == "Constant":
            if not _is_constant(item):
                return None
        elif node.op_type in SIZES and node.domain in ("", "ai.onnx"):
            sizes += 1
        elif _passes(node) or (node.op_type == "Cast" and not _is_ours(node)):
            floats = floats or not _passes(node)
            pending.extend(source for source in node.inputs if source is not None)
        else:
            return None
    if not sizes:
        return None
    return value.dtype if value.dtype is not None or floats else _INT64


@dataclass
class _Bridge:
    """Makes the nodes of one graph that bring its sizes over, those of each size once."""

    graph: ir.Graph
    emitter: Emitter
    _done: dict[int, ir.Value] = field(default_factory=dict[int, ir.Value])

    def over(self, size: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value | None:
        """Return a size as a value on the device, None where its shape is not known, or of other types."""
        dims = _dims(size, reader)
        if kind not in (_INT64, ir.DataType.FLOAT):
            return None
        if dims is None or len(dims) > 1 or (dims and not 0 < dims[0] <= _LONGEST):
            return None
        if id(size) not in self._done:
            self._done[id(size)] = self._bring(size, kind, dims, reader)
        return self._done[id(size)]

    def _bring(self, size: ir.Value, kind: ir.DataType, dims: tuple[int, ...], reader: ir.Node) -> ir.Value:
        maker = size.producer()
        before = reader if maker is None or maker.graph is not self.graph else _next(maker, reader)
        phase = Phase.GRADIENTS
        if maker is not None and "kfac.phase" in maker.metadata_props:
            phase = Phase(maker.metadata_props["kfac.phase"])
        emit, label = self.emitter.derive(phase=phase, graph=self.graph, before=before), str(size.name)
        scalar = _number(emit, f"{label}/scalar", ir.tensor([], dtype=_INT64))
        one = _number(emit, f"{label}/one", ir.tensor(1, dtype=_INT64))
        numbers: list[ir.Value] = []
        for index in range(dims[0] if dims else 1):
            if len(dims) == 1 and dims[0] > 1:
                which = _number(emit, f"{label}/which_{index}", ir.tensor(index, dtype=_INT64))
                number = emit.op("Gather", size, which, name=f"{label}/number_{index}")
            else:
                number = emit.op("Reshape", size, scalar, name=f"{label}/number_{index}")
            numbers.append(_brought(emit, f"{label}/brought_{index}", number, one, kind))
        if not dims:
            return emit.op("Reshape", numbers[0], scalar, name=f"{label}/brought")
        return (
            numbers[0] if len(numbers) == 1 else emit.op("Concat", *numbers, name=f"{label}/brought", axis=0)
        )


def _next(maker: ir.Node, reader: ir.Node) -> ir.Node:
    """Return the node behind the maker of a size, so that every later reader finds it brought over."""
    following = maker
    graph = maker.graph
    if graph is not None:
        nodes = iter(graph)
        for node in nodes:
            if node is maker:
                following = next(nodes, reader)
                break
    return following


def _dims(size: ir.Value, reader: ir.Node) -> tuple[int, ...] | None:
    """Return a size's shape; that of a cast is also its result's."""
    maker = size.producer()
    if maker is not None and maker.op_type == "Size":
        return ()
    if maker is not None and maker.op_type == "Shape":
        source = maker.inputs[0]
        if source is not None and source.shape is not None:
            axes = range(source.shape.rank())
            return (len(axes[maker.attributes.get_int("start", 0) : maker.attributes.get_int("end", None)]),)
    for value in (size, *(reader.outputs if reader.op_type == "Cast" else ())):
        if value.shape is not None and value.shape.is_static():
            return tuple(value.shape.numpy())
    return None


def _number(emit: Emitter, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a constant as a node, beside what reads it."""
    return emit.op("Constant", name=name, value=tensor)


def _brought(emit: Emitter, name: str, number: ir.Value, one: ir.Value, kind: ir.DataType) -> ir.Value:
    """Bring one number, a scalar on the host, to the device as [1]."""
    if kind == _INT64:
        after = emit.op("Add", number, one, name=f"{name}/after")
        return emit.op("Range", number, after, one, name=name)
    flat = _number(emit, f"{name}/flat", ir.tensor([1], dtype=_INT64))
    first = _number(emit, f"{name}/first", ir.tensor([0], dtype=_INT64))
    single = emit.op("Reshape", number, flat, name=f"{name}/single")
    twice = emit.op("Concat", single, single, name=f"{name}/twice", axis=0)
    spread = emit.op("OneHot", first, one, twice, name=f"{name}/spread")
    return emit.op("Reshape", spread, flat, name=name)
