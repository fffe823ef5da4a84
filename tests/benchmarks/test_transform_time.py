"""Work grows linearly with the nodes of a graph: function calls are counted, time is not."""

from __future__ import annotations

import cProfile
import importlib
import pstats
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.api import scan, transform
from kfac_onnx.autodiff import differentiate
from kfac_onnx.readers import read_forward_graph
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks" / "transform_time"
SIZES = (300, 600, 1200)
"""Each twice the one before. What does not grow with the nodes cancels in the differences."""
LIMIT = 2.3
"""What the larger difference may be of the smaller: 2 if work is linear, 4 if it is quadratic."""


@pytest.fixture(scope="module")
def make() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("make")
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("make", None)


def calls(work: Callable[[], object]) -> int:
    """Return the number of function calls that some work makes."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)


def growth(counts: list[int]) -> float:
    small, middle, large = counts
    return (large - middle) / (middle - small)


def test_transform_and_partition_are_linear(make: ModuleType) -> None:
    graphs = [make.synthetic_graph(nodes, every=5) for nodes in SIZES]
    partition(transform(graphs[0]))  # what is imported on first use
    models: list[object] = []
    assert growth([calls(lambda graph=graph: models.append(transform(graph))) for graph in graphs]) < LIMIT
    assert growth([calls(lambda model=model: partition(model)) for model in models]) < LIMIT


def test_differentiate_is_linear(make: ModuleType) -> None:
    counts = []
    for nodes in SIZES:
        model = read_forward_graph(make.synthetic_graph(nodes, gradients=False, every=5))
        (loss,) = (value for value in model.graph.outputs if value.name == "loss")
        weights = [value for value in model.graph.initializers.values() if make.is_parameter(value.name)]
        counts.append(calls(lambda m=model, a=loss, w=weights: differentiate(m, a, w)))
    assert growth(counts) < LIMIT


def test_the_synthetic_graph_is_a_right_training_graph(make: ModuleType) -> None:
    """Its own gradients lead downhill, and every table is found."""
    graph = make.synthetic_graph(400, every=5)
    tables = [site.parameter for site in scan(graph).sites]
    assert tables == ["tables.0", "tables.1", "tables.2"]
    rng = np.random.default_rng(0)
    batch = {f"ids_{index}": rng.integers(0, make.VOCAB_SIZE, 16) for index in range(len(tables))}
    batch["labels"] = rng.standard_normal((16, make.WIDTH)).astype(np.float32)
    with TrainingSession(transform(graph), threads=1) as session:
        losses = [session.step(batch)["loss"] for _ in range(8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
