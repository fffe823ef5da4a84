"""Run the demo: scan, transform, train four optimizers on the same batches, tabulate and draw.

Results go to the console given (standard output by default), the progress bar to standard error.
"""

from __future__ import annotations

import itertools
import json as json_text
import time
from collections import deque
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kfac_onnx.demo.arms import ARMS, BASELINES, ArmResult, train
from kfac_onnx.demo.corpus import CLASSES, CONTEXT, load_corpus
from kfac_onnx.demo.curves import check_plot, draw_png, draw_text
from kfac_onnx.demo.model import initial_parameters
from kfac_onnx.device.providers import provider_list
from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import thread_count
from kfac_onnx.runtime.step.tensors import device_of

if TYPE_CHECKING:
    from collections.abc import Generator

    import onnx_ir as ir

    from kfac_onnx.device.providers import GivenProviders

__all__ = ["DemoResult", "run"]

_BATCH = 256
"""Examples per step; each looks up four rows of the table."""


@dataclass(frozen=True)
class _Scale:
    """How long a run is: steps, steps between evaluations, held-out positions scored (None: all)."""

    steps: int
    every: int
    held_out: int | None


_FULL = _Scale(steps=1_200, every=50, held_out=None)
_QUICK = _Scale(steps=400, every=20, held_out=1_000)


@dataclass(frozen=True)
class DemoResult:
    """All arms, the level they are compared at (Adam's best held-out loss, nats), and what it took."""

    arms: tuple[ArmResult, ...]
    level: float
    steps: int
    seed: int
    seconds: float

    def steps_to_level(self, result: ArmResult) -> float | None:
        """Return the step at which an arm reached the level, or None if it did not."""
        return result.curve.first_below(self.level)

    def steps_ratio(self, result: ArmResult, baseline: ArmResult) -> float | None:
        """Return an arm's steps to a baseline's best loss over the baseline's own; None if never reached."""
        level = baseline.curve.best
        own, reached = baseline.curve.first_below(level), result.curve.first_below(level)
        return None if own is None or reached is None else reached / own

    def time_ratio(self, result: ArmResult, baseline: ArmResult) -> float | None:
        """Return the same of wall-clock: the ratio of steps times that of the median steps' times."""
        steps = self.steps_ratio(result, baseline)
        return None if steps is None else steps * result.ms_per_step / baseline.ms_per_step

    @property
    def baselines(self) -> list[ArmResult]:
        """The arms that the others are compared with."""
        return [entry for entry in self.arms if entry.arm.name in BASELINES]

    def to_json(self) -> str:
        """Return everything as one JSON object; ratios are by the name of the baseline."""
        data: dict[str, Any] = asdict(self)
        for entry, result in zip(data["arms"], self.arms, strict=True):
            entry["best_loss"] = result.curve.best
            entry["steps_to_level"] = self.steps_to_level(result)
            for name, ratio in (("steps_ratio", self.steps_ratio), ("time_ratio", self.time_ratio)):
                entry[name] = {base.arm.name: ratio(result, base) for base in self.baselines}
        return json_text.dumps(data)


