"""What changed from one model to another, by the names of values and nodes.

A node is known by its outputs (names of values never change, nodes often have none), an initializer by
its name; weights are compared by their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kfac_onnx.disk.mapped import digest
from kfac_onnx.disk.models import as_model
from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.graph.printer import node_text, type_text
from kfac_onnx.graph.values import contents_of, graphs_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir

    Source = str | Path | ir.Model | onnx.ModelProto

__all__ = ["Difference", "Section", "diff", "node_key"]


@dataclass(frozen=True)
class Section:
    """Changes of one kind of thing: names to their text (`changed`: text before and after)."""

    added: Mapping[str, str]
    removed: Mapping[str, str]
    changed: Mapping[str, tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def to_json(self) -> dict[str, Any]:
        """Return the section as plain JSON data."""
        return {
            "added": dict(self.added),
            "removed": dict(self.removed),
            "changed": {name: {"before": old, "after": new} for name, (old, new) in self.changed.items()},
        }


@dataclass(frozen=True)
class Difference:
    """All changes between two models, by kind: inputs, outputs, initializers, nodes, functions, ..."""

    sections: Mapping[str, Section]

    def __bool__(self) -> bool:
        return any(self.sections.values())

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain JSON data; `same` says that there is none."""
        return {"same": not self} | {name: section.to_json() for name, section in self.sections.items()}

    def __str__(self) -> str:
        """Return the difference for people: `+` added, `-` removed, `~` changed, kind by kind."""
        lines: list[str] = []
        for name, section in self.sections.items():
            if not section:
                continue
            counts = f"+{len(section.added)} -{len(section.removed)} ~{len(section.changed)}"
            lines.append(f"{name}: {counts}")
            lines += [f"  - {text}" for text in section.removed.values()]
            for old, new in section.changed.values():
                lines += [f"  ~ {old}", f"    {new}"]
            lines += [f"  + {text}" for text in section.added.values()]
        return "\n".join(lines) if lines else "the models are the same"


@checked
@blames_the_graph
def diff(before: Source, after: Source) -> Difference:
    """Return what changed from `before` to `after`: files, or models in memory.

    Raises UserError when a file is missing or is no model.
    """
    old, new = _described(as_model(before)), _described(as_model(after))
    return Difference({name: _section(old[name], new[name]) for name in old})


def _section(old: Mapping[str, str], new: Mapping[str, str]) -> Section:
    return Section(
        added={name: text for name, text in new.items() if name not in old},
        removed={name: text for name, text in old.items() if name not in new},
        changed={name: (text, new[name]) for name, text in old.items() if new.get(name, text) != text},
    )


def _described(model: ir.Model) -> dict[str, dict[str, str]]:
    graph = model.graph
    return {
        "imports": {
            domain or "ai.onnx": f"{domain or 'ai.onnx'} {version}"
            for domain, version in model.opset_imports.items()
        },
        "inputs": {str(value.name): f"{value.name} {type_text(value)}" for value in graph.inputs},
        "outputs": {str(value.name): f"{value.name} {type_text(value)}" for value in graph.outputs},
        "initializers": {name: _initializer_text(value) for name, value in graph.initializers.items()},
        "nodes": _nodes(graph, ""),
        "functions": {
            f"{domain}::{name}": f"{domain}::{name}: " + "; ".join(node_text(node) for node in function)
            for (domain, name, _), function in model.functions.items()
        },
        "metadata": {key: f"{key} = {text}" for key, text in model.metadata_props.items()},
    }


def _initializer_text(value: ir.Value) -> str:
    import hashlib

    import onnx_ir as ir

    if value.const_value is None:
        return f"{value.name} {type_text(value)}"
    tensor = value.const_value
    if tensor.dtype == ir.DataType.STRING:
        code = hashlib.sha256(contents_of(tensor)).digest()
    else:
        code = digest(tensor)
    return f"{value.name} {type_text(value)} sha256:{code.hex()[:12]}"


def node_key(node: ir.Node) -> str:
    """Return what a node of a graph is known by: its first output, or its own name where it has none."""
    return next((str(value.name) for value in node.outputs if value.name), str(node.name))


def _nodes(graph: ir.Graph, prefix: str) -> dict[str, str]:
    """Return each node's text by its first output, bodies of `If` and the like below their node."""
    found: dict[str, str] = {}
    for node in graph:
        key = prefix + node_key(node)
        found[key] = prefix + node_text(node)
        for attribute in node.attributes.values():
            for body in graphs_of(attribute):
                found |= _nodes(body, f"{key}.{attribute.name}: ")
    return found
