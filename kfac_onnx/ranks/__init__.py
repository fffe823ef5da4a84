"""Training on several processes: a step cut where they exchange, and one rank of it."""

from kfac_onnx.ranks.fabric import Alone, Mpi
from kfac_onnx.ranks.session import RankSession

__all__ = ["Alone", "Mpi", "RankSession"]
