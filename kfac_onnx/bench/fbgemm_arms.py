"""The same models with their tables in FBGEMM's fused operator on the CPU (extra `fbgemm`).

One `SplitTableBatchedEmbeddingBagsCodegen` holds all tables of a case; the rest is as in `torch_arms`.
Its backward pass updates the rows, so that there is no optimizer step for tables.
"""

from __future__ import annotations

import gc
import importlib
import warnings
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.bench.torch_arms import LOSSES, TorchTrainee, torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kfac_onnx.bench.torch_arms import Tensors

__all__ = ["FbgemmTrainee", "why_not"]

_TRAINING: Final = "fbgemm_gpu.split_table_batched_embeddings_ops_training"
_COMMON: Final = "fbgemm_gpu.split_table_batched_embeddings_ops_common"
_CONFIGS: Final = "fbgemm_gpu.split_embedding_configs"
_WIDTHS: Final = 4
"""Its kernels read rows four floats at a time."""

_OPTIMIZERS: Final = {
    "fbgemm-sgd": ("EXACT_SGD", 0.1),
    "fbgemm-rowwise-adagrad": ("EXACT_ROWWISE_ADAGRAD", 1e-2),
}
"""Name in FBGEMM, and the learning rate where none is given."""


def why_not(widths: Iterable[int]) -> str | None:
    """Return why tables of these widths cannot be FBGEMM's, or None if they can."""
    odd = sorted({width for width in widths if width % _WIDTHS})
    if odd:
        return f"FBGEMM wants widths that are multiples of {_WIDTHS}, not {', '.join(map(str, odd))}"
    return None


def _modules() -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():  # the build for CPUs lacks modules for GPUs, and warns of each
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("fbgemm_gpu")  # registers the operators that the others use
        training, common, configs = (importlib.import_module(name) for name in (_TRAINING, _COMMON, _CONFIGS))
    return training, common, configs


class FbgemmTrainee(TorchTrainee):
    """A case whose tables are one fused operator of FBGEMM on the CPU."""

    def _settings(self, name: str, lr: float | None) -> None:
        self._kind, default = _OPTIMIZERS[name]
        self._sparse = False
        self._lr = default if lr is None else lr

    def _open(self) -> None:
        training, common, configs = _modules()
        host, cpu = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        shapes = [self._case.tables[name] for name in self._case.tables]
        self._fused: Any = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, width, host, cpu) for rows, width in shapes],
            optimizer=getattr(configs.EmbOptimType, self._kind),
            learning_rate=self._lr,
            eps=1e-8,
            pooling_mode=common.PoolingMode.SUM,
        )
        for name, weights in zip(self._case.tables, self._fused.split_embedding_weights(), strict=True):
            weights.copy_(self._values.pop(name).detach())
        others = [self._values[name] for name in self._case.others]
        self._optimizers: list[Any] = [torch.optim.Adam(others, lr=self._rest_lr)] if others else []

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps for the tables."""
        return sum(
            value.numel() * value.element_size()
            for states in self._fused.split_optimizer_states()
            for value in states
        )

    def _objective(self, batch: Tensors, *, sparse: bool) -> Any:
        """Return the loss; the rows of all tables come out of one call."""
        del sparse  # its gradients are never tensors
        ids = {name: batch[key] for name, key in self._keys.items()}
        bags = self._case.workload == "dlrm"
        # A lookup that is not summed is a bag of one.
        sizes = {name: value.shape[-1] if bags else 1 for name, value in ids.items()}
        ends = torch.cat(
            [torch.full((value.numel() // sizes[name],), sizes[name]) for name, value in ids.items()]
        )
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends.cumsum(0)])
        joined = self._fused(torch.cat([value.flatten() for value in ids.values()]), offsets)
        widths = [self._case.tables[name][1] for name in ids]
        parts = dict(zip(ids, joined.split(widths, 1), strict=True))

        def rows(name: str) -> Any:
            return parts[name] if bags else parts[name].reshape(*ids[name].shape, -1)

        return LOSSES[self._case.workload](rows, self._values, batch)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        tables = dict(zip(self._case.tables, self._fused.split_embedding_weights(), strict=True))
        stored = {
            "values": {**self._values, **tables},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "rows": [list(states) for states in self._fused.split_optimizer_states()],
        }
        torch.save(stored, path)

    def resume(self, path: Path) -> None:
        """Forget everything, then go on from a checkpoint."""
        super().resume(path)
        stored: Any = torch.load(path, weights_only=True)
        for states, kept in zip(self._fused.split_optimizer_states(), stored["rows"], strict=True):
            for state, value in zip(states, kept, strict=True):
                state.copy_(value)

    def close(self) -> None:
        """Release everything."""
        self._fused = None
        super().close()
        gc.collect()
