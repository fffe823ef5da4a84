"""The numbers of a run on their way to its logs, made at the logging interval only.

Of each table, between two parameters W and W' before and after a step that is logged:

    update_norm = |W' - W| (Frobenius)      rows_touched = rows in which W' and W differ
    condition   = that of its damped output factor (see `runtime.health`)

That copies the tables before such a step and compares them afterwards; no other step pays for it.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.logs.places import CallbackLog, log_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from kfac_onnx.runtime.health import RootHealth
    from kfac_onnx.runtime.logs.protocol import Log

    LogTarget = str | Callable[[Mapping[str, float], int], object] | Log

__all__ = ["LOG_EVERY", "Recorder", "open_recorder", "require_logs"]

LOG_EVERY: Final = 50
"""Steps from one log to the next."""
ROWS: Final = 1 << 16
"""Rows of a table that are compared at once."""


class Logged(Protocol):
    """What a recorder reads of a session."""

    @property
    def position(self) -> int: ...
    @property
    def parameters(self) -> Mapping[str, np.ndarray]: ...
    @property
    def tables(self) -> tuple[str, ...]: ...
    @property
    def settings(self) -> str | None: ...
    def health(self) -> tuple[RootHealth, ...]: ...
    def rates(self) -> Mapping[str, float]: ...


def require_logs(targets: Sequence[LogTarget], *, histograms: bool) -> None:
    """Raise UserError for a log that there is not, and for histograms that none of them takes."""
    kinds = [log_of(target)[0] for target in targets if isinstance(target, str)]
    own = [target for target in targets if hasattr(target, "histogram")]
    if histograms and not own and not any(kind.histograms for kind in kinds):
        raise UserError(
            "histograms are wanted, and no log takes them", help="add --log tensorboard:DIR, or --log wandb"
        )


@contextlib.contextmanager
def open_recorder(
    session: Logged, targets: Sequence[LogTarget], every: int, *, histograms: bool
) -> Generator[Recorder]:
    """Yield what takes the numbers of each step, and close the logs at the end.

    Raises UserError where a log cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        logs: list[tuple[Log, bool]] = []
        for target in targets:
            if isinstance(target, str):
                kind, argument = log_of(target)
                log: Log = kind.open(argument)
                logs.append((log, kind.histograms))
            elif hasattr(target, "scalars"):
                log = target  # pyright: ignore[reportAssignmentType]  it has what a log has
                logs.append((log, True))
            else:
                log = CallbackLog(target)  # pyright: ignore[reportArgumentType]  it is no log
                logs.append((log, False))
            stack.callback(log.close)
            if session.settings is not None:
                log.settings(session.settings)
        yield Recorder(session, logs, every, histograms=histograms)


class Recorder:
    """Takes losses and examples of every step, and writes at every so many steps of the run."""

    def __init__(
        self, session: Logged, logs: Sequence[tuple[Log, bool]], every: int, *, histograms: bool
    ) -> None:
        self._session, self._logs, self._every, self._histograms = session, logs, every, histograms
        self._before: dict[str, np.ndarray] = {}
        self._losses: list[float] = []
        self._steps = self._examples = self._skipped = 0
        self._start = time.perf_counter()
        self._pause = 0.0

    def _due(self, position: int) -> bool:
        return bool(self._logs) and position % self._every == 0

    def before_step(self) -> None:
        """Copy the tables if the step that comes is logged."""
        if self._due(self._session.position + 1):
            with self._paused():
                self._before = {name: self._session.parameters[name] for name in self._session.tables}

    def after_step(self, loss: float, examples: int, *, skipped: bool) -> None:
        """Take a step, and write if it is due; `loss` is NaN where there is none."""
        if not self._logs:
            return
        if math.isfinite(loss):
            self._losses.append(loss)
        self._steps += 1
        self._examples += examples
        self._skipped += skipped
        if self._due(self._session.position):
            self._write()

    def measured(self, values: Mapping[str, float]) -> None:
        """Write metrics of held-out data."""
        if self._logs:
            self._send({f"held_out/{name}": value for name, value in values.items()})

    @contextlib.contextmanager
    def _paused(self) -> Generator[None]:
        """Leave the time of logging out of that of the steps."""
        start = time.perf_counter()
        yield
        self._pause += time.perf_counter() - start

    def _write(self) -> None:
        seconds = max(1e-9, time.perf_counter() - self._start - self._pause)
        values = {
            "ms_per_step": 1e3 * seconds / self._steps,
            "examples_per_second": self._examples / seconds,
            "skipped_steps": float(self._skipped),
        }
        if self._losses:
            values["loss"] = float(np.mean(self._losses))
        values |= {f"rate/{name}": rate for name, rate in self._session.rates().items()}
        for name, old in self._before.items():
            values |= self._changes(name, old)
        self._before = {}
        for root in self._session.health():
            values[f"table/{root.parameter}/condition"] = root.condition
        self._send(values)
        self._losses, self._steps, self._examples = [], 0, 0
        self._start, self._pause = time.perf_counter(), 0.0

    def _changes(self, name: str, old: np.ndarray) -> dict[str, float]:
        new = self._session.parameters[name]
        square, touched = 0.0, 0
        for start in range(0, len(new), ROWS):
            part = slice(start, start + ROWS)
            difference = new[part].astype(np.float64) - old[part].astype(np.float64)
            square += float(np.square(difference).sum())
            touched += int(np.count_nonzero(difference.reshape(len(difference), -1).any(axis=1)))
        if self._histograms:
            finite = new[np.isfinite(new)].astype(np.float64)
            for log, takes in self._logs:
                if takes and finite.size:
                    log.histogram(f"table/{name}/values", finite, self._session.position)
        return {f"table/{name}/update_norm": math.sqrt(square), f"table/{name}/rows_touched": float(touched)}

    def _send(self, values: Mapping[str, float]) -> None:
        for log, _ in self._logs:
            log.scalars(values, self._session.position)
