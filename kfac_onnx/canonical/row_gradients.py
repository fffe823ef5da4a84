"""Gradients given as rows and their ids, instead of a tensor like the parameter.

TensorFlow calls such a pair IndexedSlices; exported, it is two outputs, float[N, D] and int[N]. In the
canonical graph every parameter has one gradient, so the pair is scattered into zeros of its shape; the
passes take the scatter apart again, and it costs nothing where the parameter is an embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.canonical.row_sums import add_rows
from kfac_onnx.errors import UserError
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.values import dtype_of, static_shape
from kfac_onnx.metadata import RowGradient
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kfac_onnx.pipeline.log import Log

__all__ = ["ScatterRowGradients", "pair_named", "scatter_row_gradients"]

GRADIENT: Final = "_grad"


@register
@dataclass(frozen=True, kw_only=True)
class ScatterRowGradients(Pass):
    """Scatter gradients that are given as rows and their ids into tensors like their parameters.

    Each pair stays; beside it a new output `<parameter>_grad` holds the rows, added up by id. Where the ids
    join several vectors, there is one scatter per vector, and their sum.

    Writes  `kfac.row_gradients`.
    """

    name: ClassVar[str] = "scatter-row-gradients"
    pairs: tuple[str, ...] = opt((), "PARAM=VALUES:INDICES: outputs that are rows and ids of a gradient")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError for a name that is not in the graph, or a shape that does not fit the parameter's.
        """
        if not self.pairs:
            return NO_CHANGES
        census = Census(model)
        made = scatter_row_gradients(model, [_pair(text, model) for text in self.pairs])
        previous = metadata.read_list(model, "row_gradients", RowGradient)
        metadata.write(model, "row_gradients", [*previous, *made])
        log.count("gradients", len(made))
        return census.changes()


def _pair(text: str, model: ir.Model) -> RowGradient:
    parameter, _, names = text.rpartition("=")
    pair = pair_named(names, {str(value.name) for value in _values(model)})
    if pair is None:
        raise UserError(
            f"'{text}' names no rows and ids of a gradient", help="the form is PARAM=VALUES:INDICES"
        )
    return RowGradient(parameter, *pair)


def pair_named(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return the two names of VALUES:INDICES; each may hold colons itself."""
    parts = text.split(":")
    splits = ((":".join(parts[:at]), ":".join(parts[at:])) for at in range(1, len(parts)))
    return next(((rows, ids) for rows, ids in splits if rows in names and ids in names), None)


def _values(model: ir.Model) -> list[ir.Value]:
    made = [value for node in model.graph for value in node.outputs]
    return [*made, *model.graph.inputs, *model.graph.outputs]


def scatter_row_gradients(model: ir.Model, found: Sequence[RowGradient]) -> list[RowGradient]:
    """Append the scatter of each pair as an output beside the pair; return the pairs with its name.

    Raises:
        UserError: if a parameter is unknown, or the shape of one is.

    """
    names = Context.of(model)
    parameters = {str(value.name): value for value in model.graph.inputs} | dict(model.graph.initializers)
    values = {str(value.name): value for value in _values(model)}
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
    names: Context,
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
    emit = Emitter.in_place_of(names, anchor, "row-gradient")
    total = add_rows(emit, emit.ints(*shape), shape, ids, rows, dtype)
    result = emit.op("Identity", total)
    result.name = names.fresh(f"{item.parameter}{GRADIENT}")
    result.type, result.shape = ir.TensorType(dtype), ir.Shape(shape)
    model.graph.extend(emit.nodes)
    return result
