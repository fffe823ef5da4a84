"""Seeds for the random operators of a graph, so that the same run twice is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["seed_random_nodes"]

RANDOM: Final = {
    "Bernoulli": float,
    "Dropout": int,
    "Multinomial": float,
    "RandomNormal": float,
    "RandomNormalLike": float,
    "RandomUniform": float,
    "RandomUniformLike": float,
}
"""Standard operators with a `seed` attribute, and the type they give it."""


def _nodes(graph: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in graph:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)
            for inner in attribute.graphs:
                yield from _nodes(inner.node)


def seed_random_nodes(models: Iterable[onnx.ModelProto], seed: int | None) -> int:
    """Give every random operator a seed of its own, from `seed` on; return how many there are.

    Seeds that the exporter wrote are replaced; without a seed nothing is changed.
    """
    count = 0
    for model in models:
        for node in _nodes(model.graph.node):
            kind = RANDOM.get(node.op_type)
            if kind is None or node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "Dropout" and len(node.input) < 3:  # without training_mode it passes through
                continue
            if seed is None:
                count += 1
                continue
            kept = [attribute for attribute in node.attribute if attribute.name != "seed"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.append(onnx.helper.make_attribute("seed", kind(seed + count)))
            count += 1
    return count
