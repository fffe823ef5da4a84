"""The optimizers that the demo compares, each at the learning rates that were best for it.

The rates come from sweeps at a constant learning rate over 1,200 steps (benchmarks/convergence for those of
Adam as the rest). The two baselines come first.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.demo.curves import Curve
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from kfac_onnx.device.providers import GivenProviders

__all__ = ["ARMS", "BASELINES", "TURN", "Arm", "ArmResult", "train"]

TURN: Final = 10
"""Steps that an arm makes before the next one's turn."""


@dataclass(frozen=True)
class Arm:
    """What trains the table, and what trains the rest, with their learning rates.

    `options` are further ones of `transform`: of hidden matrices and of output tables.
    """

    name: str
    preset: str
    lr: float
    rest_lr: float
    rest: str = "adam"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


ARMS: Final = (
    Arm("Adam", "plain-adam", lr=0.006, rest_lr=0.004),
    Arm(
        "Muon + Adam",
        "plain-adam",
        lr=0.006,
        rest_lr=0.003,
        options={"rules": ("hidden.weight=muon{lr=0.00667}",)},
    ),
    Arm("ours on tables", DEFAULT_PRESET, lr=0.01, rest_lr=0.003),
    Arm(
        "ours everywhere",
        DEFAULT_PRESET,
        lr=0.00667,
        rest_lr=0.003,
        rest="kfac",
        options={"hidden_lr": 0.0015, "output_lr": 0.006},
    ),
)
"""Adam first: the steps to its best held-out loss are counted in the table."""
BASELINES: Final = ("Adam", "Muon + Adam")
"""Arms that the others are compared with: steps, and time, to the best loss of each."""


@dataclass(frozen=True)
class ArmResult:
    """What one arm did: held-out losses, median milliseconds of a step, the table's optimizer state."""

    arm: Arm
    curve: Curve
    ms_per_step: float
    state_bytes: int
    skipped: int


def train(
    arm: Arm,
    model: ir.Model,
    parameters: Mapping[str, NDArray[np.float32]],
    batches: Iterable[Mapping[str, NDArray[np.int64]]],
    held_out: Sequence[Mapping[str, NDArray[np.int64]]],
    *,
    steps: int,
    every: int,
    threads: int | None,
    tell: Callable[[int, float], None],
    providers: GivenProviders = ("CPUExecutionProvider",),
) -> Generator[None, None, ArmResult]:
    """Train one arm, evaluating after every `every` steps; `tell(step, held-out loss)` hears of them.

    Between evaluations `tell` gets the last held-out loss (NaN before the first). It stops after every
    `TURN` steps, so that arms can take turns: whatever else the machine does then meets all of them alike.
    """
    from kfac_onnx.reports.inspect import inspect
    from kfac_onnx.runtime import TrainingSession

    at: list[int] = []
    losses: list[float] = []
    times: list[float] = []
    skipped = 0
    with TrainingSession(model, providers=providers, parameters=dict(parameters), threads=threads) as session:
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            start = time.perf_counter()
            skipped += session.step(batch)["skipped"]
            times.append(time.perf_counter() - start)
            if step % every == 0 or step == steps:
                at.append(step)
                losses.append(session.evaluate(held_out))
            tell(step, losses[-1] if losses else float("nan"))
            if step % TURN == 0:
                yield
    return ArmResult(
        arm=arm,
        curve=Curve(tuple(at), tuple(losses)),
        ms_per_step=1e3 * statistics.median(times),
        state_bytes=sum(site.state_bytes for site in inspect(model).sites),
        skipped=skipped,
    )
