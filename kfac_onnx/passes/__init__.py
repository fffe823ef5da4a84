"""Passes over canonical training graphs, and the pipelines that run them."""
