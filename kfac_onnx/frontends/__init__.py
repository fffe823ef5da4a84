"""Readers of exported training graphs: from each exporter's files to one canonical form."""

from kfac_onnx.frontends.canonical import read_forward_graph, read_training_graph
from kfac_onnx.frontends.loss import emit_divisor
from kfac_onnx.frontends.scatters import make_scatters_race_free

__all__ = ["emit_divisor", "make_scatters_race_free", "read_forward_graph", "read_training_graph"]
