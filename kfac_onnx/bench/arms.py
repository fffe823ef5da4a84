"""Ways to train the same case: our presets, our ordinary optimizers, PyTorch's and FBGEMM's.

Everything that is no table is trained by Adam in every arm, at the same rate.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from kfac_onnx.bench.place import HOST
from kfac_onnx.bench.rates import REST_LR
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.fisher.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np

    from kfac_onnx.bench.place import Place
    from kfac_onnx.bench.workloads import Case
    from kfac_onnx.runtime import TrainingSession

__all__ = ["ARMS", "DEFAULT_ARMS", "Arm", "Trainee", "choose", "open_arm"]


_log = logging.getLogger(__name__)


class Trainee(Protocol):
    """A model that is being trained by one arm."""

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps for the tables, in bytes."""
        ...

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Make one step; return the batch's loss before it."""
        ...

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
        """Return the mean loss per example."""
        ...

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        ...

    def resume(self, path: Path) -> None:
        """Forget everything, then go on from a checkpoint."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@dataclass(frozen=True)
class Arm:
    """An optimizer of the tables.

    `held` is how many times the tables are in memory while a step runs (values, state, gradient), to tell
    what fits. `dense` arms touch every row in each step. `rates` are tried where steps to a loss are counted.
    """

    name: str
    held: float
    rates: tuple[float, ...]
    dense: bool = False

    @property
    def torch(self) -> bool:
        """Whether it is PyTorch's."""
        return self.name.startswith("torch-")

    @property
    def fbgemm(self) -> bool:
        """Whether the tables are FBGEMM's."""
        return self.name.startswith("fbgemm-")

    @property
    def ours(self) -> bool:
        """Whether a `TrainingSession` trains it."""
        return not (self.torch or self.fbgemm)


_SGD = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_ADAM = (0.005, 0.01, 0.02, 0.05, 0.1)
_ADAGRAD = (0.05, 0.1, 0.2, 0.5, 1.0)


def _around(lr: float) -> tuple[float, ...]:
    """Return the rates to try for a preset: half its own to ten times that."""
    return tuple(round(factor * lr, 6) for factor in (0.5, 1.0, 2.0, 5.0, 10.0))


ARMS: Final = {
    arm.name: arm
    for arm in (
        Arm("plain-sgd", 1.0, _SGD),
        *(Arm(name, 1.1, _around(preset.lr)) for name, preset in PRESETS.items()),
        Arm("plain-adam", 14.0, _ADAM, dense=True),
        Arm("plain-adagrad", 3.0, _ADAGRAD),
        Arm("fbgemm-sgd", 2.0, _SGD),
        Arm("fbgemm-rowwise-adagrad", 2.0, _ADAGRAD),
        Arm("torch-sgd", 1.0, _SGD),
        Arm("torch-sparse-adam", 3.0, _ADAM),
        Arm("torch-sparse-adagrad", 2.0, _ADAGRAD),
        Arm("torch-adam", 6.0, _ADAM, dense=True),
        Arm("torch-adagrad", 4.0, _ADAGRAD, dense=True),
        Arm("torch-fused-adam", 5.0, _ADAM, dense=True),
    )
}
"""All arms; the first is what ratios are to."""

DEFAULT_ARMS: Final = (
    "plain-sgd",
    *(name for name, preset in PRESETS.items() if not preset.per_example),
    "plain-adam",
    "plain-adagrad",
)
FBGEMM_ARMS: Final = tuple(name for name, arm in ARMS.items() if arm.fbgemm)
TORCH_ARMS: Final = tuple(name for name, arm in ARMS.items() if arm.torch and name != "torch-fused-adam")
GPU_TORCH_ARMS: Final = (*(name for name in TORCH_ARMS if name != "torch-adam"), "torch-fused-adam")
"""On a GPU, dense Adam is the one that takes a kernel for all of its work."""


