"""Where these tests run: on a GPU, and the same bodies on the CPU's kernels.

`host` is a stand-in for the GPU's memory with the CPU's kernels on one thread (`fake_device`): graphs are
lowered for CUDA, and sessions go the way of a device. So the numbers of what is lowered, and the copies, are
checked everywhere; that CUDA's kernels give them too, only where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from corpus_cases import marked
from fake_device import FakeCuda

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession, open_step
from kfac_onnx.runtime.step import cuda_graphs

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import onnx_ir as ir


@dataclass(frozen=True)
class Place:
    """Providers of sessions, and how much looser than on the CPU tolerances are."""

    name: str
    providers: tuple[str, ...]
    looser: float

    @property
    def opened(self) -> dict[str, Any]:
        return {"providers": self.providers}

    @property
    def is_gpu(self) -> bool:
        return self.name == "cuda"


HOST = Place("host", ("CPUExecutionProvider",), 1.0)
# Matrix products and reductions of float32 are summed in tiles, and rows in any order, on a GPU: by experience
# of such kernels a few times the rounding of a sequential sum.
CUDA = Place("cuda", ("cuda",), 8.0)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Both places, one after the other."""
    return at(request.param, monkeypatch)


def at(name: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    if name == "cuda":
        return CUDA
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(open_step, "device_of", lambda providers: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: False)
    return HOST


@dataclass(frozen=True)
class Trained:
    """What a run left: losses, and all parameters and states."""

    losses: list[float]
    states: dict[str, np.ndarray]

    @property
    def bits(self) -> list[object]:
        return [self.losses, {name: array.tobytes() for name, array in self.states.items()}]


@pytest.fixture
def trained() -> Callable[..., Trained]:
    """Train a committed graph for some steps: `lowered` are options of `transform`, `opened` of the session."""

    def call(name: str, steps: int, lowered: dict[str, Any], opened: dict[str, Any]) -> Trained:
        case, graph = marked(name)
        model: ir.Model = transform(case.path, lr=0.01, rest="sgd", rest_lr=1e-3, **lowered)
        with TrainingSession(model, parameters=graph.initial(case), threads=1, **opened) as session:
            names = [item.name for item in session.batch_inputs]
            feeds = [{key: case.feed(which)[key] for key in names} for which in ("in", "in2")]
            losses = [float(str(session.step(feeds[t % 2])["loss"])) for t in range(steps)]
            return Trained(losses, session.states)

    return call
