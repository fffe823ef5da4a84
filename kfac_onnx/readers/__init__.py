"""Readers of exported training graphs: from each exporter's files to one canonical form."""

from kfac_onnx.canonical.race_free_scatters import make_scatters_race_free
from kfac_onnx.readers.loss import emit_divisor
from kfac_onnx.readers.read import read_forward_graph, read_training_graph
from kfac_onnx.readers.training_info import initial_values

__all__ = [
    "emit_divisor",
    "initial_values",
    "make_scatters_race_free",
    "read_forward_graph",
    "read_training_graph",
]
