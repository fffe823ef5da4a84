"""The main job on data that ships with the package: `kfac-onnx demo`."""

from __future__ import annotations

from kfac_onnx.demo.compare import DemoResult, run

__all__ = ["DemoResult", "run"]
