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
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.graph.operators import SIZES, Trait, having
from kfac_onnx.graph.values import all_graphs

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    added = edited = 0
    for graph in all_graphs(model.graph):
        bridge = _Bridge(graph)
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
        added += bridge.added
    return Brought(added, edited)


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
    added: int = 0
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
        phase = "gradients" if maker is None else maker.metadata_props.get("kfac.phase", "gradients")
        tags = {"kfac.pass": "lower", "kfac.phase": phase}
        make = _Maker(self.graph, before, kind, f"kfac/lower/{size.name}", tags)
        scalar = make.constant("scalar", ir.tensor([], dtype=_INT64))
        one = make.constant("one", ir.tensor(1, dtype=_INT64))
        numbers: list[ir.Value] = []
        for index in range(dims[0] if dims else 1):
            if len(dims) == 1 and dims[0] > 1:
                which = make.constant(f"which_{index}", ir.tensor(index, dtype=_INT64))
                number = make.node(f"number_{index}", "Gather", [size, which], [])
            else:
                number = make.node(f"number_{index}", "Reshape", [size, scalar], [])
            numbers.append(make.brought(f"brought_{index}", number, one))
        if not dims:
            result = make.node("brought", "Reshape", [numbers[0], scalar], [])
        elif len(numbers) == 1:
            result = numbers[0]
        else:
            result = make.node("brought", "Concat", numbers, list(dims), {"axis": 0})
        self.added += make.added
        return result


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


@dataclass
class _Maker:
    """Adds nodes in front of one node, for numbers of one type."""

    graph: ir.Graph
    before: ir.Node
    kind: ir.DataType
    prefix: str
    tags: dict[str, str]
    added: int = 0

    def node(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: list[int],
        attributes: dict[str, ir.TensorProtocol | int] | None = None,
        kind: ir.DataType | None = None,
    ) -> ir.Value:
        """Add a node and return what it makes, of this shape."""
        full = f"{self.prefix}/{name}"
        output = ir.Value(name=full, type=ir.TensorType(kind or self.kind), shape=ir.Shape(shape))
        node = ir.Node(
            "",
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes or {}),
            outputs=[output],
            name=full,
            metadata_props=dict(self.tags),
        )
        self.graph.insert_before(self.before, node)
        self.added += 1
        return output

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a constant."""
        return self.node(name, "Constant", [], list(tensor.shape.numpy()), {"value": tensor}, tensor.dtype)

    def brought(self, name: str, number: ir.Value, one: ir.Value) -> ir.Value:
        """Bring one number, a scalar on the host, to the device as [1]."""
        if self.kind == _INT64:
            after = self.node(f"{name}/after", "Add", [number, one], [])
            return self.node(name, "Range", [number, after, one], [1])
        flat = self.constant(f"{name}/flat", ir.tensor([1], dtype=_INT64))
        first = self.constant(f"{name}/first", ir.tensor([0], dtype=_INT64))
        single = self.node(f"{name}/single", "Reshape", [number, flat], [1])
        twice = self.node(f"{name}/twice", "Concat", [single, single], [2], {"axis": 0})
        spread = self.node(f"{name}/spread", "OneHot", [first, one, twice], [1, 1])
        return self.node(name, "Reshape", [spread, flat], [1])
