"""Gradients given as rows and their ids: which pair of outputs belongs to which parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.canonical.row_gradients import pair_named
from kfac_onnx.errors import UserError
from kfac_onnx.graph.values import dtype_of, rank_of, static_shape
from kfac_onnx.metadata import RowGradient

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

__all__ = [
    "chosen_row_gradients",
    "following_row_gradients",
    "named_row_gradients",
]

SUFFIXES: Final = (("values", "indices"), ("rows", "ids"))
SEPARATORS: Final = "_./:"
GRADIENT: Final = "_grad"


def named_row_gradients(model: ir.Model) -> list[RowGradient]:
    """Return the pairs of outputs called `<p>_grad_values`, `<p>_grad_indices` after a parameter `<p>`.

    `<p>_values` and `<p>_indices` will do, as will rows and ids, and `.`, `/` or `:` before the last word.
    """
    outputs = {str(value.name): value for value in model.graph.outputs}
    held = {str(value.name) for value in model.graph.inputs} | set(model.graph.initializers)
    found: dict[str, RowGradient] = {}
    for name, value in outputs.items():
        for rows, ids in SUFFIXES:
            stem = name.removesuffix(rows)
            other = outputs.get(stem + ids)
            if stem == name or stem[-1:] not in SEPARATORS or other is None:
                continue
            parameter = stem[:-1] if stem[:-1] in held else stem[:-1].removesuffix(GRADIENT)
            if parameter in held and parameter not in found and _is_pair(value, other):
                found[parameter] = RowGradient(parameter, name, stem + ids)
    return list(found.values())


def following_row_gradients(model: ir.Model) -> list[RowGradient]:
    """Return the pairs of an output `<p>_grad` and the unnamed integers after it.

    A function that hands out TensorFlow's IndexedSlices as they are exports three outputs in a row: the rows
    under the gradient's name, their ids, and the shape of the parameter. They are told from a gradient like
    its parameter by that third output, or by the length of the first axis.
    """
    outputs = list(model.graph.outputs)
    parameters = {str(value.name): value for value in model.graph.inputs} | dict(model.graph.initializers)
    found: list[RowGradient] = []
    for index, value in enumerate(outputs[:-1]):
        name = str(value.name)
        parameter = parameters.get(name.removesuffix(GRADIENT)) if name.endswith(GRADIENT) else None
        shape, ids = static_shape(parameter), outputs[index + 1]
        if not shape or value.shape is None or not _is_pair(value, ids) or rank_of(ids) != 1:
            continue
        own, third = list(value.shape), outputs[index + 2] if index + 2 < len(outputs) else None
        triple = third is not None and _is_integer(third) and static_shape(third) == (len(shape),)
        other = isinstance(own[0], int) and own[0] != shape[0]
        if len(own) == len(shape) and own[1:] == list(shape[1:]) and (other or triple):
            found.append(RowGradient(name.removesuffix(GRADIENT), name, str(ids.name)))
    return found


def chosen_row_gradients(model: ir.Model, gradients: Mapping[str, str]) -> list[RowGradient]:
    """Return the pairs among gradients that the user named, as VALUES:INDICES (names may hold `:` too)."""
    known = {str(value.name): value for node in model.graph for value in node.outputs}
    known.update((str(value.name), value) for value in (*model.graph.inputs, *model.graph.outputs))
    found: list[RowGradient] = []
    for parameter, text in gradients.items():
        if text in known:
            continue
        pair = pair_named(text, known)
        if pair is None:
            continue
        if not _is_pair(known[pair[0]], known[pair[1]]):
            raise UserError(
                f"the gradient of '{parameter}' is given as '{pair[0]}' at '{pair[1]}', "
                "but those are not rows of numbers with integer ids",
                help="name the pair as --gradients PARAMETER=VALUES:INDICES",
            )
        found.append(RowGradient(parameter, *pair))
    return found


def _is_pair(values: ir.Value, indices: ir.Value) -> bool:
    rows = dtype_of(values)
    return rows is not None and rows.is_floating_point() and _is_integer(indices)


def _is_integer(value: ir.Value) -> bool:
    dtype = dtype_of(value)
    return dtype is not None and dtype.is_integer()
