"""Training with plain ONNX Runtime: sessions over transformed models, data, schedules, checkpoints."""

from __future__ import annotations

from kfac_onnx.runtime.schedules import Schedule
from kfac_onnx.runtime.session import TrainingSession
from kfac_onnx.runtime.views import Metrics, Parameters

__all__ = ["Metrics", "Parameters", "Schedule", "TrainingSession"]
