"""What a training session shows of itself: metrics of a step, its parameters, what runs where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kfac_onnx.runtime.engine import Holder

__all__ = ["Description", "Metrics", "Parameters"]


class Metrics(TypedDict):
    """What a step reports: `step` counts kept steps, `lr` is the tables' rate times the schedule's factor.

    `outputs` is there for drop-in graphs only: their own outputs, such as the preconditioned gradients.
    """

    loss: float
    skipped: bool
    step: int
    lr: float
    outputs: NotRequired[dict[str, np.ndarray]]


class Description(TypedDict):
    """What `describe` says; `state_bytes` counts parameters and both buffers of each state."""

    providers: list[str]
    device: str
    threads: int | None
    stages: list[str]
    in_place: bool
    in_place_problem: str | None
    states: dict[str, str]
    state_bytes: int
    random_operators: int


class Parameters(Mapping[str, np.ndarray]):
    """The trained parameters as copies, in the exporter's names, layouts and dtypes."""

    def __init__(self, holders: Mapping[str, Holder]) -> None:
        self._holders = {name: holder for name, holder in holders.items() if holder.state.role == "parameter"}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._holders[name].live.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)
