"""Fixtures: the toy training step, sessions over it, and real exported graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import onnx_ir as ir

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module toy.py: a hand-written training step and its float64 twin."""
    import toy as module

    return module


@pytest.fixture
def open_toy(toy: ModuleType) -> Callable[..., TrainingSession]:
    """Open a session on the toy; options of the model as `model={...}`."""

    def opened(*, model: dict[str, Any] | None = None, **options: Any) -> TrainingSession:
        made = toy.whole_step(**(model or {}))
        options.setdefault("parameters", toy.parameters(vocab=(model or {}).get("vocab", toy.V)))
        options.setdefault("threads", 1)
        return TrainingSession(made, **options)

    return opened


@dataclass
class GraphCase:
    """A committed training graph, transformed: the model, the user's values, and two batches."""

    path: Path
    model: ir.Model
    values: dict[str, np.ndarray]
    batches: list[dict[str, np.ndarray]]
    loss: float
    """The exporter's own loss of the first batch at the initial values."""

    def open(self, **options: Any) -> TrainingSession:
        options.setdefault("threads", 1)
        return TrainingSession(self.model, parameters=self.values, **options)


@pytest.fixture(scope="session")
def graph_case() -> Callable[..., GraphCase]:
    """Transform a committed graph (options as for `transform`), with the feeds of its sidecar."""

    def case(name: str, **options: Any) -> GraphCase:
        with np.load(GRAPHS / f"{name}.npz") as data:
            arrays = {key: data[key] for key in data.files}
        for key, array in arrays.items():  # bfloat16 is stored as bits
            if array.dtype == np.uint16:
                arrays[key] = array.view(ml_dtypes.bfloat16)
        model = kx.transform(GRAPHS / f"{name}.onnx", **options)
        step = metadata.read(model, "step", metadata.Step)
        assert step is not None
        own = {item.name for item in metadata.read_list(model, "parameters", metadata.Parameter)}
        own.update(step.constants)
        values = {key[3:]: array for key, array in arrays.items() if key[:3] == "in:" and key[3:] in own}
        first = {key: arrays[f"in:{key}"] for key in step.batch}
        second = {key: arrays.get(f"in2:{key}", first[key]) for key in step.batch}
        return GraphCase(GRAPHS / f"{name}.onnx", model, values, [first, second], float(arrays["ref:loss"]))

    return case
