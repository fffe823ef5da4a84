"""Where the nodes of a training step run: predicted from a table of kernels, or read from ONNX Runtime.

On a device a step should run there as a whole: a node without a kernel falls back to the host, and what it
reads and makes is copied in every step. `predict` says what onnxruntime would do with a model, from the
committed table of the CUDA provider's kernels; `measure` asks onnxruntime where the provider works;
`read_profile` and `read_optimized` read what a run left. All of them answer with a `Placement`.
"""

from __future__ import annotations

from kfac_onnx.device.placement.kernels import KernelTable, cuda_kernels
from kfac_onnx.device.placement.measure import measure
from kfac_onnx.device.placement.predict import predict
from kfac_onnx.device.placement.reading import read_optimized, read_profile
from kfac_onnx.device.placement.records import Copy, Node, Placement

__all__ = [
    "Copy",
    "KernelTable",
    "Node",
    "Placement",
    "cuda_kernels",
    "measure",
    "predict",
    "read_optimized",
    "read_profile",
]