def run(
    quick: bool = False,
    seed: int = 0,
    steps: int | None = None,
    plot: str | Path | None = None,
    threads: int | None = None,
    json: bool = False,
    console: Console | None = None,
    providers: GivenProviders = ("CPUExecutionProvider",),
) -> DemoResult:
    """Train the shipped language model with Adam, Muon and the blocks, on tables and everywhere, and report.

    `quick` makes a run of under 40 s on two cores, `steps` sets the steps of each arm, `plot` names a
    PNG to draw, `json` prints one JSON object instead of tables, `providers` are ONNX Runtime's. Raises
    `UserError` for steps below 2, for no threads, for a provider that does not work, and for a plot that
    could not be drawn, before any training.
    """
    scale = _QUICK if quick else _FULL
    if steps is not None:
        if steps < 2:
            raise UserError(f"the demo needs at least 2 steps, not {steps}")
        scale = _Scale(steps, max(1, min(scale.every, steps // 2)), scale.held_out)
    threads = thread_count(threads)
    working = provider_list(providers)
    if plot is not None:
        check_plot(Path(plot))
    console = console or Console()
    quiet = Console(quiet=True) if json else console
    start = time.perf_counter()
    corpus = load_corpus()
    held_out = corpus.held_out(limit=scale.held_out)
    quiet.print(
        f"data: King James Bible, {len(corpus.tokens):,} words, {len(corpus.words):,} different; "
        f"predict the next ({CLASSES:,} classes) from the {CONTEXT} before it"
    )
    models = _models(quiet, "cpu" if device_of(working).is_cpu else "cuda")
    parameters = initial_parameters(seed)
    runs: dict[str, Generator[None, None, ArmResult]] = {}
    with _progress() as progress:
        for arm in ARMS:
            task = progress.add_task(arm.name, total=scale.steps, loss="")

            def tell(step: int, loss: float, task: Any = task) -> None:
                progress.update(task, completed=step, loss=f"held-out {loss:.3f}" if loss == loss else "")

            runs[arm.name] = train(
                arm,
                models[arm.name],
                parameters,
                itertools.islice(corpus.batches(_BATCH, seed), scale.steps),
                held_out,
                steps=scale.steps,
                every=scale.every,
                threads=threads,
                tell=tell,
                providers=working,
            )
        results = _in_turn(runs)
    result = DemoResult(
        arms=tuple(results),
        level=results[0].curve.best,
        steps=scale.steps,
        seed=seed,
        seconds=time.perf_counter() - start,
    )
    curves = [(arm.arm.name, arm.curve) for arm in results]
    if plot is not None:
        draw_png(curves, Path(plot), title="King James Bible, next word")
    if json:
        console.print(result.to_json(), soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(_table(result))
        console.print(Text.from_ansi(draw_text(curves, width=min(100, console.width))))
        if plot is not None:
            console.print(f"curves drawn to {plot}")
    return result


def _in_turn(runs: dict[str, Generator[None, None, ArmResult]]) -> list[ArmResult]:
    """Let all arms train in turn, in an order that rotates; return their results in the order of the arms."""
    order, results = deque(runs), dict[str, ArmResult]()
    while order:
        for name in list(order):
            try:
                next(runs[name])
            except StopIteration as end:
                results[name] = end.value
                order.remove(name)
        order.rotate(-1)
    return [results[name] for name in runs]


def _models(console: Console, target: str) -> dict[str, ir.Model]:
    """Scan the shipped graph and transform it once for each arm."""
    from kfac_onnx.api import scan, transform

    models: dict[str, ir.Model] = {}
    packed = resources.files("kfac_onnx.demo").joinpath("data/lm.onnx")
    with resources.as_file(packed) as path:
        for site in scan(path).sites:
            console.print(
                f"scan: {site.parameter} is a table of {site.vocab_size:,} x {site.embedding_dim}, "
                f"read by {', '.join(use.op for use in site.uses)}"
            )
        for arm in ARMS:
            models[arm.name] = transform(
                path,
                preset=arm.preset,
                lr=arm.lr,
                rest=arm.rest,
                rest_lr=arm.rest_lr,
                target=target,
                **arm.options,
            )
            console.print(f"transform: {arm.name}: {len(models[arm.name].graph)} nodes")
    return models


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
    )


def _table(result: DemoResult) -> Table:
    adam = result.arms[0].arm.name
    baselines = result.baselines
    table = Table(
        title=f"{result.steps:,} steps of {_BATCH} examples each, seed {result.seed}, {result.seconds:.0f} s",
        caption=f"loss: held out, in nats; steps: until {adam}'s best loss, {result.level:.4f}; "
        "vs: steps / time to the best loss of a baseline, over its own; "
        "state: what the table's optimizer keeps",
    )
    table.add_column("optimizer", no_wrap=True)
    for heading in ("best loss", "steps"):
        table.add_column(heading, justify="right")
    for base in baselines:
        table.add_column(f"vs {base.arm.name}", justify="right")
    for heading in ("ms/step", "state"):
        table.add_column(heading, justify="right")
    for entry in result.arms:
        reached = result.steps_to_level(entry)
        table.add_row(
            entry.arm.name,
            f"{entry.curve.best:.4f}",
            "not reached" if reached is None else f"{reached:.0f}",
            *(_pair(result.steps_ratio(entry, base), result.time_ratio(entry, base)) for base in baselines),
            f"{entry.ms_per_step:.1f}",
            _bytes(entry.state_bytes),
        )
    return table


def _pair(steps: float | None, time: float | None) -> str:
    # Blanks that do not break, so that a narrow terminal wraps headings only.
    return "" if steps is None or time is None else f"{steps:.2f}\u00a0/\u00a0{time:.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f}\u00a0MB" if count >= 1e6 else f"{count / 1e3:.1f}\u00a0kB"
