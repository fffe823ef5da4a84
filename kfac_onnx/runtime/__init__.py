"""Training with plain ONNX Runtime: sessions over transformed models, data, schedules, checkpoints."""

from __future__ import annotations

from kfac_onnx.runtime.description import Metrics, Parameters
from kfac_onnx.runtime.schedules import Schedule
from kfac_onnx.runtime.session import TrainingSession

__all__ = ["Metrics", "Parameters", "Schedule", "TrainingSession"]
