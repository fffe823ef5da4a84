"""K-FAC for embedding tables in ONNX training graphs, run by plain ONNX Runtime.

```python
import kfac_onnx as kx

report = kx.scan("train.onnx")
model = kx.transform("train.onnx", lr=0.01, rest="adam", rest_lr=1e-3)
kx.save(model, "train.kfac.onnx")
with kx.TrainingSession("train.kfac.onnx") as session:
    metrics = session.step({"x": x, "y": y})
```

Names load when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kfac_onnx.errors import UserError, VerifyError
from kfac_onnx.version import __version__

if TYPE_CHECKING:
    from kfac_onnx.api import save, scan, transform, why
    from kfac_onnx.passes.differentiate import differentiate
    from kfac_onnx.pipeline.pipeline import parse_pipeline
    from kfac_onnx.ranks import RankSession
    from kfac_onnx.reports.checks import check
    from kfac_onnx.reports.diff import diff
    from kfac_onnx.reports.inspect import inspect
    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.frames import metrics_frame

__all__ = [
    "RankSession",
    "TrainingSession",
    "UserError",
    "VerifyError",
    "__version__",
    "check",
    "diff",
    "differentiate",
    "inspect",
    "metrics_frame",
    "parse_pipeline",
    "save",
    "scan",
    "transform",
    "why",
]

_LAZY = {
    "RankSession": "kfac_onnx.ranks",
    "TrainingSession": "kfac_onnx.runtime",
    "check": "kfac_onnx.reports.checks",
    "diff": "kfac_onnx.reports.diff",
    "differentiate": "kfac_onnx.passes.differentiate",
    "inspect": "kfac_onnx.reports.inspect",
    "metrics_frame": "kfac_onnx.runtime.frames",
    "parse_pipeline": "kfac_onnx.pipeline.pipeline",
    "save": "kfac_onnx.api",
    "scan": "kfac_onnx.api",
    "transform": "kfac_onnx.api",
    "why": "kfac_onnx.api",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'kfac_onnx' has no attribute '{name}'")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
