"""Undoing copies of parameters that an exporter folded into constants.

A constant of two or more dimensions that equals a trained parameter, or its transpose, would keep the
parameter's first value for ever. It is replaced by an Identity or Transpose of the parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.disk.mapped import all_same, equal, windows
from kfac_onnx.graph.operators import SCATTERS
from kfac_onnx.graph.values import all_graphs, static_shape
from kfac_onnx.metadata import Refusal
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from kfac_onnx.pipeline.log import Log

__all__ = ["UndoStaleCopies", "undo_repeated_vectors", "undo_stale_copies"]


def undo_stale_copies(
    model: ir.Model, parameters: Mapping[str, ir.Value], frozen: Collection[str] = ()
) -> tuple[list[str], list[Refusal]]:
    """Replace stale copies; return a note for each and a refusal for each that could be of two parameters.

    Constants that are `frozen` on purpose stay, as a target network that starts as the trained one does.
    """
    by_shape: dict[tuple[int, ...], list[tuple[str, ir.Value, np.ndarray, bool]]] = {}
    for name, value in parameters.items():
        if value.const_value is None or len(value.const_value.shape) < 2:
            continue
        array = value.const_value.numpy()
        by_shape.setdefault(array.shape, []).append((name, value, array, False))
        if array.ndim == 2:
            by_shape.setdefault(array.shape[::-1], []).append((name, value, array.T, True))
    notes: list[str] = []
    refusals: list[Refusal] = []
    trained = set(parameters.values())
    for constant in list(_constants(model)):
        shape = static_shape(constant)
        tensor = ir.convenience.get_const_tensor(constant)
        if constant in trained or constant.name in frozen or tensor is None or shape not in by_shape:
            continue
        array = tensor.numpy()
        equal = [entry for entry in by_shape[shape] if _same(entry[2], array)]
        owners = sorted({name for name, *_ in equal})
        if not owners:
            continue
        if _uniform(array):
            if not _only_scatter_bases(constant):
                notes.append(
                    f"'{constant.name}' equals {_names(owners)}, but all its entries are equal: kept"
                )
            continue
        if len(owners) > 1:
            refusals.extend(_refusal(name, constant, owners) for name in owners)
            continue
        name, value, _, transposed = equal[0]
        _replace(model, constant, value, transposed=transposed)
        kind = "transposed copy" if transposed else "copy"
        notes.append(f"'{constant.name}' was a {kind} of '{name}': now computed from it")
    return notes, refusals


def undo_repeated_vectors(model: ir.Model, weights: Sequence[ir.Value]) -> list[str]:
    """Let initializers whose every row is one of the weights' vectors be computed from it; return notes.

    Exporters write them where they fold a layer's bias and a state of zeros: the first step of a
    recurrence. Vectors whose entries are all equal cannot be told apart, and are left as they are.
    """
    by_length: dict[int, list[tuple[ir.Value, np.ndarray]]] = {}
    for value in weights:
        shape = static_shape(value)
        if value.const_value is not None and shape is not None and len(shape) == 1:
            array = np.asarray(value.const_value.numpy())
            if not _uniform(array):
                by_length.setdefault(len(array), []).append((value, array))
    notes: list[str] = []
    for constant in list(model.graph.initializers.values()):
        shape, tensor = static_shape(constant), constant.const_value
        if tensor is None or shape is None or len(shape) < 2 or shape[-1] not in by_length:
            continue
        rows = np.asarray(tensor.numpy()).reshape(-1, shape[-1])
        owners = [value for value, array in by_length[shape[-1]] if len(rows) and _same(rows[0], array)]
        if (
            len(owners) != 1
            or constant.is_graph_input()
            or not all(bool(np.all(piece == rows[0])) for (piece,) in windows(rows))
        ):
            continue
        sizes = ir.node("Constant", [], attributes={"value_ints": list(shape)})
        sizes.outputs[0].name = f"kfac/copy/{constant.name}/shape"
        sizes.outputs[0].type, sizes.outputs[0].shape = (
            ir.TensorType(ir.DataType.INT64),
            ir.Shape([len(shape)]),
        )
        _compute(model, constant, [sizes, ir.Node("", "Expand", [owners[0], sizes.outputs[0]])])
        notes.append(f"'{constant.name}' held '{owners[0].name}' in every row: now computed from it")
    return notes


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model.graph):
        for value in graph.initializers.values():
            if not value.is_graph_input():
                yield value
        for node in graph:
            if node.op_type == "Constant" and not node.domain:
                yield node.outputs[0]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and equal(a, b)


def _uniform(array: np.ndarray) -> bool:
    return all_same(array)


def _only_scatter_bases(constant: ir.Value) -> bool:
    return all(node.op_type in SCATTERS and index == 0 for node, index in constant.uses())


def _names(owners: list[str]) -> str:
    return " and ".join(f"'{name}'" for name in owners)


def _refusal(name: str, constant: ir.Value, owners: list[str]) -> Refusal:
    return Refusal(
        parameter=name,
        path=f"constant {constant.name}",
        reason=f"the constant '{constant.name}' is a folded copy of one of {_names(owners)}, which are equal",
        remedy="export without constant folding, or from parameters with different values",
    )


def _replace(model: ir.Model, constant: ir.Value, parameter: ir.Value, *, transposed: bool) -> None:
    """Let a node at the start of the main graph produce the constant's name from the parameter."""
    attributes = [ir.AttrInt64s("perm", [1, 0])] if transposed else []
    node = ir.Node("", "Transpose" if transposed else "Identity", [parameter], attributes=attributes)
    _compute(model, constant, [node])