def choose(names: Iterable[str], *, torch: bool, gpu: bool = False) -> tuple[Arm, ...]:
    """Return arms by name in the order of the table; none named: the default ones, PyTorch's with `torch`.

    With `torch`, FBGEMM's are among them where it is installed, and said to be left out where it is not.
    Plain SGD is always among them, since ratios are to it.

    Raises UserError for an unknown name, and where PyTorch or FBGEMM is asked for and missing.
    """
    wanted = set(names) or {*DEFAULT_ARMS}
    if torch and not any(name.startswith("torch-") for name in wanted):
        wanted.update(GPU_TORCH_ARMS if gpu else TORCH_ARMS)
        if not gpu and _installed("fbgemm_gpu"):
            wanted.update(FBGEMM_ARMS)
        elif not gpu:
            _log.warning("FBGEMM's arms are left out: pip install 'kfac-onnx[fbgemm]'")
    for name in sorted(wanted - set(ARMS)):
        raise UserError(
            f"unknown arm '{name}'{did_you_mean(name, ARMS)}", help=f"the arms are: {', '.join(ARMS)}"
        )
    chosen = tuple(arm for name, arm in ARMS.items() if name in wanted or name == "plain-sgd")
    if not all(arm.ours for arm in chosen) and not _installed("torch"):
        raise UserError("PyTorch's optimizers need PyTorch", help="pip install 'kfac-onnx[torch]'")
    if any(arm.fbgemm for arm in chosen):
        if gpu:
            raise UserError("FBGEMM's arms are measured on the CPU alone", help="leave them out of --arms")
        if not _installed("fbgemm_gpu"):
            raise UserError("FBGEMM's optimizers need FBGEMM", help="pip install 'kfac-onnx[fbgemm]'")
    return chosen


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def open_arm(
    arm: Arm,
    case: Case,
    parameters: Path,
    *,
    threads: int | None,
    lr: float | None = None,
    rest_lr: float = REST_LR,
    place: Place = HOST,
) -> Trainee:
    """Return a case, at the values of a file, ready to be trained by an arm."""
    if arm.fbgemm:
        from kfac_onnx.bench.fbgemm_arms import FbgemmTrainee

        return FbgemmTrainee(arm.name, case, parameters, threads=threads, lr=lr, rest_lr=rest_lr)
    if arm.torch:
        from kfac_onnx.bench.torch_arms import TorchTrainee

        device = place.torch_device
        return TorchTrainee(
            arm.name, case, parameters, threads=threads, lr=lr, rest_lr=rest_lr, device=device
        )
    return OurTrainee(arm.name, case, parameters, threads=threads, lr=lr, rest_lr=rest_lr, place=place)


class OurTrainee:
    """A `TrainingSession` over the case's graph, transformed with a preset."""

    def __init__(
        self,
        preset: str,
        case: Case,
        parameters: Path,
        *,
        threads: int | None,
        lr: float | None,
        rest_lr: float = REST_LR,
        place: Place = HOST,
    ) -> None:
        from kfac_onnx.api import transform
        from kfac_onnx.reports.inspect import inspect
        from kfac_onnx.runtime import TrainingSession

        model = transform(
            case.graph(), preset=preset, lr=lr, rest="adam", rest_lr=rest_lr, target=place.target
        )
        self._threads = threads
        self._place = place
        self._session: TrainingSession | None = TrainingSession(
            model,
            providers=place.providers,
            parameters=parameters,
            threads=threads,
            cuda_graph=place.cuda_graph,
        )
        self.state_bytes = sum(site.state_bytes for site in inspect(model).sites)

    @property
    def session(self) -> TrainingSession:
        """The session that is open."""
        if self._session is None:
            raise ValueError("the session is closed")
        return self._session

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Make one step; return the batch's loss before it."""
        loss = self.session.step(batch)["loss"]
        return float("nan") if loss is None else loss

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
        """Return the mean loss per example."""
        return self.session.evaluate(batches)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        self.session.save(path)

    def resume(self, path: Path) -> None:
        """Forget everything, then go on from a checkpoint."""
        from kfac_onnx.runtime import TrainingSession

        self.close()
        self._session = TrainingSession.resume(
            path, providers=self._place.providers, threads=self._threads, cuda_graph=self._place.cuda_graph
        )

    def close(self) -> None:
        """Release everything."""
        if self._session is not None:
            self._session.close()
            self._session = None
