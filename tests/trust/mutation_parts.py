"""What mutations share: texts and numbers that no exporter writes, and the parts of a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["ODD_NUMBERS", "Graph", "Random", "a_graph", "a_node", "graphs_of", "names_of", "odd_text"]

Random = random.Random
Graph = Callable[[Random, "ModelProto"], None]

ODD_TEXTS: Final = (
    "",
    " ",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "line\nbreak\r",
    "tab\there",
    "nul\x00inside",
    "../../outside",
    "/etc/passwd",
    "\u202eright to left",
    "e\u0301\u200b\ufeff",
    "\U0001f600" * 3,
    "%s%n{0}{x}[bold]",
    "x" * 5000,
    "kfac/state/A",
    "W_grad",
    "-1",
)
ODD_NUMBERS: Final = (0, 1, -1, 2, 7, -(2**31), 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def odd_text(rng: Random) -> str:
    """Return a text that no exporter writes."""
    return rng.choice(ODD_TEXTS)


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from graphs_of(body)


def a_graph(rng: Random, model: ModelProto) -> GraphProto:
    return rng.choice(list(graphs_of(model.graph)))


def a_node(rng: Random, model: ModelProto) -> NodeProto:
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    return rng.choice(nodes) if nodes else model.graph.node.add()


def names_of(model: ModelProto) -> list[str]:
    graph = model.graph
    found = [item.name for item in (*graph.input, *graph.initializer)]
    return [*found, *(name for node in graph.node for name in node.output)] or [""]
