"""Batches: from files or arrays to what a step reads."""
