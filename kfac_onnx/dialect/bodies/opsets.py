"""The operator sets that the bodies are written in, and the element types they cast to.

onnxscript reads a body's syntax tree; to a type checker `op`, `MICROSOFT` and `body` are opaque.
"""

from __future__ import annotations

from typing import Any, Final

import onnxscript
from onnxscript import opset18
from onnxscript.values import Opset

__all__ = ["BOOL", "F32", "F64", "I32", "I64", "MICROSOFT", "body", "op"]

op: Any = opset18
MICROSOFT: Any = Opset("com.microsoft", 1)
body: Any = onnxscript.script(Opset("ai.kfac", 1), default_opset=opset18)
"""Decorator: compile a function into the body of an `ai.kfac` operator."""

F32: Final = 1
"""`TensorProto.FLOAT`."""
I32: Final = 6
"""`TensorProto.INT32`."""
I64: Final = 7
"""`TensorProto.INT64`."""
BOOL: Final = 9
"""`TensorProto.BOOL`."""
F64: Final = 11
"""`TensorProto.DOUBLE`."""
