"""What a training session shows of itself: metrics of a step, its parameters, what runs where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kfac_onnx.runtime.step.mapped_tables import MappedBuffer
    from kfac_onnx.runtime.step.runner import Holder
    from kfac_onnx.runtime.step.skip_causes import Cause
    from kfac_onnx.runtime.step.tensors import Device
    from kfac_onnx.runtime.turns import Turns

__all__ = ["Description", "Metrics", "Parameters", "describe"]


class Metrics(TypedDict):
    """What a step reports: `step` counts kept steps, `lr` is the tables' rate times the schedule's factor.

    `loss` is None where it lies outside the graph. `skip` is there for skipped steps only: what was not
    finite, the earliest in the graph first. `outputs` is there for drop-in graphs only: their own outputs,
    such as the preconditioned gradients.
    """

    loss: float | None
    skipped: bool
    step: int
    lr: float
    skip: NotRequired[tuple[Cause, ...]]
    outputs: NotRequired[dict[str, np.ndarray]]


class Description(TypedDict):
    """What `describe` says; `state_bytes` counts parameters and both buffers of each state.

    Of the random operators (Dropout), `random_restarts` are ONNX Runtime's own, whose sequence starts anew in
    a resumed run (those within loops, and all on another device than the CPU). `tables_on_disk` are the
    files of the tables that are trained in them.
    """

    providers: list[str]
    device: str
    threads: int | None
    stages: list[str]
    in_place: bool
    in_place_problem: str | None
    states: dict[str, str]
    state_bytes: int
    random_operators: int
    random_restarts: int
    tables_on_disk: dict[str, str]


class Parameters(Mapping[str, np.ndarray]):
    """The trained parameters (or the statistics) as copies, in the exporter's names, layouts and dtypes."""

    def __init__(
        self,
        holders: Mapping[str, Holder],
        turns: Turns,
        role: Literal["parameter", "statistic"] = "parameter",
    ) -> None:
        self._turns = turns
        self._holders = {name: holder for name, holder in holders.items() if holder.state.role == role}

    def __getitem__(self, name: str) -> np.ndarray:
        with self._turns.turn("parameters"):
            return self._holders[name].live.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


def describe(
    *,
    providers: Sequence[str | tuple[str, dict[str, str]]],
    device: Device,
    threads: int | None,
    stages: list[str],
    holders: Mapping[str, Holder],
    in_place_problem: str | None,
    random_operators: int,
    random_restarts: int,
    tables: Mapping[str, MappedBuffer],
) -> Description:
    """Return the description of a session made of these parts."""
    return {
        "providers": [item if isinstance(item, str) else item[0] for item in providers],
        "device": f"{device.name}:{device.index}",
        "threads": threads,
        "stages": stages,
        "in_place": in_place_problem is None,
        "in_place_problem": in_place_problem,
        "states": {
            name: "in-place" if len(holder.buffers) == 1 else "two buffers"
            for name, holder in holders.items()
        },
        "state_bytes": sum(b.nbytes for holder in holders.values() for b in holder.buffers),
        "random_operators": random_operators,
        "random_restarts": random_restarts,
        "tables_on_disk": {name: str(buffer.path) for name, buffer in tables.items()},
    }
