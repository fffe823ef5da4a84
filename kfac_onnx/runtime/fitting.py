"""The training loop: steps over batches, held-out evaluation, metrics and a progress bar."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, cast

from kfac_onnx.disk.json_lines import json_lines
from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import whole_number
from kfac_onnx.runtime.divergence import ADVICE, LossWatch
from kfac_onnx.runtime.feed.batches import examples_in
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.prefetch import prefetched
from kfac_onnx.runtime.logs.recorder import LOG_EVERY, open_recorder, require_logs
from kfac_onnx.runtime.measures.judge import Judge
from kfac_onnx.runtime.notebook import NotebookBar, in_notebook
from kfac_onnx.runtime.saved.checkpoint_folder import is_folder
from kfac_onnx.runtime.step.skip_causes import advice, reasons
from kfac_onnx.runtime.stopping import stop_signals, stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np

    from kfac_onnx.runtime.description import Metrics
    from kfac_onnx.runtime.health import RootHealth
    from kfac_onnx.runtime.logs.recorder import LogTarget, Recorder
    from kfac_onnx.runtime.schedules import Schedule
    from kfac_onnx.runtime.step.skip_causes import Cause

__all__ = ["SKIP_LIMIT", "FitOptions", "FitResult", "Row", "fit"]

_log = logging.getLogger(__name__)

SMOOTHING = 0.98
"""Weight of the past in the running loss that the progress bar shows."""

MOST_AHEAD = 1024
"""Batches that may be made ahead: each waits in memory for its step."""
PREFETCH = 2
"""Batches made ahead in a thread, of data that this package reads; of a user's iterable none, unasked."""

SKIP_LIMIT = 10
"""Skipped steps in a row that stop a run, unless it says otherwise."""
ROW_CAUSES = 16
"""Causes of a skipped step in its row of metrics: all of a diverged model's parameters would fill files."""


