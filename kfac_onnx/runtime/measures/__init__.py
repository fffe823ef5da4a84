"""Metrics of held-out data, and the evaluation that a run is judged by."""
