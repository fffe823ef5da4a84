"""Why a parameter whose rows are looked up is no table all the same: it is named, never skipped silently.

Such a parameter has a dense gradient and is trained like any other matrix, by the optimizer of the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.operators import LOOKUPS, SIZES
from kfac_onnx.graph.values import label, rank_of, static_shape
from kfac_onnx.metadata import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = ["passed_over"]

FARTHEST: Final = 4096
"""Values that are looked at on the way from a parameter to a lookup."""


def passed_over(weight: ir.Value, facts: Facts) -> Refusal | None:
    """Return which lookup reads a parameter that is no table, why it is none, and what to do; else None.

    It is followed through everything that does not depend on the batch, to an operator that reads rows of it,
    or of what is computed from it, at places that do.
    """
    if (rank_of(weight) or 0) < 2:
        return None
    stack: list[tuple[ir.Value, tuple[ir.Node, ...]]] = [(weight, ())]
    seen: set[ir.Value] = set()
    while stack and len(seen) < FARTHEST:
        value, path = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if not facts.is_forward(node) or facts.is_dead_end(node) or node.op_type in SIZES:
                continue
            places = node.inputs[1] if len(node.inputs) > 1 else None
            if (
                node.op_type in LOOKUPS
                and index == 0
                and places is not None
                and facts.depends_on_batch(places)
            ):
                return _because(weight, node, path)
            stack.extend(
                (output, (*path, node)) for output in node.outputs if not facts.depends_on_batch(output)
            )
    return None


def _because(weight: ir.Value, lookup: ir.Node, path: tuple[ir.Node, ...]) -> Refusal:
    shape = static_shape(weight) or ()
    name = str(weight.name)
    through = " -> ".join(
        [name, *(f"{node.name or node.outputs[0].name} ({node.op_type})" for node in (*path, lookup))]
    )
    if path:
        reason = (
            f"{label(lookup)} looks up rows of what {label(path[-1])} computes from it: its gradient is dense"
        )
        remedy = "look the rows up in the parameter itself, and compute with the looked-up rows"
    elif len(shape) > 2:
        rows = " x ".join(str(dim) for dim in shape)
        reason = f"{label(lookup)} looks rows up in it, and it is {rows}: a table has two dimensions"
        flat = [int(shape[0]), int(_product(shape[1:]))]
        stacked = f"[{_product(shape[:-1])}, {shape[-1]}]"
        remedy = (
            f"store it as {flat}, and reshape the looked-up rows"
            if lookup.op_type == "Gather"
            else f"store it as {stacked}, and add each part's first row to its ids"
        )
    else:
        reason = f"{label(lookup)} reads single entries of it, not rows"
        remedy = "nothing need be done: it is trained like any other matrix"
    return Refusal(name, through, reason, remedy)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
