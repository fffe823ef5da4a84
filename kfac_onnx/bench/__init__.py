"""What a step costs, measured beside what a user would pick instead: `kfac-onnx bench`.

`workloads` are training graphs with their batches, `arms` ways to train them, `measure` times the arms step
by step in turn, `memory` each in a process of its own, `roofline` says what the machine could do at best, and
`results` is what comes out: JSON, a table (`report`) and pictures (`pictures`).
"""

from __future__ import annotations

from kfac_onnx.bench.results import Results, Settings
from kfac_onnx.bench.run import run

__all__ = ["Results", "Settings", "run"]
