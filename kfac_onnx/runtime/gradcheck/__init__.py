"""Gradients held against finite differences."""
