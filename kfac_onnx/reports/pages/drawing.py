"""A model as the JSON data that the scripts of a page draw.

`graphs` maps `main`, functions (`f:domain::name`) and bodies of nodes to their inputs, outputs, types of
values and nodes. A node has `bodies`, keys of graphs that unfold inside of it, and `captured`, the values of
outer graphs that these read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kfac_onnx import dialect
from kfac_onnx.graph.printer import attribute_text, type_text
from kfac_onnx.graph.values import graphs_of, label
from kfac_onnx.metadata import Site, State, Step, read, read_list
from kfac_onnx.reports.diff import node_key
from kfac_onnx.reports.inspect import LinearCost, node_cost

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir

    from kfac_onnx.device.placement import Placement

__all__ = ["drawing", "names_of"]

_FEW: Final = 4
"""Numbers of a constant that are written out."""
_LONGEST: Final = 200
"""Characters of an attribute's value."""


def drawing(
    model: ir.Model,
    caption: str,
    *,
    placement: Placement | None = None,
    statuses: Mapping[str, str] | None = None,
    before: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a page draws of a model.

    Args:
        model: transformed or not.
        caption: what stands over the drawing.
        placement: where nodes run, where that is known.
        statuses: `added`, `removed` or `changed`, or a finding's severity, by the key or a name of a node.
        before: the text that a changed node had.

    """
    return _Drawing(model, placement, statuses or {}, before or {}).data(caption)


class _Drawing:
    def __init__(
        self,
        model: ir.Model,
        placement: Placement | None,
        statuses: Mapping[str, str],
        before: Mapping[str, str],
    ) -> None:
        self._model = model
        self._statuses, self._before = statuses, before
        self._sites = {site.parameter: site for site in read_list(model, "sites", Site)}
        step = read(model, "step", Step)
        self._g_rows = None if step is None else step.settings.g_rows
        self._node_providers, self._operator_providers = _providers(placement)
        self._graphs: dict[str, Any] = {}

    def data(self, caption: str) -> dict[str, Any]:
        self._add("main", "the model", self._model.graph, "")
        for (domain, name, overload), function in self._model.functions.items():
            self._add(_function_key(domain, name, overload), f"{domain}::{name}", function, None)
        return {"caption": caption, "graphs": self._graphs, "states": _states(self._model)}

    def _add(self, key: str, label: str, graph: ir.Graph | ir.Function, prefix: str | None) -> set[ir.Value]:
        """Add a graph, whose nodes' keys begin with `prefix`; return the outer values that it reads."""
        own: set[ir.Value] = set(graph.inputs)
        types = {str(value.name): _type(value) for value in graph.inputs}
        for name, value in getattr(graph, "initializers", {}).items():
            own.add(value)
            types[name] = _constant_text(value)
        outer: set[ir.Value] = set()
        nodes: list[dict[str, Any]] = []
        for number, node in enumerate(graph):
            bodies, captured = self._bodies(node, f"{key}/{number}", prefix)
            outer |= {value for value in node.inputs if value is not None} | captured
            own |= set(node.outputs)
            types |= {str(value.name): _type(value) for value in node.outputs if value.name}
            nodes.append(self._node(node, bodies, captured, prefix))
        outer |= set(graph.outputs)
        self._graphs[key] = {
            "label": label,
            "inputs": [str(value.name) for value in graph.inputs],
            "outputs": [str(value.name) for value in graph.outputs],
            "types": types,
            "nodes": nodes,
        }
        return outer - own

    def _bodies(
        self, node: ir.Node, key: str, prefix: str | None
    ) -> tuple[list[dict[str, str]], set[ir.Value]]:
        captured: set[ir.Value] = set()
        bodies: list[dict[str, str]] = []
        identifier = (node.domain, node.op_type, node.overload)
        if identifier in self._model.functions:
            bodies.append({"label": node.op_type, "graph": _function_key(*identifier)})
        for attribute in node.attributes.values():
            for number, body in enumerate(graphs_of(attribute)):
                where = f"{key}/{attribute.name}{number or ''}"
                below = None if prefix is None else f"{prefix}{node_key(node)}.{attribute.name}: "
                captured |= self._add(where, str(attribute.name), body, below)
                bodies.append({"label": str(attribute.name), "graph": where})
        return bodies, captured

    def _node(
        self, node: ir.Node, bodies: list[dict[str, str]], captured: Iterable[ir.Value], prefix: str | None
    ) -> dict[str, Any]:
        tags = node.metadata_props
        key = (prefix or "") + node_key(node)
        site = self._sites.get(tags.get("kfac.site", ""))
        cost = LinearCost() if site is None else node_cost(node, site, self._g_rows)
        operator = dialect.OPERATORS.get(node.op_type) if node.domain == dialect.DOMAIN else None
        entries: dict[str, Any] = {
            "phase": tags.get("kfac.phase"),
            "pass": tags.get("kfac.pass"),
            "site": tags.get("kfac.site"),
            "meaning": None if operator is None else operator.meaning,
            "cost": None if cost == LinearCost() else cost.text(),
            "placement": self._placement(node),
            "status": None if prefix is None else self._status(key, node),
            "before": None if prefix is None else self._before.get(key),
        }
        return {
            "key": key,
            "name": node.name or "",
            "op": node.op_type,
            "domain": node.domain,
            "inputs": ["" if value is None else str(value.name) for value in node.inputs],
            "outputs": [str(value.name) for value in node.outputs if value.name],
            "captured": sorted(str(value.name) for value in captured),
            "attributes": {
                str(name): attribute_text(attribute)[:_LONGEST]
                for name, attribute in sorted(node.attributes.items())
            },
            "bodies": bodies,
            **{name: text for name, text in entries.items() if text is not None},
        }

    def _placement(self, node: ir.Node) -> str | None:
        own = self._node_providers.get(str(node.name))
        return (
            self._operator_providers.get(node.op_type)
            if own is None and node.domain == dialect.DOMAIN
            else own
        )

    def _status(self, key: str, node: ir.Node) -> str | None:
        """Return the status of a node by its key, or by any of its names: findings have those."""
        return next((self._statuses[name] for name in names_of(node, key) if name in self._statuses), None)


def names_of(node: ir.Node, key: str) -> tuple[str, ...]:
    """Return what reports may call a node: its key, its own name, its label and its outputs."""
    return (key, str(node.name), label(node), *(str(value.name) for value in node.outputs if value.name))


def _function_key(domain: str, name: str, overload: str) -> str:
    return f"f:{domain}::{name}:{overload}"


def _type(value: ir.Value) -> str:
    """Return a value's type, empty where nothing is known of it."""
    return "" if value.dtype is None and value.shape is None else type_text(value)


def _constant_text(value: ir.Value) -> str:
    """Return an initializer's type and, of a small one, its numbers."""
    tensor = value.const_value
    if (
        tensor is None
        or tensor.size > _FEW
        or not (tensor.dtype.is_floating_point() or tensor.dtype.is_integer())
    ):
        return type_text(value)
    return f"{type_text(value)} = {tensor.numpy().tolist()}"


def _states(model: ir.Model) -> dict[str, str]:
    """Return what each value that is a state, or becomes one, is of it, by its name."""
    texts: dict[str, str] = {}
    for state in read_list(model, "state", State):
        of = "" if state.parameter is None else f" of {state.parameter}"
        texts[state.input] = f"{state.role}{of}, {state.update}"
        for name in {state.output, state.candidate, *state.aliases} - {state.input}:
            texts[name] = f"new {state.role}{of}"
    return texts


def _providers(placement: Placement | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the providers that run each node, and those that run each operator's body.

    A call that was put in place is known by the name that its nodes begin with; onnxruntime's own names do
    not say which call it was, but the operator.
    """
    nodes: dict[str, set[str]] = {}
    operators: dict[str, set[str]] = {}
    for node in () if placement is None else placement.nodes:
        provider = node.provider.removesuffix("ExecutionProvider") + (" (no kernel)" if node.missing else "")
        call, mark, _ = node.name.rpartition("#")
        nodes.setdefault(call if mark else node.name, set()).add(provider)
        if node.operator is not None:
            operators.setdefault(node.operator, set()).add(provider)
    return _joined(nodes), _joined(operators)


def _joined(providers: Mapping[str, set[str]]) -> dict[str, str]:
    return {name: " and ".join(sorted(words)) for name, words in providers.items()}
