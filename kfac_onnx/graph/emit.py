"""How nodes are added to a model: named uniquely, tagged with who added them, typed and shaped, and counted.

```python
emit = Emitter(model, "insert-embedding-kfac", site="emb.weight", phase=Phase.PRECONDITION)
damping = emit.op("Mul", total, emit.constant(np.float32(0.01), "rho"), name="damping")
ids, sums = emit.many("MergeRows", [ids, rows], ["unique_ids", "sums"], domain="ai.kfac")
return emit.changes
```

An emitter writes at the end of a graph, before a node, or collects the nodes that are to replace one node
(`Emitter.in_place_of`, then `replace_node`). Names are `<prefix>/<what>`, made unique by a number; the prefix
says who emits for what:

    kfac/<pass>/<what>, kfac/<pass>/<site>/<what>       a pass, for one parameter
    kfac/<pass>/<first output of the node>/<what>       in the place of a node
    gradient/<first output of the node>/<what>          the gradient of a node

Nodes carry `kfac.pass`, `kfac.site` (the parameter), `kfac.phase` and `kfac.lowered` (the operator in whose
place they are) in their metadata, as far as these apply. What type and shape an output has is inferred from
the inputs (`graph.node_inference`); `Out` says it where the operator is not of the standard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.changes import Changes
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.node_inference import describe_outputs
from kfac_onnx.graph.values import static_shape

if TYPE_CHECKING:
    import numpy.typing as npt

    from kfac_onnx.metadata import Phase

__all__ = [
    "HALF_TYPES",
    "Attribute",
    "Dims",
    "Emitter",
    "Lowered",
    "Miss",
    "Out",
    "Rule",
    "replace_node",
]

Attribute: TypeAlias = (
    int | float | str | Sequence[int] | Sequence[float] | ir.Graph | ir.TensorProtocol | ir.Attr
)
"""What an attribute of a node may be given as; one of another node stays as it is, name included."""
Dims: TypeAlias = Sequence[int | str | None] | ir.Shape
"""A shape: numbers, names of symbolic dimensions, None for an unknown one; or another value's."""

HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Miss:
    """Why a node cannot be lowered, as the end of a sentence."""

    reason: str


Lowered: TypeAlias = Sequence[ir.Value | None] | Miss
"""One value per output of the lowered node (None for an output that nobody reads), or why not."""


@dataclass(frozen=True)
class Out:
    """One output of a node: its short name, and dtype and shape where they are known."""

    name: str
    dtype: ir.DataType | None = None
    shape: Dims | None = None


@dataclass
class _Counts:
    """What the emitters of one run of a pass have changed together."""

    added: int = 0
    removed: int = 0
    edited: int = 0