def _compute(model: ir.Model, constant: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes at the start of the main graph, the last of which produces the constant's name."""
    result = nodes[-1].outputs[0]
    result.name, result.type, result.shape = constant.name, constant.type, constant.shape
    if result.type is None and nodes[-1].inputs[0] is not None:
        result.type = nodes[-1].inputs[0].type
    nodes[-1].name = f"kfac/copy/{constant.name}"
    for node in nodes:
        node.metadata_props["kfac.lowered"] = "folded copy"
    constant.replace_all_uses_with(result, replace_graph_outputs=True)
    producer = constant.producer()
    if producer is not None and producer.graph is not None:
        producer.graph.remove(producer, safe=True)
    else:
        for graph in all_graphs(model.graph):
            if graph.initializers.get(constant.name or "") is constant:
                del graph.initializers[constant.name or ""]
    first = next(iter(model.graph), None)
    if first is None:
        model.graph.extend(nodes)
    else:
        model.graph.insert_before(first, nodes)


@register
@dataclass(frozen=True, kw_only=True)
class UndoStaleCopies(Pass):
    """Compute from a trained parameter what an exporter folded into a constant copy of it.

    A constant of two or more dimensions that equals a parameter becomes Identity of it, one that equals its
    transpose becomes Transpose. One that could be of two parameters refuses both; one whose entries are all
    equal stays, with a note. So do constants that were frozen on purpose, and all of a file whose exporter
    says that it folds nothing.

    Reads   `kfac.parameters`, `kfac.frozen`, `kfac.unmerged`.
    Writes  `kfac.refused`.
    """

    name: ClassVar[str] = "undo-stale-copies"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; a copy is three changes: a node more, a constant less, its readers."""
        if metadata.unmerged(model):
            return Changes()
        frozen = {item.name for item in metadata.read_list(model, "frozen", metadata.Frozen)}
        values = {str(value.name): value for value in model.graph.inputs} | dict(model.graph.initializers)
        names = [item.name for item in metadata.read_list(model, "parameters", metadata.Parameter)]
        parameters = {name: values[name] for name in names if name in values}
        notes, ambiguous = undo_stale_copies(model, parameters, frozen)
        copies = sum("computed from it" in note for note in notes)
        for note in notes:
            log.note(note)
        log.count("copies", copies)
        if ambiguous:
            refused = metadata.read_list(model, "refused", Refusal)
            metadata.write(model, "refused", [*refused, *ambiguous])
        return Changes(added=copies, removed=copies, edited=copies + len(ambiguous))
