"""The emitter of passes, under the name that it had before there was one emitter (`graph.emit`)."""

from __future__ import annotations

from kfac_onnx.graph.emit import Dims, Emitter, Out

__all__ = ["Dims", "Emitter", "Out"]
