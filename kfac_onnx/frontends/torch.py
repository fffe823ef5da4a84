"""The PyTorch exporter under its public name; it lives in `kfac_onnx.torch`."""

from kfac_onnx.torch.export import export_training_graph

__all__ = ["export_training_graph"]
