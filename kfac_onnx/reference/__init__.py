"""The mathematics of the package in float64 NumPy: the oracle of the tests and of `kfac-onnx verify`.

`operators` twins of the `ai.kfac` operators, `block` the embedding block of the original, `table` one
table's training step under a preset, `optimizers` the first-order ones. Nothing here imports another
room, and nothing is fast.
"""

from __future__ import annotations

from kfac_onnx.reference.block import BlockReference, BlockSettings
from kfac_onnx.reference.layers import LayerBlockReference, LayerReference, patches
from kfac_onnx.reference.operators import TWINS
from kfac_onnx.reference.optimizers import (
    AdagradReference,
    AdamReference,
    MomentumReference,
    MuonReference,
    OutputRowReference,
    SgdReference,
)
from kfac_onnx.reference.table import SETTINGS, TableReference, TableSettings

__all__ = [
    "SETTINGS",
    "TWINS",
    "AdagradReference",
    "AdamReference",
    "BlockReference",
    "BlockSettings",
    "LayerBlockReference",
    "LayerReference",
    "MomentumReference",
    "MuonReference",
    "OutputRowReference",
    "SgdReference",
    "TableReference",
    "TableSettings",
    "patches",
]
