"""Counting what changed in a model by comparing it with what it was: for rewrites that many functions make.

```python
census = Census(model)
...  # any edits
return census.changes()
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from kfac_onnx.graph.changes import Changes
from kfac_onnx.graph.values import all_graphs

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

__all__ = ["Census", "shapes_of"]

Declared: TypeAlias = "dict[ir.Value, tuple[ir.TypeProtocol | None, ir.Shape | None]]"


class Census:
    """What a model held when this was made: nodes and what they read, values, borders, metadata, domains."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._alive: list[object] = []  # so that no later object gets the id of one that has gone
        self._before = _contents(model, self._alive)

    def changes(self) -> Changes:
        """Return the changes since: what is new, what is gone, and what is another than it was."""
        after = _contents(self._model, [])
        added = sum(key not in self._before for key in after)
        removed = sum(key not in after for key in self._before)
        edited = sum(key in after and after[key] != value for key, value in self._before.items())
        return Changes(added, removed, edited)


def shapes_of(model: ir.Model) -> Declared:
    """Return what is declared of each value of a model, in all its graphs."""
    return {value: (value.type, value.shape) for graph in all_graphs(model.graph) for value in _values(graph)}


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _contents(model: ir.Model, alive: list[object]) -> dict[object, object]:
    """Return what a written model says, by the object that says it; `alive` gets the objects behind ids."""
    found: dict[object, object] = {
        "version": model.ir_version,
        **{("metadata", key): text for key, text in model.metadata_props.items()},
        **{("domain", name): number for name, number in model.opset_imports.items()},
        **{("function", name): None for name in model.functions},
    }
    for number, graph in enumerate(all_graphs(model.graph)):
        found["inputs", number] = tuple(map(id, graph.inputs))
        found["outputs", number] = tuple(map(id, graph.outputs))
        for value in graph.initializers.values():
            found["initializer", value] = (value.name, id(value.const_value))
            alive.append(value.const_value)
        for value in (*graph.inputs, *graph.initializers.values()):
            found[value] = (value.name, value.type, value.shape)
        for node in graph:
            outputs = node.outputs
            attributes: tuple[tuple[str, int], ...] = ()
            if node.attributes:
                attributes = tuple((name, id(attribute)) for name, attribute in node.attributes.items())
                alive.extend(node.attributes.values())
            found[node] = (node.op_type, node.inputs, outputs, attributes)
            for value in outputs:
                found[value] = (value.name, value.type, value.shape)
    return found
