"""What tests of passes share: small models from text, and the bytes of a model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

HEADER = '<ir_version: 10, opset_import: ["" : 18, "ai.kfac" : 1]>\n'


@pytest.fixture
def parse_model() -> Callable[[str], ir.Model]:
    """Read a graph in ONNX's text form; the header with opset 18 is added."""
    return lambda text: ir.from_onnx_text(HEADER + text)


@pytest.fixture
def model_bytes() -> Callable[[ir.Model], bytes]:
    """Return the bytes that a model would be written as; the same model gives the same bytes."""
    return lambda model: ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The hand-written training step that the runtime's tests use."""
    name = "runtime_toy"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "runtime" / "toy.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
