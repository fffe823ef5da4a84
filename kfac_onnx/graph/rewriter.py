"""How passes add to a model: every node tagged with who made it, every name unique, everything counted.

```python
emit = Emitter(model, "insert-embedding-kfac", site="emb.weight", phase=Phase.PRECONDITION)
rho = emit.constant(np.float32(0.01), "rho")
scaled = emit.node("Mul", [total, rho], name="damping", dtype=ir.DataType.FLOAT, shape=[])
index, sums = emit.node("MergeRows", [ids, rows], domain="ai.kfac", outputs=["unique_ids", "sums"])
return emit.changes
```

Names are `kfac/<pass>/<what>` (`kfac/<pass>/<site>/<what>` under a site), made unique by a number.
Nodes carry `kfac.pass`, `kfac.site` and `kfac.phase` in their metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import onnx_ir as ir

from kfac_onnx.graph.changes import Changes
from kfac_onnx.graph.values import all_graphs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kfac_onnx.metadata import Phase

__all__ = ["Dims", "Emitter", "Out"]

Dims = Sequence[int | str | None] | ir.Shape
"""A shape: numbers, names of symbolic dimensions, None for an unknown one; or another value's."""


@dataclass(frozen=True)
class Out:
    """One output of a node: its short name, and dtype and shape where they are known."""

    name: str
    dtype: ir.DataType | None = None
    shape: Dims | None = None


