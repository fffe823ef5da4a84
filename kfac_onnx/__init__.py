"""K-FAC for embedding tables in ONNX training graphs, run by plain ONNX Runtime.

```python
import kfac_onnx as kx

report = kx.scan("train.onnx")
model = kx.transform("train.onnx", preset="half", lr=0.01, rest="adam", rest_lr=1e-3)
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

if TYPE_CHECKING:
    from kfac_onnx.passes.api import save, scan, transform, why
    from kfac_onnx.passes.checks import check
    from kfac_onnx.passes.diff import diff
    from kfac_onnx.passes.differentiate import differentiate
    from kfac_onnx.passes.inspect import inspect
    from kfac_onnx.passes.pipeline import parse_pipeline
    from kfac_onnx.runtime import TrainingSession

__all__ = [
    "TrainingSession",
    "UserError",
    "VerifyError",
    "check",
    "diff",
    "differentiate",
    "inspect",
    "parse_pipeline",
    "save",
    "scan",
    "transform",
    "why",
]

__version__ = "0.1.0"

_LAZY = {
    "TrainingSession": "kfac_onnx.runtime",
    "check": "kfac_onnx.passes.checks",
    "diff": "kfac_onnx.passes.diff",
    "differentiate": "kfac_onnx.passes.differentiate",
    "inspect": "kfac_onnx.passes.inspect",
    "parse_pipeline": "kfac_onnx.passes.pipeline",
    "save": "kfac_onnx.passes.api",
    "scan": "kfac_onnx.passes.api",
    "transform": "kfac_onnx.passes.api",
    "why": "kfac_onnx.passes.api",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'kfac_onnx' has no attribute '{name}'")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
