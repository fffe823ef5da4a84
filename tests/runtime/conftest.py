"""What tests of the runtime share: the toy training step, sessions over it, and real exported graphs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module toy.py: a hand-written training step and its float64 twin."""
    name = "runtime_toy"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("toy.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def open_toy(toy: ModuleType) -> Callable[..., TrainingSession]:
    """Open a session on the toy; options of the model as `model={...}`."""

    def opened(*, model: dict[str, Any] | None = None, **options: Any) -> TrainingSession:
        made = toy.whole_step(**(model or {}))
        options.setdefault("parameters", toy.parameters(vocab=(model or {}).get("vocab", toy.V)))
        options.setdefault("threads", 1)
        return TrainingSession(made, **options)

    return opened


@pytest.fixture(scope="session")
def graph_case() -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """Return a committed graph's path and its arrays (`in:`, `in2:`, `ref:`), bfloat16 as such."""

    def case(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        with np.load(GRAPHS / f"{name}.npz") as data:
            arrays = {key: data[key] for key in data.files}
        halves = set(arrays.pop("bf16", np.array([])).tolist())
        return GRAPHS / f"{name}.onnx", {
            key: array.view(ml_dtypes.bfloat16) if key in halves else array for key, array in arrays.items()
        }

    return case
