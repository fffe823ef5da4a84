"""Training graphs out of PyTorch modules."""

from kfac_onnx.torch.export import export_training_graph

__all__ = ["export_training_graph"]
