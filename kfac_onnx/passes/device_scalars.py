"""Numbers of rows that are counted on a device, so that no arithmetic of ours runs on the host.

`Shape` and `Size` give their result on the host. ONNX Runtime then moves all that reads only such results,
inputs and small constants to the host as well, and copies what comes out back to the device in every step:
from one `Cast(Size(ids))` on, that was every counter of a factor. A kernel that *wants* a size on the host
ends such a chain, as `Expand` does. So a size n that arithmetic needs is counted instead:

    Cast(n)  becomes  Cast(ReduceSum(Expand(1, [n])))        summed in float64, so the same number

Only nodes of this package are changed; what the user's graph computes is left as it is, and reported.
Source: onnxruntime/core/framework/fallback_cpu_capability.cc, GetCpuPreferredNodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NODES_PER_COUNT", "count_on_device"]

NODES_PER_COUNT: Final = 5
"""Nodes that are added for each rewritten cast."""

_SIZES: Final = frozenset({"Shape", "Size"})
_PASSING: Final = frozenset(
    {"Add", "Cast", "Concat", "Div", "Gather", "Identity", "Max", "Min", "Mul", "ReduceProd", "Reshape",
     "Slice", "Squeeze", "Sub", "Unsqueeze"}
)  # fmt: skip
"""Operators that ONNX Runtime runs on the host where all they read is there."""
_FLOATS: Final = frozenset({int(ir.DataType.FLOAT), int(ir.DataType.DOUBLE)})


def count_on_device(model: ir.Model) -> int:
    """Rewrite, in place, every such cast that this package made; returns the number of nodes added.

    A size of another shape than `[]` or `[1]` stays as it is.
    """
    added = 0
    for graph in _graphs(model):
        for node in list(graph):
            if _is_cast_of_a_size(node):
                added += _count(graph, node)
    return added


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                yield attribute.as_graph()


def _is_ours(node: ir.Node) -> bool:
    return "kfac.pass" in node.metadata_props or (node.name or "").startswith("kfac/")


def _is_cast_of_a_size(node: ir.Node) -> bool:
    if node.op_type != "Cast" or node.domain != "" or not _is_ours(node):
        return False
    value = node.inputs[0]
    to = node.attributes.get_int("to")
    return to in _FLOATS and value is not None and _on_host(value) and _dims(node) in ((), (1,))


def _on_host(value: ir.Value) -> bool:
    """Say whether a value is computed from sizes and constants, and from a size at least."""
    sizes = 0
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        node = item.producer()
        if node is None:
            if item.const_value is None or item.is_graph_input():
                return False
        elif node.op_type in _SIZES:
            sizes += 1
        elif node.op_type in _PASSING:
            pending.extend(source for source in node.inputs if source is not None)
        elif node.op_type != "Constant":
            return False
    return sizes > 0


def _dims(cast: ir.Node) -> tuple[int, ...] | None:
    """Return the shape of a cast, which is that of its result and of what it casts; None if not known."""
    source = cast.inputs[0]
    maker = None if source is None else source.producer()
    if maker is not None and maker.op_type == "Size":
        return ()
    for value in (source, cast.outputs[0]):
        if value is not None and value.shape is not None and value.shape.is_static():
            return tuple(value.shape.numpy())
    return None


def _count(graph: ir.Graph, cast: ir.Node) -> int:
    """Put the counting nodes in the place of a cast; the result keeps its name."""
    size, result = cast.inputs[0], cast.outputs[0]
    name = str(result.name)
    dims = _dims(cast)

    def constant(what: str, array: ir.TensorProtocol) -> ir.Node:
        return made(what, "Constant", [], {"value": array}, array.dtype, list(array.shape.numpy()))

    def made(
        what: str,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, ir.TensorProtocol | int],
        dtype: ir.DataType,
        shape: list[int | None],
    ) -> ir.Node:
        output = ir.Value(name=f"{name}/{what}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return ir.Node(
            "",
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            outputs=[output],
            name=f"{name}/{what}",
            metadata_props=dict(cast.metadata_props),
        )

    flat = constant("flat", ir.tensor([-1], dtype=ir.DataType.INT64))
    unit = constant("unit", ir.tensor(1.0, dtype=ir.DataType.DOUBLE))
    length = made("length", "Reshape", [size, flat.outputs[0]], {}, ir.DataType.INT64, [1])
    each = made("each", "Expand", [unit.outputs[0], length.outputs[0]], {}, ir.DataType.DOUBLE, [None])
    number = made(
        "number",
        "ReduceSum",
        [each.outputs[0]],
        {"keepdims": int(dims == (1,))},
        ir.DataType.DOUBLE,
        list(dims or ()),
    )
    graph.insert_before(cast, [flat, unit, length, each, number])
    cast.replace_input_with(0, number.outputs[0])
    return NODES_PER_COUNT
