"""Fixtures: small models from text, and the bytes of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = '<ir_version: 10, opset_import: ["" : 18, "ai.kfac" : 1]>\n'


@pytest.fixture
def parse_model() -> Callable[[str], ir.Model]:
    """Read a graph in ONNX's text form; the header with opset 18 is added."""
    return lambda text: ir.from_onnx_text(HEADER + text)


@pytest.fixture
def model_bytes() -> Callable[[ir.Model], bytes]:
    """Return the bytes that a model would be written as; the same model gives the same bytes."""
    return lambda model: ir.to_proto(model).SerializeToString(deterministic=True)