class _Ledger:
    """What all emitters of one pass share: the names in use, the constants made, the counts."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.names: set[str] = set()
        self.constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.added = 0
        self.removed = 0
        self.edited = 0
        for graph in all_graphs(model.graph):
            self.names.update(value.name for value in graph.inputs if value.name)
            self.names.update(graph.initializers)
            for node in graph:
                self.names.update(value.name for value in node.outputs if value.name)
                if node.name:
                    self.names.add(node.name)

    def unique(self, name: str) -> str:
        number, candidate = 1, name
        while candidate in self.names:
            number += 1
            candidate = f"{name}_{number}"
        self.names.add(candidate)
        return candidate

    def take(self, name: str) -> str:
        if name in self.names:
            raise ValueError(f"the model already has a value '{name}'")
        self.names.add(name)
        return name


class Emitter:
    """Adds nodes, constants, inputs and outputs to a graph of `model`, and counts every change.

    `site` is the parameter that the nodes serve, `phase` their phase unless a call says another. Nodes
    go to the end of `graph` (default: the main one), or before the node `before`.
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
        self.model = model
        self.pass_name = pass_name
        self.site = site
        self.phase = phase
        self.graph = graph if graph is not None else model.graph
        self.before = before
        self._ledger = _Ledger(model)

    @property
    def changes(self) -> Changes:
        """Everything done so far through this emitter and those derived from it."""
        return Changes(self._ledger.added, self._ledger.removed, self._ledger.edited)

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
        other = object.__new__(Emitter)
        other.model = self.model
        other.pass_name = self.pass_name
        other.site = site if site is not None else self.site
        other.phase = phase if phase is not None else self.phase
        other.graph = graph if graph is not None else self.graph
        other.before = before
        other._ledger = self._ledger
        return other

    def branch(self, name: str) -> Emitter:
        """Return an emitter whose graph is new and empty: the body of an `If`, for `node`'s attributes.

        The caller fills it, extends `branch.graph.outputs`, and passes `branch.graph` as the attribute.
        """
        graph = ir.Graph([], [], nodes=[], name=self._ledger.unique(self._full(name)))
        return self.derive(graph=graph)

    def _full(self, what: str) -> str:
        site = f"{self.site}/" if self.site is not None else ""
        return f"kfac/{self.pass_name}/{site}{what}"

    def unique_name(self, name: str) -> str:
        """Return `name`, or `name_2`, ... if it is taken, and take it."""
        return self._ledger.unique(name)

    def _tags(self, phase: Phase | None) -> dict[str, str]:
        tags = {"kfac.pass": self.pass_name}
        if self.site is not None:
            tags["kfac.site"] = self.site
        phase = phase if phase is not None else self.phase
        if phase is not None:
            tags["kfac.phase"] = str(phase)
        return tags

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
        """Add a node and return its output, or a tuple of them when `outputs` is given.

        `attributes` maps names to Python values, tensors or graphs; `name` (default: the operator's)
        is the short name of the one output, `outputs` the number or short names of several.
        `exact_name` takes names as they are: for state outputs and names that the user chose.
        A domain that the model does not import yet is imported (version 1).

        Raises ValueError when an exact name is taken.
        """
        if outputs is None:
            outs: list[Out] = [Out(name if name is not None else op_type.lower(), dtype, shape)]
        elif isinstance(outputs, int):
            outs = [Out(f"{op_type.lower()}_{index}") for index in range(outputs)]
        else:
            outs = [Out(item) if isinstance(item, str) else item for item in outputs]
        values = [self._value(out, exact=exact_name) for out in outs]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(dict(attributes or {})),
            outputs=values,
            name=values[0].name if values else self.unique_name(self._full(op_type.lower())),
            metadata_props=self._tags(phase),
        )
        if self.before is not None:
            self.graph.insert_before(self.before, node)
        else:
            self.graph.append(node)
        self._ledger.added += 1
        self.import_opset(domain)
        return values[0] if outputs is None else tuple(values)

    def _value(self, out: Out, *, exact: bool) -> ir.Value:
        return ir.Value(
            name=self._ledger.take(out.name) if exact else self._ledger.unique(self._full(out.name)),
            type=ir.TensorType(out.dtype) if out.dtype is not None else None,
            shape=ir.Shape(out.shape) if out.shape is not None else None,
        )

    def import_opset(self, domain: str, version: int = 1) -> None:
        """Import an operator domain unless the model already does."""
        if domain not in self.model.opset_imports:
            self.model.opset_imports[domain] = version
            self._ledger.edited += 1

    def constant(self, value: npt.ArrayLike | np.generic, name: str = "constant") -> ir.Value:
        """Return an initializer of the main graph that holds `value`; equal constants are one.

        Give arrays with their dtype (`np.float32(0.5)`): Python numbers become NumPy's defaults.
        """
        import numpy

        array = numpy.ascontiguousarray(value).reshape(numpy.shape(value))
        key = (str(array.dtype), array.shape, array.tobytes())
        known = self._ledger.constants.get(key)
        if known is not None:
            return known
        full = self._ledger.unique(f"kfac/{self.pass_name}/{name}")
        tensor = ir.tensor(array, name=full)
        made = ir.Value(
            name=full,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
            metadata_props={"kfac.pass": self.pass_name},
        )
        self.model.graph.register_initializer(made)
        self._ledger.added += 1
        self._ledger.constants[key] = made
        return made

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Add an input of the model under exactly this name.

        Raises ValueError when the name is taken.
        """
        value = ir.Value(
            name=self._ledger.take(name),
            type=ir.TensorType(dtype),
            shape=ir.Shape(shape),
            metadata_props={"kfac.pass": self.pass_name},
        )
        self.model.graph.inputs.append(value)
        self._ledger.added += 1
        return value

    def default(self, value: ir.Value, array: npt.ArrayLike | np.generic) -> None:
        """Give an input a default value: an initializer of the same name."""
        import numpy

        value.const_value = ir.tensor(numpy.asarray(array), name=value.name)
        self.model.graph.register_initializer(value)
        self._ledger.added += 1

    def output(self, value: ir.Value) -> None:
        """Make a value an output of the model."""
        self.model.graph.outputs.append(value)
        self._ledger.added += 1

    def replace_uses(self, old: ir.Value, new: ir.Value, *, outputs: bool = False) -> None:
        """Make every user of `old` use `new`; with `outputs`, also the graph outputs that `old` is."""
        self._ledger.edited += len(old.uses()) + (outputs and old.is_graph_output())
        old.replace_all_uses_with(new, replace_graph_outputs=outputs)

    def replace_input(self, node: ir.Node, index: int, new: ir.Value | None) -> None:
        """Make input `index` of `node` read `new`."""
        if node.inputs[index] is not new:
            node.replace_input_with(index, new)
            self._ledger.edited += 1

    def remove(self, nodes: Sequence[ir.Node]) -> None:
        """Remove nodes that nothing outside of them uses."""
        for graph in {id(node.graph): node.graph for node in nodes}.values():
            if graph is not None:
                graph.remove([node for node in nodes if node.graph is graph], safe=True)
        self._ledger.removed += len(nodes)

    def count(self, *, added: int = 0, removed: int = 0, edited: int = 0) -> None:
        """Count changes that were made without this emitter."""
        self._ledger.added += added
        self._ledger.removed += removed
        self._ledger.edited += edited

    def metadata(self, key: str, value: object) -> None:
        """Write `kfac.<key>` of the model (as `kfac_onnx.metadata.write`) and count it if it changed."""
        from kfac_onnx import metadata

        before = self.model.metadata_props.get(f"kfac.{key}")
        metadata.write(self.model, key, value)
        self._ledger.edited += self.model.metadata_props[f"kfac.{key}"] != before
