"""One name, one value: ONNX lets graphs beside each other use the same inner names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.graph.values import all_graphs

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.graph.context import Context

__all__ = ["name_values_apart"]


def name_values_apart(model: ir.Model, names: Context) -> int:
    """Rename values of nested graphs that are called like another value; return how many."""
    taken: set[str] = set()
    count = 0
    for graph in all_graphs(model.graph):
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values.extend(node.outputs)
        for value in dict.fromkeys(values):
            if not value.name:
                continue
            if value.name in taken and graph is not model.graph:
                new = names.fresh(f"kfac/loop/{value.name}")
                if graph.initializers.get(value.name) is value:
                    del graph.initializers[value.name]
                    value.name = new
                    graph.register_initializer(value)
                value.name = new
                count += 1
            taken.add(value.name)
    return count
