"""Gradients given as rows and their ids, instead of a tensor like the parameter.

TensorFlow calls such a pair IndexedSlices; exported, it is two outputs, float[N, D] and int[N]. In the
canonical graph every parameter has one gradient, so the pair is scattered into zeros of its shape; the
passes take the scatter apart again, and it costs nothing where the parameter is an embedding table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.canonical.row_sums import add_rows
from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import Emit, Names
from kfac_onnx.graph.values import dtype_of, rank_of, static_shape
from kfac_onnx.metadata import RowGradient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "chosen_row_gradients",
    "following_row_gradients",
    "named_row_gradients",
    "scatter_row_gradients",
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
        parts = text.split(":")
        splits = ((":".join(parts[:at]), ":".join(parts[at:])) for at in range(1, len(parts)))
        pair = next(((rows, ids) for rows, ids in splits if rows in known and ids in known), None)
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


def scatter_row_gradients(model: ir.Model, found: Sequence[RowGradient]) -> list[RowGradient]:
    """Append the scatter of each pair as an output beside the pair; return the pairs with its name.

    Raises:
        UserError: if a parameter is unknown, or the shape of one is.

    """
    names = Names(model)
    parameters = {str(value.name): value for value in model.graph.inputs} | dict(model.graph.initializers)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    values.update((str(value.name), value) for value in (*model.graph.inputs, *model.graph.outputs))
    done: list[RowGradient] = []
    for item in found:
        parameter, rows, ids = parameters.get(item.parameter), values[item.values], values[item.indices]
        shape, dtype = static_shape(parameter), dtype_of(rows)
        if parameter is None or shape is None or dtype is None:
            raise UserError(
                f"the gradient of '{item.parameter}' is given as rows and their ids, "
                "but the graph does not say the parameter's shape",
                path=f"outputs {item.values}, {item.indices}",
                help="export the parameter with its shape",
            )
        width = None if rows.shape is None else list(rows.shape)[1:]
        if width is not None and all(isinstance(dim, int) for dim in width) and width != list(shape[1:]):
            raise UserError(
                f"the rows of '{item.values}' have shape {width}, but those of its parameter "
                f"'{item.parameter}' have {list(shape[1:])}",
                help="name the pair that is its gradient: --gradients PARAMETER=VALUES:INDICES",
            )
        result = _scatter(names, shape, dtype, ids, rows, item, model)
        model.graph.outputs.append(result)
        done.append(replace(item, gradient=str(result.name)))
    return done


def _scatter(
    names: Names,
    shape: tuple[int, ...],
    dtype: ir.DataType,
    ids: ir.Value,
    rows: ir.Value,
    item: RowGradient,
    model: ir.Model,
) -> ir.Value:
    anchor = rows.producer() or ids.producer()
    if anchor is None:
        raise UserError(
            f"the gradient of '{item.parameter}' is given as rows and their ids that nothing computes",
            path=f"outputs {item.values}, {item.indices}",
            help="export the gradients as outputs of the training graph",
        )
    emit = Emit(names, anchor, "row-gradient")
    total = add_rows(emit, emit.ints(*shape), shape, ids, rows, dtype)
    result = emit.op("Identity", total)
    result.name = names.fresh(f"{item.parameter}{GRADIENT}")
    result.type, result.shape = ir.TensorType(dtype), ir.Shape(shape)
    model.graph.extend(emit.nodes)
    return result
