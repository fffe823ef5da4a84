"""A model as text for people: one line per value or node, with phases and sites, without weights.

```
input   ids                              int64[batch]
param   emb.weight                       float32[100, 8]
%rows = Gather(%emb.weight, %ids) {axis=0}                    # gradients
output  loss                             float32[]
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["attribute_text", "model_lines", "model_text", "node_text", "type_text"]

_LONGEST_LIST = 8


def type_text(value: ir.Value) -> str:
    """Return `float32[batch, 64]`, with `?` for what is unknown."""
    dtype = value.dtype.numpy().name if value.dtype is not None and _has_numpy(value.dtype) else "?"
    if value.shape is None:
        return f"{dtype}[...]"
    dims = (str(dim) if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape)
    return f"{dtype}[{', '.join(dims)}]"


def _has_numpy(dtype: ir.DataType) -> bool:
    return dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING)


def node_text(node: ir.Node) -> str:
    """Return `%y = Op(%a, %b) {axis=0}` and, after `#`, its phase and site."""
    outputs = ", ".join(f"%{value.name}" for value in node.outputs)
    inputs = ", ".join("" if value is None else f"%{value.name}" for value in node.inputs)
    domain = f"{node.domain}::" if node.domain else ""
    attributes = ", ".join(
        f"{name}={attribute_text(node.attributes[name])}" for name in sorted(node.attributes)
    )
    text = f"{outputs} = {domain}{node.op_type}({inputs})" + (f" {{{attributes}}}" if attributes else "")
    tags = [node.metadata_props[key] for key in ("kfac.phase", "kfac.site") if key in node.metadata_props]
    return f"{text}  # {' '.join(tags)}" if tags else text


def attribute_text(attribute: ir.Attr) -> str:
    """Return an attribute's value in short: large tensors and graphs by their size."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.GRAPH:
        return f"graph of {len(attribute.as_graph())} nodes"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.size <= _LONGEST_LIST and _has_numpy(tensor.dtype):
            return str(tensor.numpy().tolist())
        return f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}"
    value = attribute.value
    if isinstance(value, (tuple, list)):
        return str(list(value))  # pyright: ignore[reportUnknownArgumentType]  any attribute list
    return f"{value:g}" if isinstance(value, float) else str(value)


def _graph_lines(graph: ir.Graph, indent: str) -> Iterator[str]:
    for value in graph.inputs:
        default = " = default" if value.is_initializer() else ""
        yield f"{indent}input   {value.name} {type_text(value)}{default}"
    for value in graph.initializers.values():
        if not value.is_graph_input():
            yield f"{indent}param   {value.name} {type_text(value)}"
    for node in graph:
        yield f"{indent}{node_text(node)}"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                yield f"{indent}  {attribute.name}:"
                yield from _graph_lines(attribute.as_graph(), indent + "    ")
    for value in graph.outputs:
        yield f"{indent}output  {value.name} {type_text(value)}"


def model_lines(model: ir.Model) -> list[str]:
    """Return the model's text, line by line: metadata, imports, interface, nodes, functions."""
    lines = [
        f"metadata {key} = {text}" for key, text in model.metadata_props.items() if key.startswith("kfac.")
    ]
    lines += [f"opset   {domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items()]
    lines += _graph_lines(model.graph, "")
    for function in model.functions.values():
        inputs = ", ".join(f"%{value.name}" for value in function.inputs)
        outputs = ", ".join(f"%{value.name}" for value in function.outputs)
        lines.append(f"function {function.domain}::{function.name}({inputs}) -> {outputs}")
        lines += [f"    {node_text(node)}" for node in function]
    return lines


def model_text(model: ir.Model) -> str:
    """Return the model's text; `diff` and `opt --print-after-change` show it."""
    return "\n".join(model_lines(model))
