"""The public place of the PyTorch exporter."""
