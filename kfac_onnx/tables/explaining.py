"""Why a rule did not fit a node, as the end of a sentence: what `why` says beside each operator.

One function per operator that has a rule in `lookups.READERS` or `scatters.SCATTERS`. Each looks at what its
rule looks at, in the same order, and names the first thing that is otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.operators import PRODUCTS
from kfac_onnx.graph.values import int_attribute, rank_of, static_shape
from kfac_onnx.tables.lookups import (
    READERS,
    adds_to_activations,
    is_weight_of_product,
    slice_window,
)
from kfac_onnx.tables.scatters import SCATTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = ["OTHERWISE", "why_no_lookup", "why_no_scatter"]

OTHERWISE: Final = "it is another form of that operator"


def why_no_lookup(node: ir.Node, index: int, facts: Facts) -> str:
    """Say why an operator that uses a table (as its input `index`) does not look rows up in it."""
    if node.op_type not in READERS:
        return f"no rule reads rows through {node.op_type}; those that do are {', '.join(READERS)}"
    reason = NO_LOOKUP[node.op_type](node, index, facts)
    return f"the rule for {node.op_type} does not fit: {reason}"


def why_no_scatter(node: ir.Node, facts: Facts) -> str:
    """Say why an operator on the way to a gradient scatters no rows into it."""
    if node.op_type in SCATTERS:
        reason = NO_SCATTER[node.op_type](node, facts)
        return f"the rule for {node.op_type} does not fit: {reason}"
    view = NO_VIEW.get(node.op_type)
    if view is not None:
        return f"this {node.op_type} is no view of a gradient: {view}"
    return f"no rule scatters rows through {node.op_type}; those that do are {', '.join(SCATTERS)}"


def _name(value: ir.Value | None) -> str:
    return "an input" if value is None else f"'{value.name}'"


def _data(node: ir.Node, index: int, dims: tuple[int, ...]) -> str | None:
    """Explain what all lookups want of their data."""
    if index != 0:
        return f"the table is its input {index}, not what it reads from"
    rank, shape = rank_of(node.inputs[0]), static_shape(node.inputs[0])
    if shape is None:
        return f"the shape of {_name(node.inputs[0])} is not known"
    if rank not in dims:
        return f"{_name(node.inputs[0])} has {rank} dimensions, and a table has {' or '.join(map(str, dims))}"
    return None


def _gather(node: ir.Node, index: int, facts: Facts) -> str:
    data = _data(node, index, (2, 1))
    if data is not None:
        return data
    if facts.constant(node.inputs[1]) is None:
        return OTHERWISE
    if is_weight_of_product(node.outputs[0]):
        return "its ids are constant and its rows are the weight of a product"
    return "its ids are constant, and it takes columns"


def _gather_nd(node: ir.Node, index: int, facts: Facts) -> str:
    data = _data(node, index, (2, 1))
    if data is not None:
        return data
    if int_attribute(node, "batch_dims", 0):
        return "it has batch dimensions"
    return f"the last axis of its indices {_name(node.inputs[1])} is not 1: it reads entries, not rows"


def _gather_elements(node: ir.Node, index: int, facts: Facts) -> str:
    data = _data(node, index, (2,))
    return data or f"its indices {_name(node.inputs[1])} are not the same in every column of a row"


def _product(node: ir.Node, index: int, facts: Facts) -> str:
    if index > 1 or len(node.inputs) < 2:
        return "the table is not one of its two factors"
    return f"{_name(node.inputs[1 - index])} is not a one-hot encoding of ids"


def _slice(node: ir.Node, index: int, facts: Facts) -> str:
    data = _data(node, index, (2,))
    if data is not None:
        return data
    if not adds_to_activations(node.outputs[0]):
        return "its rows are not added to activations, as those of a position table are"
    if slice_window(node, facts) is None:
        return "its bounds are not constant, or it cuts several axes"
    return "it cuts columns"


NO_LOOKUP: Final[dict[str, Callable[[ir.Node, int, Facts], str]]] = {
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Slice": _slice,
    **dict.fromkeys(PRODUCTS, _product),
}


def _into(node: ir.Node, facts: Facts) -> str | None:
    """Explain what all scatters want of what they scatter into."""
    rank = rank_of(node.outputs[0])
    if static_shape(node.outputs[0]) is None:
        return f"the shape of {_name(node.outputs[0])} is not known"
    if rank not in (1, 2):
        return f"{_name(node.outputs[0])} has {rank} dimensions, and a table has 2 or 1"
    if not facts.is_zeros(node.inputs[0]):
        return f"it adds to {_name(node.inputs[0])}, which is not zeros"
    return None


def _adds(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.as_string() == "add"


def _scatter_nd(node: ir.Node, facts: Facts) -> str:
    indices = node.inputs[1]
    into = _into(node, facts)
    if into is not None:
        return into
    if indices is None or indices.shape is None:
        return f"the shape of its indices {_name(indices)} is not known"
    if indices.shape[-1] != 1:
        return f"the last axis of its indices {_name(indices)} is not 1: it scatters entries, not rows"
    return OTHERWISE if _adds(node) else "it does not add, and may name one place twice"


def _scatter_elements(node: ir.Node, facts: Facts) -> str:
    into = _into(node, facts)
    if into is not None:
        return into
    if not _adds(node):
        return "it does not add"
    return f"its indices {_name(node.inputs[1])} are not the same in every column of a row"


def _scattered_product(node: ir.Node, facts: Facts) -> str:
    if node.op_type == "ReduceSum":
        return "what it sums is no product with a one-hot encoding of ids"
    return "none of its operands is a one-hot encoding of ids"


NO_SCATTER: Final[dict[str, Callable[[ir.Node, Facts], str]]] = {
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    # a sum of products with a broadcast factor is a matrix product written out
    **dict.fromkeys(PRODUCTS | {"ReduceSum"}, _scattered_product),
}

NO_VIEW: Final = {
    "Add": "what it adds has different shapes",
    "Sum": "what it adds has different shapes",
    "Expand": "it broadcasts",
    "Slice": "its bounds are not constant, or it cuts several axes",
    "Split": "the lengths of its parts are not known",
    "Mul": "neither factor is smaller than the table",
    "Div": "the divisor is not smaller than the table",
    "Pad": "its widths are not constant, or it does not pad one axis by zeros",
}
"""Operators that are views in another form."""
