"""Emission of the nodes that replace one node."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.values import all_graphs, static_shape

__all__ = ["HALF_TYPES", "Emit", "Lowered", "Miss", "Names", "Rule", "replace_node"]

Attributes: TypeAlias = Mapping[str, int | float | str | Sequence[int] | ir.Graph]

HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Miss:
    """Why a node cannot be lowered, as the end of a sentence."""

    reason: str


Lowered: TypeAlias = Sequence[ir.Value | None] | Miss
"""One value per output of the lowered node (None for an output that nobody reads), or why not."""


class Names:
    """Fresh value names `kfac/<stem>/<what>` and shared constants of one model, in order of creation."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._used: set[str] = set()
        self._numbers: dict[str, int] = {}
        for graph in all_graphs(model.graph):
            self._used.update(name for name in (value.name for value in graph.inputs) if name)
            self._used.update(graph.initializers)
            self._used.update(value.name for node in graph for value in node.outputs if value.name)

    def fresh(self, wanted: str) -> str:
        """Return `wanted`, or `wanted_2`, `wanted_3`, ... if it is taken."""
        number = self._numbers.get(wanted, 1)
        name = wanted if number == 1 else f"{wanted}_{number}"
        while name in self._used:
            number += 1
            name = f"{wanted}_{number}"
        self._numbers[wanted] = number
        self._used.add(name)
        return name

    def release(self, name: str) -> None:
        """Let a name be given again that no value has any more."""
        self._used.discard(name)

    def constant(self, array: np.ndarray) -> ir.Value:
        """Return an initializer of the main graph with these contents; equal contents are shared."""
        array = np.ascontiguousarray(array) if array.ndim else np.asarray(array)
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            name = self.fresh(f"kfac/lower/constant_{len(self._constants)}")
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]


class Emit:
    """Collects standard nodes that take the place of `node`.

    Every value is named `kfac/<stem>/<first output of node>/<operator>`; every node carries `kfac.lowered`
    with the operator that it came from, so that a written graph explains itself.
    """

    def __init__(self, names: Names, node: ir.Node, stem: str = "lower") -> None:
        self.names = names
        self.nodes: list[ir.Node] = []
        self._origin = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        label = next((value.name for value in node.outputs if value.name), node.name or node.op_type)
        self._prefix = f"kfac/{stem}/{label}"

    def many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: Attributes | None = None,
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        """Emit one node and return its outputs."""
        results = [ir.Value(name=self.names.fresh(f"{self._prefix}/{op_type}")) for _ in range(outputs)]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes=ir.convenience.convert_attributes(dict(attributes or {})),
            outputs=results,
            name=results[0].name,
            metadata_props={"kfac.lowered": self._origin},
        )
        self.nodes.append(node)
        return tuple(results)

    def op(
        self, op_type: str, *inputs: ir.Value | None, **attributes: int | float | str | Sequence[int]
    ) -> ir.Value:
        """Emit one standard node with one output and return that output."""
        return self.many(op_type, inputs, 1, attributes)[0]

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant int64 vector."""
        return self.names.constant(np.array(numbers, np.int64))

    def scalar(self, number: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a constant of rank 0 with this element type."""
        return self.names.constant(np.array(number).astype(dtype.numpy()))

    def cast(self, value: ir.Value, dtype: ir.DataType, current: ir.DataType | None = None) -> ir.Value:
        """Return the value with this element type; no node where `current` says that it has it already."""
        if current is not None and current == dtype:
            return value
        return self.op("Cast", value, to=int(dtype))

    def zeros(self, shape: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return zeros of a run-time shape int64[rank]."""
        zero = ir.tensor(np.zeros(1, dtype.numpy()))
        (result,) = self.many("ConstantOfShape", [shape], 1)
        producer = result.producer()
        if producer is not None:
            producer.attributes.add(ir.AttrTensor("value", zero))
        return result

    def shape(self, value: ir.Value) -> ir.Value:
        """Return the shape of a value, int64[rank]; a constant where it is static."""
        known = static_shape(value)
        return self.op("Shape", value) if known is None else self.ints(*known)

    def part(self, vector: ir.Value, start: int, end: int) -> ir.Value:
        """Return `vector[start:end]` of a vector."""
        return self.op("Slice", vector, self.ints(start), self.ints(end), self.ints(0))

    def entry(self, vector: ir.Value, index: int) -> ir.Value:
        """Return `vector[index]` of a vector, rank 0."""
        return self.op("Gather", vector, self.names.constant(np.array(index, np.int64)), axis=0)

    def concat(self, *vectors: ir.Value) -> ir.Value:
        """Return vectors joined end to end."""
        return vectors[0] if len(vectors) == 1 else self.op("Concat", *vectors, axis=0)


Rule: TypeAlias = Callable[[Emit, ir.Node], Lowered]
"""Emits the standard nodes for one node through `Emit` and returns its outputs; edits nothing."""


def replace_node(
    node: ir.Node,
    emit: Emit,
    results: Sequence[ir.Value | None],
    retired: list[ir.Node] | None = None,
) -> None:
    """Put the emitted nodes where `node` was; each result takes the name and the readers of its output.

    A result that is no output of an emitted node (an input passed through) goes through an Identity,
    because the output's name must stay. With `retired` the node is taken off its inputs and put there instead
    of being removed: the caller removes many at once, since each removal looks at all outputs of the graph.
    """
    graph = node.graph
    if graph is None:
        raise ValueError(f"node {node.name!r} is in no graph")
    old: list[ir.Value] = []
    new: list[ir.Value] = []
    for output, result in zip(node.outputs, results, strict=False):
        if result is None:
            continue
        producer = result.producer()
        if producer is None or producer not in emit.nodes or any(result is item for item in new):
            result = emit.op("Identity", result)
        old.append(output)
        new.append(result)
    if retired is None:
        ir.convenience.replace_nodes_and_values(graph, node, [node], emit.nodes, old, new)
        return
    for given, made in zip(old, new, strict=True):
        made.name = given.name or made.name
        made.type = made.type if given.type is None else given.type
        made.shape = made.shape if given.shape is None else given.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.insert_after(node, emit.nodes)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    retired.append(node)
