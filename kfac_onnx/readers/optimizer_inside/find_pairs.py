"""Which outputs of a graph are the new values of which parameters, and of which states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.values import dtype_of, static_shape
from kfac_onnx.readers.optimizer_inside.added_terms import linear_sources

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir as ir

    from kfac_onnx.readers.optimizer_inside.flow import Flow

__all__ = ["Pairs", "find_pairs", "names_agree", "scalar_losses"]

SUFFIXES: Final = ("new", "out", "output", "next", "updated", "update", "after", "post")
PREFIXES: Final = ("new", "next", "updated", "out")
SEPARATORS: Final = "_./:-"


@dataclass
class Pairs:
    """`news` maps a parameter to its new value, `ambiguous` one to several values that could be it."""

    news: dict[ir.Value, ir.Value] = field(default_factory=dict["ir.Value", "ir.Value"])
    ambiguous: dict[ir.Value, list[ir.Value]] = field(default_factory=dict["ir.Value", "list[ir.Value]"])


def scalar_losses(model: ir.Model, flow: Flow) -> list[ir.Value]:
    """Return the outputs that may be the loss: one float each, and no input passed through or counted up."""
    found: list[ir.Value] = []
    for value in dict.fromkeys(model.graph.outputs):
        shape = static_shape(value)
        dtype = dtype_of(value)
        if shape is None or any(dim != 1 for dim in shape) or len(shape) > 1:
            continue
        if dtype is None or not dtype.is_floating_point():
            continue
        if not any(static_shape(item.value) == shape for item in linear_sources(value, flow)):
            found.append(value)
    return [value for value in found if len(static_shape(value) or ()) == 0] or found


def find_pairs(model: ir.Model, flow: Flow, gradients: Collection[str]) -> Pairs:
    """Pair each parameter (a float that the loss depends on) with the output that adds to it.

    An output that no other parameter passes into is its own; of several the one with coefficient one, then
    the one named after the parameter. `gradients` are names of outputs that are gradients, not new values.
    """
    claims: dict[ir.Value, list[tuple[ir.Value, bool]]] = {}
    for value in dict.fromkeys(model.graph.outputs):
        shape, dtype = static_shape(value), dtype_of(value)
        if shape is None or dtype is None or not dtype.is_floating_point():
            continue
        if value in flow.forward or value.name in gradients or value.producer() is None:
            continue
        fitting = [
            item
            for item in linear_sources(value, flow)
            if item.added
            and static_shape(item.value) == shape
            and dtype_of(item.value) == dtype
            and (item.value in flow.forward or item.value in flow.states)
        ]
        exact = [item for item in fitting if item.exact] or fitting
        owners = [item for item in exact if item.value in flow.forward]
        if len(owners) > 1:
            owners = [item for item in owners if names_agree(item.value, value)] or owners
        if len(owners) == 1:
            claims.setdefault(owners[0].value, []).append((value, owners[0].exact))
    pairs = Pairs()
    for parameter, found in claims.items():
        best = [value for value, exact in found if exact] or [value for value, _ in found]
        named = [value for value in best if names_agree(parameter, value)]
        chosen = named if len(best) > 1 and len(named) == 1 else best
        if len(chosen) == 1:
            pairs.news[parameter] = chosen[0]
        else:
            pairs.ambiguous[parameter] = chosen
    return pairs


def names_agree(parameter: ir.Value, new: ir.Value) -> bool:
    """Say whether an output is called as a parameter's new value is: `<p>_new`, `<p>_out`, `new_<p>`, ..."""
    name, other = str(parameter.name), str(new.name)
    for separator in SEPARATORS:
        if any(other == f"{name}{separator}{word}" for word in SUFFIXES):
            return True
        if any(other == f"{word}{separator}{name}" for word in PREFIXES):
            return True
    return False
