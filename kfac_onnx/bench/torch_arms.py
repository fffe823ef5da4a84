"""The same models in PyTorch, trained as its users would: imported only where PyTorch is asked for.

Sparse arms use sparse gradients of `embedding` and `embedding_bag`; dense arms do not.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.bench.rates import REST_LR
from kfac_onnx.runtime.saved.weights import stored_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from kfac_onnx.bench.workloads import Case

__all__ = ["LOSSES", "Tensors", "TorchTrainee", "torch"]

# PyTorch is an extra, and its signatures are partly untyped: it and its values are `Any` here.
torch: Any = importlib.import_module("torch")
functional: Any = importlib.import_module("torch.nn.functional")
Tensors = dict[str, Any]


Rows = Callable[[str], Any]
"""Table name to what the batch's lookups read: [..., D], bags summed where the workload has bags."""


def _mf(rows: Rows, p: Tensors, batch: Tensors) -> Any:
    return functional.mse_loss((rows("user") * rows("item")).sum(-1) + p["bias"], batch["ratings"])


def _movielens(rows: Rows, p: Tensors, batch: Tensors) -> Any:
    read = {name: rows(name) for name in ("user", "item", "user_bias", "item_bias")}
    offset = (read["user_bias"] + read["item_bias"]).squeeze(-1) + p["bias"]
    error = (read["user"] * read["item"]).sum(-1) + offset - batch["ratings"]
    size = torch.cat(list(read.values()), 1).square().sum(-1)
    return (error.square() + batch["penalty"] * size).mean()


def _lm(rows: Rows, p: Tensors, batch: Tensors) -> Any:
    words = rows("embedding.weight").flatten(1)
    hidden = torch.tanh(functional.linear(words, p["hidden.weight"], p["hidden.bias"]))
    logits = functional.linear(hidden, p["output.weight"], p["output.bias"])
    return functional.cross_entropy(logits, batch["labels"])


def _dlrm(rows: Rows, p: Tensors, batch: Tensors) -> Any:
    tables = sorted({f"table_{name.removeprefix('ids_')}" for name in batch if name.startswith("ids_")})
    features = torch.cat([*(rows(name) for name in tables), batch["numbers"]], 1)
    hidden = torch.relu(functional.linear(features, p["hidden_weight"], p["hidden_bias"]))
    logits = functional.linear(hidden, p["output_weight"], p["output_bias"]).squeeze(-1)
    return functional.binary_cross_entropy_with_logits(logits, batch["labels"])


LOSSES: Final[dict[str, Callable[[Rows, Tensors, Tensors], Any]]] = {
    "mf": _mf,
    "movielens": _movielens,
    "lm": _lm,
    "dlrm": _dlrm,
}
"""Loss of a batch, from the rows that its lookups read and the other parameters."""


def _keys(case: Case) -> dict[str, str]:
    """Return the batch input that holds the ids of each table."""
    match case.workload:
        case "lm":
            return dict.fromkeys(case.tables, "ids")
        case "dlrm":
            return {name: name.replace("table_", "ids_") for name in case.tables}
        case _:
            return {name: "users" if name.startswith("user") else "items" for name in case.tables}


_OPTIMIZERS: Final[dict[str, tuple[Callable[..., Any], float, bool]]] = {
    "torch-sgd": (torch.optim.SGD, 0.1, True),
    "torch-sparse-adam": (torch.optim.SparseAdam, 1e-3, True),
    "torch-sparse-adagrad": (torch.optim.Adagrad, 1e-2, True),
    "torch-adam": (torch.optim.Adam, 1e-3, False),
    "torch-adagrad": (torch.optim.Adagrad, 1e-2, False),
    "torch-fused-adam": (partial(torch.optim.Adam, fused=True), 1e-3, False),
}
"""Optimizer of the tables, its learning rate where none is given, and whether gradients are sparse."""


class TorchTrainee:
    """A case in PyTorch, on the CPU or a GPU; its float32 products are float32's, as PyTorch has them."""

    def __init__(
        self,
        name: str,
        case: Case,
        parameters: Path,
        *,
        threads: int | None,
        lr: float | None,
        rest_lr: float = REST_LR,
        device: str = "cpu",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        # As by default, but said, which spares the user a warning about it.
        torch.sparse.check_sparse_tensor_invariants.disable()
        self._settings(name, lr)
        self._rest_lr = rest_lr
        self._case = case
        self._device = device
        self._keys = _keys(case)
        self._values: Tensors = {}
        for key, stored in stored_weights(parameters).items():
            array = np.empty(stored.shape, np.float32)
            if isinstance(stored, np.ndarray):
                array[...] = stored
            else:
                stored.read_into(array)
            self._values[key] = torch.from_numpy(array).to(device).requires_grad_()
        self._open()

    def _settings(self, name: str, lr: float | None) -> None:
        self._make, default, self._sparse = _OPTIMIZERS[name]
        self._lr = default if lr is None else lr

    def _objective(self, batch: Tensors, *, sparse: bool) -> Any:
        """Return the loss of a batch."""

        def rows(name: str) -> Any:
            ids, weights = batch[self._keys[name]], self._values[name]
            if self._case.workload == "dlrm":
                return functional.embedding_bag(ids, weights, mode="sum", sparse=sparse)
            return functional.embedding(ids, weights, sparse=sparse)

        return LOSSES[self._case.workload](rows, self._values, batch)

    def _open(self) -> None:
        tables = [self._values[name] for name in self._case.tables]
        others = [self._values[name] for name in self._case.others]
        self._optimizers: list[Any] = [self._make(tables, lr=self._lr)]
        if others:
            self._optimizers.append(torch.optim.Adam(others, lr=self._rest_lr))

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps for the tables; known after the first step."""
        states: Any = self._optimizers[0].state.values()
        return sum(
            value.numel() * value.element_size()
            for state in states
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    def _tensors(self, batch: Mapping[str, np.ndarray]) -> Tensors:
        return {name: torch.from_numpy(array).to(self._device) for name, array in batch.items()}

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Make one step; return the batch's loss before it."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self._objective(self._tensors(batch), sparse=self._sparse)
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        value = float(loss.detach())
        if self._device != "cpu":  # the loss is there before the optimizer has run
            torch.cuda.synchronize(self._device)
        return value

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
        """Return the mean loss per example."""
        total = count = 0.0
        with torch.no_grad():
            for batch in batches:
                examples = len(next(iter(batch.values())))
                total += float(self._objective(self._tensors(batch), sparse=False)) * examples
                count += examples
        return total / count

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        torch.save({"values": self._values, "optimizers": optimizers}, path)

    def resume(self, path: Path) -> None:
        """Forget everything, then go on from a checkpoint."""
        self.close()
        stored: Any = torch.load(path, weights_only=True, map_location=self._device)
        self._values = {name: value.detach().requires_grad_() for name, value in stored["values"].items()}
        self._open()
        for optimizer, state in zip(self._optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def close(self) -> None:
        """Release everything."""
        self._values, self._optimizers = {}, []
        gc.collect()
        if self._device != "cpu":
            torch.cuda.empty_cache()