class Trainee(Protocol):
    """What `fit` needs of a session; `TrainingSession` says what each does."""

    schedule: Schedule | None
    data: dict[str, int | bool | None] | None
    settings: str | None
    best: dict[str, float] | None

    @property
    def position(self) -> int: ...
    @property
    def parameters(self) -> Mapping[str, np.ndarray]: ...
    @property
    def tables(self) -> tuple[str, ...]: ...
    def health(self) -> tuple[RootHealth, ...]: ...
    def rates(self) -> Mapping[str, float]: ...
    def step(self, batch: Mapping[str, np.ndarray]) -> Metrics: ...
    def prepared(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...
    def reserve(self, ahead: int) -> None: ...
    def measure(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        metrics: Sequence[str] = (),
        *,
        scores: str | None = None,
        labels: str | None = None,
    ) -> dict[str, float]: ...
    def require_loss(self, what: str) -> None: ...
    def require_place(self, path: str | Path) -> None: ...
    def require_savable(self) -> None: ...
    def alone_in(self, path: str | Path | None) -> AbstractContextManager[None]: ...
    def save(self, path: str | Path, *, keep: int | None = None) -> Path: ...


class Row(TypedDict):
    """One line of metrics; `loss` is null where it is not finite, `held_out` where it was not measured.

    `skip` is there for skipped steps only: sentences that say what was not finite. `held_out_metrics` is
    there where metrics besides the loss were measured.
    """

    step: int
    position: int
    loss: float | None
    skipped: bool
    lr: float
    held_out: float | None
    skip: NotRequired[list[str]]
    held_out_metrics: NotRequired[dict[str, float]]


@dataclass
class FitResult:
    """What `fit` did: steps made and skipped, examples, seconds, last loss, held-out losses by position.

    `last_skip` says what was not finite in the last skipped step; empty where none was.
    """

    steps: int = 0
    skipped: int = 0
    examples: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    held_out: dict[int, float] = field(default_factory=dict[int, float])
    last_skip: tuple[Cause, ...] = ()
    diverged_at: int | None = None
    """The position at which the loss was seen to diverge; None where it was not."""
    measured: dict[int, dict[str, float]] = field(default_factory=dict[int, "dict[str, float]"])
    """Held-out loss and metrics by position."""
    best: dict[str, float] | None = None
    """The best of them by what was monitored, with its `position`; None without held-out data."""
    stopped_early: bool = False


def _supply(
    session: Trainee,
    batches: Iterable[Mapping[str, np.ndarray]],
    steps: int | None,
    epochs: int | None,
) -> tuple[Iterator[Mapping[str, np.ndarray]], int | None]:
    """Return the batches still to run, and how many there are where that is known."""
    if isinstance(batches, Batches):
        size = len(batches)
        whole = size - session.position % size if steps is None and epochs is None else None
        ends = [n for n in (whole, steps, None if epochs is None else epochs * size) if n is not None]
        return islice(batches.since(session.position), min(ends)), min(ends)
    if epochs is not None and epochs > 1 and iter(batches) is batches:
        raise UserError("the batches can be iterated only once, so there is one epoch", help="give a list")
    passes = 1 if epochs is None and steps is None else epochs

    def repeat() -> Iterator[Mapping[str, np.ndarray]]:
        number = 0
        while passes is None or number < passes:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            number += 1
            if empty:
                return

    size = len(batches) if hasattr(batches, "__len__") else None  # pyright: ignore[reportArgumentType]  just checked
    total = None if size is None or passes is None else size * passes
    limits = [n for n in (steps, total) if n is not None]
    return islice(repeat(), steps), min(limits) if limits else None


@contextlib.contextmanager
def _writer(target: Callable[[Row], None] | str | Path | None) -> Generator[Callable[[Row], None]]:
    """Yield what takes each row of metrics: the user's function, or a writer of JSON lines."""
    if target is None:
        yield lambda row: None
    elif isinstance(target, (str, Path)):
        with json_lines(target, "metrics") as write:
            yield write
    else:
        yield target


class _Bar:
    """A progress bar on stderr, or in a notebook: running loss, examples per second, time left."""

    def __init__(self, total: int | None, *, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} examples/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled or in_notebook(),
        )
        self._notebook = NotebookBar(total) if enabled and in_notebook() else None
        self._task = self._progress.add_task("training", total=total, loss="-", rate="-")
        self._running = math.nan
        self._start = time.perf_counter()

    def __enter__(self) -> _Bar:
        self._progress.start()
        if self._notebook is not None:
            self._notebook.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._notebook is not None:
            self._notebook.__exit__(None, None, None)

    def update(self, loss: float, examples: int, held_out: float | None) -> None:
        if math.isfinite(loss):
            past = loss if math.isnan(self._running) else self._running
            self._running = SMOOTHING * past + (1 - SMOOTHING) * loss
        if self._notebook is not None:
            self._notebook.update(self._running, examples, held_out)
            return
        shown = f"{self._running:.4f}" + ("" if held_out is None else f", held out {held_out:.4f}")
        rate = examples / max(1e-9, time.perf_counter() - self._start)
        self._progress.update(self._task, advance=1, loss=shown, rate=f"{rate:,.0f}")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How `fit` trains.

    Args:
        steps: how many more steps.
        epochs: how many more passes over the data; without steps and epochs, to the end of the data.
        held_out: batches to evaluate, at the end and
        eval_every: every so many steps.
        metrics: called with a `Row` per step, or a file to which rows are added as JSON lines.
        progress: show a progress bar on stderr, in a notebook one with the curve of the loss.
        checkpoint: where to save (see `save`; folders are made), at the end and
        checkpoint_every: every so many steps.
        keep: how many checkpoints a folder keeps (default: 3).
        skip_limit: so many skipped steps in a row stop the run; None goes on whatever happens.
        measures: metrics of the held-out data, such as `accuracy`, `auc` and `recall@10` (see `measure`);
        scores, labels: the values of the graph that they are of, where its loss does not say it.
        monitor: what is best by: `loss`, or one of the metrics.
        patience: so many evaluations without a better one end the run; needs eval_every.
        best: the file of the checkpoint that was best.
        log: where numbers go: `tensorboard:DIR`, `mlflow:URI`, `wandb`, `csv:FILE`, a function of numbers by
            name and the position, a `logs.protocol.Log`, or several of them;
        log_every: every so many steps (default: 50).
        histograms: also the distribution of each table's entries.
        prefetch: how many batches a thread makes ahead while a step runs, 0 for no thread; 2 for
            `data.Batches` if None, 0 for any other iterable, which may fill one array again and again.

    Raises:
        UserError: a number is out of range, or an option needs another one.

    """

    steps: int | None = None
    epochs: int | None = None
    held_out: Iterable[Mapping[str, np.ndarray]] | None = None
    eval_every: int | None = None
    metrics: Callable[[Row], None] | str | Path | None = None
    progress: bool = False
    checkpoint: str | Path | None = None
    checkpoint_every: int | None = None
    keep: int | None = None
    skip_limit: int | None = SKIP_LIMIT
    prefetch: int | None = None
    measures: Sequence[str] = ()
    scores: str | None = None
    labels: str | None = None
    monitor: str = "loss"
    patience: int | None = None
    best: str | Path | None = None
    log: LogTarget | Sequence[LogTarget] = ()
    log_every: int = LOG_EVERY
    histograms: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "eval_every", "checkpoint_every", "keep", "skip_limit", "patience"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(value, name, least=1))
        if self.prefetch is not None:
            ahead = whole_number(self.prefetch, "prefetch", least=0, most=MOST_AHEAD)
            object.__setattr__(self, "prefetch", ahead)
        object.__setattr__(self, "log_every", whole_number(self.log_every, "log_every", least=1))
        if self.held_out is None:
            for name in ("measures", "patience", "best"):
                if getattr(self, name):
                    raise UserError(f"{name} is given, but no held-out data to evaluate on")
        if self.patience is not None and self.eval_every is None:
            raise UserError(
                "patience counts evaluations, and there is one at the end only", help="give eval_every"
            )
        require_logs(self.logs, histograms=self.histograms)
        for name in ("checkpoint_every", "keep"):
            if getattr(self, name) is not None and self.checkpoint is None:
                raise UserError(f"{name} is given, but no checkpoint to save to")

    @property
    def logs(self) -> tuple[LogTarget, ...]:
        """The logs, however many were given."""
        log: object = self.log
        if isinstance(log, (list, tuple)):
            return tuple(cast("Sequence[LogTarget]", log))
        return (cast("LogTarget", log),)


def fit(session: Trainee, batches: Iterable[Mapping[str, np.ndarray]], options: FitOptions) -> FitResult:
    """Train; `TrainingSession.fit` says how."""
    checkpoint, held_out, skip_limit = options.checkpoint, options.held_out, options.skip_limit
    eval_every, checkpoint_every = options.eval_every, options.checkpoint_every
    depth = options.prefetch
    if depth is None:
        depth = PREFETCH if isinstance(batches, Batches) else 0
    session.require_loss("fit")
    judge = (
        None
        if held_out is None
        else Judge(
            session,
            held_out,
            options.measures,
            scores=options.scores,
            labels=options.labels,
            monitor=options.monitor,
            patience=options.patience,
            best=options.best,
        )
    )
    saver = None if checkpoint is None else _Saver(session, checkpoint, options.keep)
    _note_data(session, batches)
    if checkpoint is not None or options.best is not None:
        session.require_savable()
    supply, total = _supply(session, batches, options.steps, options.epochs)
    if session.schedule is not None:
        horizon = None if total is None else session.position + total
        session.schedule = session.schedule.within(horizon)
    session.reserve(depth)
    result, in_a_row, watch = FitResult(), 0, LossWatch()
    start = time.perf_counter()
    with stop_signals() as stop, session.alone_in(checkpoint):
        with (
            _writer(options.metrics) as write,
            _Bar(total, enabled=options.progress) as bar,
            open_recorder(
                session, options.logs, options.log_every, histograms=options.histograms
            ) as recorder,
            prefetched(supply, depth, session.prepared) as ready,
        ):
            for batch in ready:
                recorder.before_step()
                made = session.step(batch)
                loss = math.nan if made["loss"] is None else made["loss"]
                result.steps += 1
                result.skipped += made["skipped"]
                in_a_row = in_a_row + 1 if made["skipped"] else 0
                result.last_skip = made.get("skip", result.last_skip)
                result.loss = loss
                warning = watch.add(loss)
                if warning is not None:
                    result.diverged_at = session.position
                    _log.warning("%s: %s", warning, ADVICE)
                examples = examples_in(batch)
                result.examples += examples
                recorder.after_step(loss, examples, skipped=made["skipped"])
                measured = None
                last = total is not None and result.steps == total
                if judge is not None and (last or (eval_every and result.steps % eval_every == 0)):
                    measured = _judged(judge, session, recorder, result)
                write(_row(session, made, measured))
                bar.update(loss, result.examples, None if measured is None else measured["loss"])
                if skip_limit is not None and in_a_row >= skip_limit:
                    if saver is not None:
                        saver.save()
                    raise _stopped(in_a_row, made, checkpoint)
                if saver is not None and checkpoint_every and session.position % checkpoint_every == 0:
                    saver.save()
                if stop.signal is not None:
                    break
                if judge is not None and judge.stop:
                    result.stopped_early = True
                    break
            unmeasured = session.position not in result.held_out and result.steps
            if judge is not None and unmeasured and stop.signal is None:
                _judged(judge, session, recorder, result)
        saved = None if saver is None else saver.save()
    if stop.signal is not None:
        raise stopped(stop.signal, session.position, saved)
    if total is not None and result.steps < total and not result.stopped_early:
        _log.warning("the batches ended after %d of %d steps", result.steps, total)
    result.seconds = time.perf_counter() - start
    result.best = session.best if judge is not None else None
    return result


def _judged(judge: Judge, session: Trainee, recorder: Recorder, result: FitResult) -> dict[str, float]:
    """Return what held-out data say now, and keep it."""
    values = judge.measure()
    result.held_out[session.position] = values["loss"]
    result.measured[session.position] = values
    recorder.measured(values)
    return values


class _Saver:
    """Saves a session to a file or into a folder, once at each position.

    Raises UserError when the place cannot take the session's checkpoints.
    """

    def __init__(self, session: Trainee, path: str | Path, keep: int | None) -> None:
        self._session, self._path, self._keep = session, path, keep
        self._folder = is_folder(path)
        if keep is not None and not self._folder:
            raise UserError(f"keep is for a folder of checkpoints, and '{path}' is a file")
        session.require_place(path)
        self._at: int | None = None

    def save(self) -> Path:
        """Save, unless that was done at this position; return the place to go on from."""
        if self._at != self._session.position:
            if self._folder:
                self._session.save(self._path, keep=self._keep)
            else:
                self._session.save(self._path)
            self._at = self._session.position
        return Path(self._path)


def _note_data(session: Trainee, batches: object) -> None:
    """Keep what the batches are made of, and say if a resumed run goes on with others."""
    if not isinstance(batches, Batches):
        return
    found, before = batches.describe(), session.data
    session.data = found
    if before is None:
        return
    # A checkpoint of an earlier version does not say what the examples were.
    names = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    names = [name for name in names if name != "content" or "content" in before]
    changed = [
        "they hold other examples" if name == "content" else f"{name} {before.get(name)} is now {found[name]}"
        for name in names
    ]
    if changed:
        _log.warning(
            "the data are not those of the run so far: %s; it goes on with other batches", ", ".join(changed)
        )


def _stopped(count: int, made: Metrics, checkpoint: str | Path | None) -> UserError:
    """Return the error that stops a run after so many skipped steps in a row; `made` is the last one."""
    causes = made.get("skip", ())
    steps = "the last step was" if count == 1 else f"the last {count} steps were all"
    kept = "" if checkpoint is None else f"; the parameters before them are in '{checkpoint}'"
    return UserError(
        f"{steps} skipped, because something was not finite: {reasons(causes)}",
        help=f"{advice(causes, made['lr'])}{kept}",
    )


def _row(session: Trainee, made: Metrics, measured: Mapping[str, float] | None) -> Row:
    row: Row = {
        "step": made["step"],
        "position": session.position,
        "loss": made["loss"] if made["loss"] is not None and math.isfinite(made["loss"]) else None,
        "skipped": made["skipped"],
        "lr": made["lr"],
        "held_out": None if measured is None else measured["loss"],
    }
    if measured is not None and len(measured) > 1:
        row["held_out_metrics"] = {name: value for name, value in measured.items() if name != "loss"}
    if "skip" in made:
        row["skip"] = [str(cause) for cause in made["skip"][:ROW_CAUSES]]
    return row
