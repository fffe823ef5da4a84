"""The embedding block of K-FAC: the original's interface over symbolic ONNX tensors, and the presets.

```python
collection = LayerCollection(FactorSettings(decay=0.95))
block = collection.register_embedding(table, ids, outputs)       # ir.Values of a graph under construction
block.instantiate_factors([[gradients]], damping=1e-3)           # [source][tower]
session = FisherSession(collection)
session.covariance_update({"ids": ..., "gradients": ...})
session.inverse_update()
session.multiply_inverse(block, (indices, values))
```
"""

from __future__ import annotations

from kfac_onnx.fisher.blocks import (
    EmbeddingKFACFB,
    EmbeddingKFACMultiIndepFB,
    FisherBlock,
    KroneckerProductFB,
)
from kfac_onnx.fisher.errors import FisherIndexError, FisherKeyError, FisherTypeError, FisherValueError
from kfac_onnx.fisher.input_factor import EmbeddingInputKroneckerFactor
from kfac_onnx.fisher.layer_blocks import ConvKFACBasicFB, FullyConnectedKFACBasicFB, LayerSettings, Window
from kfac_onnx.fisher.layer_collection import AUTO_REUSE, LayerCollection
from kfac_onnx.fisher.output_factor import FullyConnectedKroneckerFactor
from kfac_onnx.fisher.presets import PRESETS, Preset, find_preset
from kfac_onnx.fisher.session import FisherSession
from kfac_onnx.fisher.settings import Average, FactorSettings, settings_of
from kfac_onnx.fisher.symbols import SparseRows, Update, placeholder

__all__ = [
    "AUTO_REUSE",
    "PRESETS",
    "Average",
    "ConvKFACBasicFB",
    "EmbeddingInputKroneckerFactor",
    "EmbeddingKFACFB",
    "EmbeddingKFACMultiIndepFB",
    "FactorSettings",
    "FisherBlock",
    "FisherIndexError",
    "FisherKeyError",
    "FisherSession",
    "FisherTypeError",
    "FisherValueError",
    "FullyConnectedKFACBasicFB",
    "FullyConnectedKroneckerFactor",
    "KroneckerProductFB",
    "LayerCollection",
    "LayerSettings",
    "Preset",
    "SparseRows",
    "Update",
    "Window",
    "find_preset",
    "placeholder",
    "settings_of",
]
