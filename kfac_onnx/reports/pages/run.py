"""The report of a run: curves, rates, settings, health of the factors, environment.

A `RunRecord` takes a row of metrics per step, and stays small: of a long run it keeps means of neighbouring
steps. Now and then it looks at the condition of the factors, for at most `_SHARE` of the run's time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from kfac_onnx.errors import UserError
from kfac_onnx.markup import Html, element, quantity, rows_table
from kfac_onnx.reports.pages.curves import NARROW, Curve, chart
from kfac_onnx.reports.pages.page import page
from kfac_onnx.version import environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.runtime.fitting import Row
    from kfac_onnx.runtime.health import RootHealth

__all__ = ["Point", "RunRecord", "run_page"]

_MOST_POINTS: Final = 2048
"""Points of a curve from which neighbours are put together."""
_MOST_CURVES: Final = 6
"""Tables in one picture; the list below it has all."""
_SHARE: Final = 0.02
"""Part of the time of a run that may go into looking at its factors."""
_SMOOTHING: Final = 0.05
"""Weight of a point in the running mean of the loss; less in runs of few steps."""
_ILL: Final = 1e6
"""Condition of a float32 factor's damped matrix from which its inverse root has few correct digits."""


class _Session(Protocol):
    learning_rates: dict[str, float]
    committed: int
    skipped: int
    position: int

    @property
    def pipeline(self) -> str | None: ...
    @property
    def host_roots(self) -> int: ...
    def health(self) -> tuple[RootHealth, ...]: ...


@dataclass
class Point:
    """Means over `steps` neighbouring steps that end at `position`; no loss where none was finite."""

    position: float
    loss: float | None
    lr: float
    seconds: float
    steps: int = 1

    def joined(self, later: Point) -> Point:
        """Return the point of both."""
        steps = self.steps + later.steps
        losses = [(p.loss, p.steps) for p in (self, later) if p.loss is not None]
        loss = sum(loss * n for loss, n in losses) / sum(n for _, n in losses) if losses else None
        seconds = (self.seconds * self.steps + later.seconds * later.steps) / steps
        return Point(
            later.position, loss, (self.lr * self.steps + later.lr * later.steps) / steps, seconds, steps
        )


@dataclass
class RunRecord:
    """What a report says of a run; call it with each row of metrics.

    Args:
        session: the session that runs.
        title: what the report is called.
        settings: what was chosen, by option.

    """

    session: _Session
    title: str
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    points: list[Point] = field(default_factory=list[Point])
    held_out: list[tuple[float, float | None]] = field(default_factory=list[tuple[float, "float | None"]])
    skipped: list[tuple[int, tuple[str, ...]]] = field(default_factory=list[tuple[int, tuple[str, ...]]])
    conditions: dict[str, list[tuple[float, float | None]]] = field(
        default_factory=dict[str, list[tuple[float, "float | None"]]]
    )
    steps: int = 0
    outcome: str = "complete"
    group: int = 1
    """So many steps are put together in each point."""
    _last: float = field(default_factory=lambda: time.perf_counter())
    _begin: float = field(default_factory=lambda: time.perf_counter())
    _looking: float = 0.0

    def __call__(self, row: Row) -> None:
        """Take in the metrics of one step."""
        now = time.perf_counter()
        self.steps += 1
        point = Point(row["position"], row["loss"], row["lr"], now - self._last)
        if self.points and self.points[-1].steps < self.group:
            self.points[-1] = self.points[-1].joined(point)
        else:
            self.points.append(point)
        if len(self.points) > _MOST_POINTS:
            pairs = range(0, len(self.points) - 1, 2)
            rest = self.points[len(self.points) - len(self.points) % 2 :]
            self.points = [self.points[i].joined(self.points[i + 1]) for i in pairs] + rest
            self.group *= 2
        if row["held_out"] is not None:
            self.held_out.append((row["position"], row["held_out"]))
        if row["skipped"]:
            self.skipped.append((row["position"], tuple(row.get("skip", ()))))
        if self._looking <= _SHARE * (now - self._begin):
            self.look()
        self._last = time.perf_counter()

    def look(self) -> tuple[RootHealth, ...]:
        """Note the condition of the factors as they are now, and return their health."""
        begin = time.perf_counter()
        health = self.session.health()
        self._looking += time.perf_counter() - begin
        for root in health:
            finite = root.condition if math.isfinite(root.condition) else None
            self.conditions.setdefault(root.parameter, []).append((self.session.position, finite))
        return health

    @property
    def seconds(self) -> float:
        """How long the steps took, evaluation among them."""
        return sum(point.seconds * point.steps for point in self.points)


