"""Training graphs out of PyTorch modules."""
