"""Seconds to transform, differentiate and open synthetic training graphs, by number of nodes.

python benchmarks/transform_time/run.py [--nodes 5000 10000 20000 40000]
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from make import is_parameter, synthetic_graph

from kfac_onnx import transform
from kfac_onnx.autodiff import differentiate
from kfac_onnx.readers import read_forward_graph
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from collections.abc import Callable


def seconds(work: Callable[[], object]) -> tuple[float, float, object]:
    """Return the wall time and the processor time that some work takes, and its result."""
    wall, busy = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - busy, result


def row(nodes: int) -> str:
    """Return one row of the table."""
    graph = synthetic_graph(nodes)
    wall, busy, model = seconds(lambda: transform(graph))
    _, parts, _ = seconds(lambda: partition(model))
    forward = read_forward_graph(synthetic_graph(nodes, gradients=False))
    before = len(forward.graph)
    loss = next(value for value in forward.graph.outputs if value.name == "loss")
    weights = [value for value in forward.graph.initializers.values() if is_parameter(value.name)]
    _, made, _ = seconds(lambda: differentiate(forward, loss, weights))
    return (
        f"| {len(graph.graph.node):,} | {wall:.1f} ({busy:.1f}) | {parts:.1f} | {made:.1f} "
        f"| {before:,}, {len(forward.graph):,} |"
    )


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[5_000, 10_000, 20_000, 40_000])
    options = parser.parse_args()
    transform(synthetic_graph(100))  # imports, and the dialect's functions
    print("| nodes | transform (processor) | partition | differentiate | from, to nodes |")
    print("|---|---|---|---|---|")
    for nodes in options.nodes:
        print(row(nodes))


if __name__ == "__main__":
    main()