def run_page(record: RunRecord) -> str:
    """Return the report as a page; nothing in it moves, so that it can be printed and mailed."""
    try:
        health = record.look()
    except UserError:  # what stopped the run left the session without numbers that mean something
        health = ()
    body = element(
        "div",
        element("h1", record.title),
        element("p", f"kfac-onnx train, {record.outcome}", class_="faint"),
        _tiles(record),
        *_curves(record),
        element("h2", "Health of the factors"),
        _health(health),
        *_skips(record),
        element("h2", "Settings"),
        element("div", _facts(record.settings), class_="sheet"),
        *([element("div", record.session.pipeline, class_="sheet text")] if record.session.pipeline else []),
        element("h2", "Environment"),
        element("div", _facts({name: word for name, word in environment().items() if word}), class_="sheet"),
        class_="run",
    )
    return page(f"{record.title} · kfac-onnx train", body)


def _tiles(record: RunRecord) -> Html:
    last = next((point.loss for point in reversed(record.points) if point.loss is not None), None)
    best = min((loss for _, loss in record.held_out if loss is not None), default=None)
    tiles = [
        ("steps", f"{record.steps:,}"),
        ("skipped", f"{len(record.skipped):,}"),
        ("last loss", "—" if last is None else f"{last:.4f}"),
        ("best held-out loss", "—" if best is None else f"{best:.4f}"),
        ("ms per step", "—" if not record.steps else f"{1e3 * record.seconds / record.steps:.3g}"),
        ("time", _duration(record.seconds)),
        ("roots by the host", f"{record.session.host_roots:,}"),
    ]
    return element(
        "div",
        *(element("div", element("b", value), element("span", name), class_="tile") for name, value in tiles),
        class_="tiles",
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _curves(record: RunRecord) -> list[Html]:
    losses = [(point.position, point.loss) for point in record.points]
    loss = [Curve("each step" if record.group == 1 else f"means of {record.group}", losses, faint=True)]
    loss.append(Curve("running mean", _smooth(losses)))
    if record.held_out:
        loss.append(Curve("held out", record.held_out, dots=True))
    rates = [Curve("tables", [(point.position, point.lr) for point in record.points])]
    times = [Curve("step", [(point.position, 1e3 * point.seconds) for point in record.points])]
    names = list(record.conditions)[:_MOST_CURVES]
    condition = [Curve(name, record.conditions[name], dots=True) for name in names]
    marks = [position for position, _ in record.skipped]

    def sheet(picture: Html) -> Html:
        return element("div", picture, class_="sheet")

    return [
        element("h2", "Curves"),
        sheet(chart("loss", loss, marks=marks)),
        element(
            "div",
            sheet(chart("learning rate of the tables", rates, width=NARROW, logarithmic=False)),
            sheet(chart("milliseconds per step, evaluation in it", times, width=NARROW)),
            *(
                [sheet(chart("condition of the output factors", condition, width=NARROW))]
                if condition
                else []
            ),
            class_="pair",
        ),
    ]


def _smooth(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return the running mean of the points, a gap where there is none."""
    weight = max(_SMOOTHING, 4.0 / (4.0 + len(points)))
    mean: float | None = None
    smooth: list[tuple[float, float | None]] = []
    for x, y in points:
        if y is not None:
            mean = y if mean is None else mean + weight * (y - mean)
        smooth.append((x, None if y is None else mean))
    return smooth


def _health(health: Sequence[RootHealth]) -> Html:
    if not health:
        return element("p", "the model has no factors with roots", class_="faint")

    def verdict(root: RootHealth) -> Html:
        if not root.finite:
            return element("span", "not finite", class_="tag error")
        if not root.condition < _ILL:
            return element("span", "ill-conditioned: more damping", class_="tag warning")
        return element("span", "well", class_="tag added")

    numbers = (
        "condition ",
        "smallest ",
        "largest ",
        "damping ",
        "root off by ",
        "refreshes ",
        "by the host ",
    )
    rows = [
        (root.parameter, verdict(root), *(f"{x:.3g}" for x in (
            root.condition, root.smallest, root.largest, root.damping, root.drift
        )), root.refreshes, root.fallbacks)
        for root in health
    ]  # fmt: skip
    return element("div", rows_table(["table", "", *numbers], rows), class_="sheet")


def _skips(record: RunRecord) -> list[Html]:
    if not record.skipped:
        return []
    rows = [(position, "; ".join(causes)) for position, causes in record.skipped[:20]]
    more = len(record.skipped) - len(rows)
    note = [element("p", f"and {more:,} more", class_="faint")] if more else []
    return [
        element("h2", "Skipped steps"),
        element("div", rows_table(["batch", "what was not finite"], rows), *note, class_="sheet"),
    ]


def _facts(facts: Mapping[str, object]) -> Html:
    def text(value: object) -> object:
        return quantity(value) if isinstance(value, float) and abs(value) >= 1e4 else value

    lines = (element("tr", element("th", name), element("td", text(value))) for name, value in facts.items())
    return element("table", *lines, class_="facts")