class Emitter:
    """Adds nodes, constants, inputs and outputs to `model`, and counts every change.

    `site` is the parameter that the nodes serve, `phase` their phase unless a call says another. Nodes go to
    the end of `graph` (default: the main one), or before the node `before`. A collecting emitter puts them
    into `nodes` instead.
    """

    def __init__(
        self,
        model: ir.Model,
        pass_name: str,
        *,
        site: str | None = None,
        phase: Phase | None = None,
        graph: ir.Graph | None = None,
        before: ir.Node | None = None,
    ) -> None:
        self.context = Context.of(model)
        self.model = model
        self.pass_name = pass_name
        self.site = site
        self.phase = phase
        self._graph: ir.Graph | None = model.graph if graph is None else graph
        self.before = before
        self.nodes: list[ir.Node] = []
        """What a collecting emitter has emitted, in order."""
        self._tags = {"kfac.pass": pass_name}
        self._prefix = f"kfac/{pass_name}" if site is None else f"kfac/{pass_name}/{site}"
        self._counts = _Counts()

    @property
    def graph(self) -> ir.Graph:
        """The graph that nodes go to.

        Raises ValueError for an emitter that collects nodes.
        """
        if self._graph is None:
            raise ValueError("an emitter that collects nodes has no graph")
        return self._graph

    @property
    def changes(self) -> Changes:
        """Everything done so far through this emitter and those derived from it."""
        return Changes(self._counts.added, self._counts.removed, self._counts.edited)

    def derive(
        self,
        *,
        site: str | None = None,
        phase: Phase | None = None,
        graph: ir.Graph | None = None,
        before: ir.Node | None = None,
    ) -> Emitter:
        """Return an emitter of the same pass for another site, phase, graph or place; counts are shared.

        `site`, `phase` and `graph` are this emitter's unless given; `before` is not inherited.
        """
        other = Emitter(
            self.model,
            self.pass_name,
            site=site if site is not None else self.site,
            phase=phase if phase is not None else self.phase,
            graph=graph if graph is not None else self._graph,
            before=before,
        )
        other._counts = self._counts
        return other

    def branch(self, name: str) -> Emitter:
        """Return an emitter whose graph is new and empty: the body of an `If`, for a node's attributes.

        The caller fills it, extends `branch.graph.outputs`, and passes `branch.graph` as the attribute.
        """
        return self.derive(graph=ir.Graph([], [], nodes=[], name=self.context.fresh(self._full(name))))

    @classmethod
    def in_place_of(
        cls, context: Context, node: ir.Node, stem: str = "lower", *, prefix: str | None = None
    ) -> Emitter:
        """Return an emitter that collects what is to take a node's place, or belongs to it.

        Names are `<prefix>/<first output of the node>/<what>`; the prefix is `kfac/<stem>` if none is given.
        Its nodes carry `kfac.lowered` and no pass: what counts as added by a pass is what it inserts.
        """
        emit = cls(context.model, stem)
        emit._graph = None
        label = next((value.name for value in node.outputs if value.name), node.name or node.op_type)
        emit._prefix = f"{prefix or f'kfac/{stem}'}/{label}"
        emit._tags = {"kfac.lowered": f"{node.domain}::{node.op_type}" if node.domain else node.op_type}
        return emit

    def _full(self, what: str) -> str:
        return f"{self._prefix}/{what}"

    def unique_name(self, name: str) -> str:
        """Return `name`, or `name_2`, ... if it is taken, and take it."""
        return self.context.fresh(name)

    def _metadata(self, phase: Phase | None) -> dict[str, str]:
        tags = dict(self._tags)
        if self.site is not None:
            tags["kfac.site"] = self.site
        phase = phase if phase is not None else self.phase
        if phase is not None:
            tags["kfac.phase"] = str(phase)
        return tags

    def many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int | Sequence[str | Out],
        attributes: Mapping[str, Attribute] | None = None,
        domain: str = "",
        *,
        phase: Phase | None = None,
        exact_names: bool = False,
        infer: bool = True,
    ) -> tuple[ir.Value, ...]:
        """Emit one node and return its outputs: so many, or of these short names.

        `exact_names` takes names as they are: for state outputs and names that the user chose. Without
        `infer` outputs have the types and shapes that `outputs` says. A domain that the model does not import
        yet is imported (version 1).

        Raises ValueError when an exact name is taken.
        """
        if isinstance(outputs, int):
            outputs = [op_type] * outputs
        outs = [Out(item) if isinstance(item, str) else item for item in outputs]
        values = [self._value(out, exact=exact_names) for out in outs]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes=[_attribute(name, value) for name, value in attributes.items()] if attributes else (),
            outputs=values,
            name=values[0].name if values else self.context.fresh(self._full(op_type)),
            metadata_props=self._metadata(phase),
        )
        if infer:
            describe_outputs(node)
        if self._graph is None:
            self.nodes.append(node)
        elif self.before is not None:
            self._graph.insert_before(self.before, node)
        else:
            self._graph.append(node)
        self._counts.added += 1
        if domain:
            self.import_opset(domain)
        return tuple(values)

    def _value(self, out: Out, *, exact: bool) -> ir.Value:
        return ir.Value(
            name=self.context.take(out.name) if exact else self.context.fresh(self._full(out.name)),
            type=ir.TensorType(out.dtype) if out.dtype is not None else None,
            shape=ir.Shape(out.shape) if out.shape is not None else None,
        )

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        phase: Phase | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Emit one node with one output and return that output; `name` (default: the operator's) is short."""
        return self.many(op_type, inputs, [name or op_type], attributes, domain, phase=phase)[0]

    @overload
    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = ...,
        attributes: Mapping[str, Any] | None = ...,
        phase: Phase | None = ...,
        outputs: None = ...,
        name: str | None = ...,
        dtype: ir.DataType | None = ...,
        shape: Dims | None = ...,
        exact_name: bool = ...,
    ) -> ir.Value: ...

    @overload
    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = ...,
        attributes: Mapping[str, Any] | None = ...,
        phase: Phase | None = ...,
        outputs: int | Sequence[str | Out],
        exact_name: bool = ...,
    ) -> tuple[ir.Value, ...]: ...

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
        phase: Phase | None = None,
        outputs: int | Sequence[str | Out] | None = None,
        name: str | None = None,
        dtype: ir.DataType | None = None,
        shape: Dims | None = None,
        exact_name: bool = False,
    ) -> ir.Value | tuple[ir.Value, ...]:
        """Emit one node as `many`, with the dtype and shape that are given, none if none is.

        Returns its output, or a tuple of them when `outputs` is given.
        """
        outs = [Out(name or op_type, dtype, shape)] if outputs is None else outputs
        values = self.many(
            op_type, inputs, outs, attributes, domain, phase=phase, exact_names=exact_name, infer=False
        )
        return values[0] if outputs is None else values

    def import_opset(self, domain: str, version: int = 1) -> None:
        """Import an operator domain unless the model already does."""
        if domain not in self.model.opset_imports:
            self.model.opset_imports[domain] = version
            self._counts.edited += 1

    def constant(self, value: npt.ArrayLike | np.generic, name: str = "constant") -> ir.Value:
        """Return an initializer of the main graph that holds `value`; equal constants are one.

        Give arrays with their dtype (`np.float32(0.5)`): Python numbers become NumPy's defaults.
        """
        tags = {"kfac.pass": self.pass_name}
        before = len(self.model.graph.initializers)
        result = self.context.constant(np.asarray(value), f"kfac/{self.pass_name}/{name}", tags)
        self._counts.added += len(self.model.graph.initializers) - before
        return result

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant int64 vector."""
        return self.constant(np.array(numbers, np.int64))

    def scalar(self, number: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a constant of rank 0 with this element type."""
        return self.constant(np.array(number).astype(dtype.numpy()))

    def cast(self, value: ir.Value, dtype: ir.DataType, current: ir.DataType | None = None) -> ir.Value:
        """Return the value with this element type; no node where `current` says that it has it already."""
        if current is not None and current == dtype:
            return value
        return self.op("Cast", value, to=int(dtype))

    def zeros(self, shape: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return zeros of a run-time shape int64[rank]."""
        return self.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, dtype.numpy())))

    def shape(self, value: ir.Value) -> ir.Value:
        """Return the shape of a value, int64[rank]; a constant where it is static."""
        dims = static_shape(value)
        return self.op("Shape", value) if dims is None else self.ints(*dims)

    def part(self, vector: ir.Value, start: int, end: int) -> ir.Value:
        """Return `vector[start:end]` of a vector."""
        return self.op("Slice", vector, self.ints(start), self.ints(end), self.ints(0))

    def entry(self, vector: ir.Value, index: int) -> ir.Value:
        """Return `vector[index]` of a vector, rank 0."""
        return self.op("Gather", vector, self.constant(np.array(index, np.int64)), axis=0)

    def concat(self, *vectors: ir.Value) -> ir.Value:
        """Return vectors joined end to end."""
        return vectors[0] if len(vectors) == 1 else self.op("Concat", *vectors, axis=0)

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Add an input of the model under exactly this name.

        Raises ValueError when the name is taken.
        """
        value = ir.Value(
            name=self.context.take(name),
            type=ir.TensorType(dtype),
            shape=ir.Shape(shape),
            metadata_props={"kfac.pass": self.pass_name},
        )
        self.model.graph.inputs.append(value)
        self._counts.added += 1
        return value

    def default(self, value: ir.Value, array: npt.ArrayLike | np.generic) -> None:
        """Give an input a default value: an initializer of the same name."""
        value.const_value = ir.tensor(np.asarray(array), name=value.name)
        self.model.graph.register_initializer(value)
        self._counts.added += 1

    def output(self, value: ir.Value) -> None:
        """Make a value an output of the model."""
        self.model.graph.outputs.append(value)
        self._counts.added += 1

    def replace_uses(self, old: ir.Value, new: ir.Value, *, outputs: bool = False) -> None:
        """Make every user of `old` use `new`; with `outputs`, also the graph outputs that `old` is."""
        self._counts.edited += len(old.uses()) + (outputs and old.is_graph_output())
        old.replace_all_uses_with(new, replace_graph_outputs=outputs)

    def replace_input(self, node: ir.Node, index: int, new: ir.Value | None) -> None:
        """Make input `index` of `node` read `new`."""
        if node.inputs[index] is not new:
            node.replace_input_with(index, new)
            self._counts.edited += 1

    def remove(self, nodes: Sequence[ir.Node]) -> None:
        """Remove nodes that nothing outside of them uses."""
        for graph in {id(node.graph): node.graph for node in nodes}.values():
            if graph is not None:
                graph.remove([node for node in nodes if node.graph is graph], safe=True)
        self._counts.removed += len(nodes)

    def count(self, *, added: int = 0, removed: int = 0, edited: int = 0) -> None:
        """Count changes that were made without this emitter."""
        self._counts.added += added
        self._counts.removed += removed
        self._counts.edited += edited

    def metadata(self, key: str, value: object) -> None:
        """Write `kfac.<key>` of the model (as `kfac_onnx.metadata.write`) and count it if it changed."""
        from kfac_onnx import metadata

        before = self.model.metadata_props.get(f"kfac.{key}")
        metadata.write(self.model, key, value)
        self._counts.edited += self.model.metadata_props[f"kfac.{key}"] != before


def _attribute(name: str, value: Any) -> ir.Attr:
    """Return an attribute; the common kinds without the checks of every other kind."""
    if isinstance(value, ir.Attr):
        return value
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]  of any value
    if kind is int or kind is bool:
        return ir.AttrInt64(name, value)
    if kind is float:
        return ir.AttrFloat32(name, value)
    if kind is str:
        return ir.AttrString(name, value)
    if kind is ir.Graph:
        return ir.AttrGraph(name, value)
    if kind in (list, tuple) and all(type(item) is int for item in value):
        return ir.AttrInt64s(name, value)
    return ir.convenience.convert_attribute(name, value)


Rule: TypeAlias = Callable[[Emitter, ir.Node], Lowered]
"""Emits the standard nodes for one node through an emitter and returns its outputs; edits nothing."""


def replace_node(
    node: ir.Node,
    emit: Emitter,
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
    for value, result in zip(old, new, strict=True):
        result.name = value.name or result.name
        result.type = result.type if value.type is None else value.type
        result.shape = result.shape if value.shape is None else value.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.insert_after(node, emit.nodes)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    retired.append(node)
