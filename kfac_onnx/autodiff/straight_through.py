"""Pairs of QuantizeLinear and DequantizeLinear as one node, while a graph is differentiated.

The node has a derivative (`rules_quantize`), the two operators have none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.rules_quantize import DOMAIN, PAIR
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.values import ONNX_DOMAINS, constant, dtype_of, int_attribute, rank_of

__all__ = ["join_pairs", "part_pairs"]


def join_pairs(model: ir.Model) -> int:
    """Replace each QuantizeLinear with its DequantizeLinear by one node, in place; return how many pairs.

    A table of one scale whose rows are looked up is quantized after the lookup, which gives the same rows
    and leaves a lookup of the table itself.
    """
    names, count = Context.of(model), 0
    for node in list(model.graph):
        first = _quantizer(node)
        if first is None or node.graph is None:
            continue
        x, scale = first.inputs[0], first.inputs[1]
        if x is None or scale is None:
            continue
        count += 1
        if x.is_initializer() and rank_of(scale) == 0:
            _look_up_first(node, x, names)
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            node.graph.remove(node, safe=True)
            if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
                model.graph.remove(first, safe=True)
            continue
        _join(node, first, x, names)
    return count


def _quantizer(node: ir.Node) -> ir.Node | None:
    """Return the QuantizeLinear whose result, and with whose scale, a DequantizeLinear scales back."""
    if node.op_type != "DequantizeLinear" or node.domain not in ONNX_DOMAINS or node.inputs[0] is None:
        return None
    first = node.inputs[0].producer()
    if first is None or first.op_type != "QuantizeLinear" or first.domain not in ONNX_DOMAINS:
        return None
    same = all(_equal(one, other) for one, other in zip(_scale_of(first), _scale_of(node), strict=True))
    axes = {int_attribute(item, "axis", 1) for item in (first, node)} if rank_of(node.inputs[1]) else {1}
    blocks = any(int_attribute(item, "block_size", 0) for item in (first, node))
    return first if same and len(axes) == 1 and not blocks else None


def _scale_of(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    return node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None


def _equal(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    first, second = constant(one), constant(other)
    return first is not None and second is not None and np.array_equal(first, second)


def _look_up_first(node: ir.Node, table: ir.Value, names: Context) -> None:
    """Put the lookups of a quantized table before its quantization."""
    first = node.inputs[0].producer() if node.inputs[0] is not None else None
    for reader, index in list(node.outputs[0].uses()):
        if first is None or index or reader.op_type != "Gather" or reader.graph is not node.graph:
            continue
        found = reader.outputs[0]
        rows = ir.Node(
            "", "Gather", [table, reader.inputs[1]], list(reader.attributes.values()), num_outputs=1
        )
        pair = [rows]
        for part in (first, node):
            copy = ir.Node(
                "",
                part.op_type,
                [pair[-1].outputs[0], *part.inputs[1:]],
                list(part.attributes.values()),
                num_outputs=1,
            )
            pair.append(copy)
        for made, like in zip(pair, (found, node.inputs[0], found), strict=True):
            made.outputs[0].name = names.fresh(f"kfac/rows/{found.name}/{made.op_type}")
            made.outputs[0].shape = found.shape
            made.outputs[0].type = None if like is None else like.type
        graph = reader.graph
        if graph is None:
            continue
        graph.insert_before(reader, pair)
        _join(pair[2], pair[1], rows.outputs[0], names)
        last = next(node for node, _ in rows.outputs[0].uses()).outputs[0]
        _hand_over(found, last)
        graph.remove(reader, safe=True)


def _hand_over(old: ir.Value, new: ir.Value) -> None:
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.before", name


def _join(node: ir.Node, first: ir.Node, x: ir.Value, names: Context) -> None:
    output = node.outputs[0]
    dtype = dtype_of(first.outputs[0]) or ir.DataType.UINT8
    pair = ir.Node(
        DOMAIN,
        PAIR,
        [x, *first.inputs[1:3]],
        attributes=[ir.AttrInt64("axis", int_attribute(first, "axis", 1)), ir.AttrInt64("to", int(dtype))],
        num_outputs=1,
    )
    made = pair.outputs[0]
    made.name, made.type, made.shape = names.fresh(f"{output.name}.pair"), output.type, output.shape
    if node.graph is None:
        raise AssertionError("the node is in no graph")
    node.graph.insert_before(node, pair)
    _hand_over(output, made)
    graph = node.graph
    graph.remove(node, safe=True)
    if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
        graph.remove(first, safe=True)


def part_pairs(model: ir.Model) -> None:
    """Put the two standard operators back in the place of each node that `join_pairs` made."""
    names = Context.of(model)
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, PAIR) or node.graph is None:
            continue
        axis = ir.AttrInt64("axis", int_attribute(node, "axis", 1))
        dtype = ir.DataType(int_attribute(node, "to", int(ir.DataType.UINT8)))
        settings = [axis] if rank_of(node.inputs[1]) else []
        first = ir.Node("", "QuantizeLinear", list(node.inputs), attributes=settings, num_outputs=1)
        if (len(node.inputs) < 3 or node.inputs[2] is None) and dtype != ir.DataType.UINT8:
            first.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(dtype))
        second = ir.Node(
            "", "DequantizeLinear", [first.outputs[0], *node.inputs[1:]], attributes=settings, num_outputs=1
        )
        output = node.outputs[0]
        first.outputs[0].name = names.fresh(f"{output.name}.quantized")
        first.outputs[0].type, first.outputs[0].shape = ir.TensorType(dtype), output.shape
        second.outputs[0].name = names.fresh(f"{output.name}.pair")
        second.outputs[0].type, second.outputs[0].shape = output.type, output.shape
        node.graph.insert_before(node, [first, second])
        _hand_over(output, second.outputs[0])
        node.graph.remove(node, safe=True)
