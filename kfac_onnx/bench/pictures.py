"""Results as PNGs: time over vocabulary, memory, floors, profiles, convergence (extra `plot`)."""

from __future__ import annotations

import importlib.util
import itertools
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.bench.arms import ARMS
from kfac_onnx.disk.models import atomic_path
from kfac_onnx.fisher.presets import PRESETS

if TYPE_CHECKING:
    from pathlib import Path

    from kfac_onnx.bench.results import CaseResult, PhaseTime, Profile, Results

__all__ = ["can_draw", "draw"]

_COLORS: Final = {
    "plain-sgd": "#333333",
    **dict(zip(PRESETS, itertools.cycle(("#8c564b", "#d62728", "#ff7f0e", "#e377c2")), strict=False)),
    "plain-adam": "#9467bd",
    "plain-adagrad": "#bcbd22",
    "fbgemm-sgd": "#c49c94",
    "fbgemm-rowwise-adagrad": "#8c6d31",
    "torch-sgd": "#7f7f7f",
    "torch-sparse-adam": "#1f77b4",
    "torch-sparse-adagrad": "#2ca02c",
    "torch-adam": "#17becf",
    "torch-adagrad": "#98df8a",
}
"""Each arm has one colour in all pictures; PyTorch's are dashed."""


def can_draw() -> bool:
    """Return whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures that the results have numbers for; return their files.

    Raises UserError when a file cannot be written.
    """
    made: dict[str, Any] = {"step.png": _steps(results)}
    if any(case.memory for case in results.cases):
        made["memory.png"] = _memory(results)
    if any(case.roofline is not None and case.roofline.added_ms for case in results.cases):
        made["roofline.png"] = _rooflines(results)
    if any(case.profiles for case in results.cases):
        made["profile.png"] = _profiles(results)
    if results.convergence:
        made["movielens.png"] = _convergence(results)
    for name, figure in made.items():
        with atomic_path(folder / name) as place:
            figure.savefig(place)
    return [folder / name for name in made]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _style(arm: str) -> dict[str, Any]:
    torch = not ARMS[arm].ours if arm in ARMS else False
    return {
        "color": _COLORS.get(arm, "black"),
        "linestyle": "--" if torch else "-",
        "marker": "s" if torch else "o",
    }


def _by_name(results: Results) -> dict[str, list[CaseResult]]:
    found: dict[str, list[CaseResult]] = {}
    for case in results.cases:
        found.setdefault(case.name, []).append(case)
    return {name: sorted(items, key=lambda case: case.vocab_size) for name, items in found.items()}


def _legend_below(figure: Any, entries: dict[str, Any]) -> None:
    columns = max(2, min(len(entries), int(figure.get_figwidth() / 2.3)))
    handles = list(entries.values())
    figure.legend(
        handles, list(entries), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _steps(results: Results) -> Any:
    """Time of a step over the vocabulary, one panel a workload; bars where there is one vocabulary."""
    groups = _by_name(results)
    columns = min(2 if len(groups) == 4 else 3, len(groups))
    rows = -(-len(groups) // columns)
    figure = _figure(max(7.5, 1 + 4.6 * columns), 0.9 + 3.7 * rows)
    entries: dict[str, Any] = {}
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, cases) in zip(panels, groups.items(), strict=False):
        if len(cases) > 1:
            _lines(axes, cases, entries)
        else:
            _bars(axes, cases[0])
        axes.set_title(name, fontsize=11)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    if entries:
        _legend_below(figure, entries)
    figure.suptitle("Time of a training step (median; band: 10 % to 90 %)")
    return figure


def _lines(axes: Any, cases: list[CaseResult], entries: dict[str, Any]) -> None:
    for arm in _COLORS:
        found = [(case.vocab_size, timing) for case in cases if (timing := case.timing(arm)) is not None]
        if not found:
            continue
        at = [V for V, _ in found]
        line = axes.plot(at, [timing.ms for _, timing in found], markersize=4, linewidth=1.5, **_style(arm))[
            0
        ]
        low, high = [timing.p10 for _, timing in found], [timing.p90 for _, timing in found]
        axes.fill_between(at, low, high, color=_COLORS[arm], alpha=0.10, linewidth=0)
        entries.setdefault(arm, line)
    axes.set(xscale="log", yscale="log", xlabel="rows of each table, V", ylabel="ms / step")
    _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="major")


def _plain_ticks(axis: Any) -> None:
    """Write 0.5, 1, 2, 5, 10 rather than powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _bars(axes: Any, case: CaseResult) -> None:
    timings = [timing for timing in case.timings if timing.ms is not None][::-1]
    bars = axes.barh(
        [timing.arm for timing in timings],
        [timing.ms for timing in timings],
        color=[_COLORS.get(timing.arm, "black") for timing in timings],
        alpha=0.85,
    )
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set(xlabel=f"ms / step, V = {case.vocab_size:,}")
    lengths = [timing.ms for timing in timings if timing.ms is not None]
    if max(lengths) > 10 * min(lengths):  # on a linear axis all but the slowest would be one pixel
        axes.set_xscale("log")
        axes.set_xlim(min(lengths) / 1.5, max(lengths) * 2.5)
        _plain_ticks(axes.xaxis)
    else:
        axes.margins(x=0.15)
    axes.grid(alpha=0.3, axis="x")


def _memory(results: Results) -> Any:
    """Highest resident memory of each arm beside the size of the tables."""
    cases = [case for case in results.cases if case.memory]
    figure = _figure(2 + 1.9 * max(3, len(cases)), 4.6)
    axes = figure.subplots()
    arms = [arm for arm in _COLORS if any(item.arm == arm for case in cases for item in case.memory)]
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places: list[float] = []
        heights: list[float] = []
        for at, case in enumerate(cases):
            for item in case.memory:
                if item.arm == arm:
                    places.append(at - 0.4 + (number + 0.5) * width)
                    heights.append(max(item.opened, item.stepped, item.saved, item.resumed) / 1e6)
        axes.bar(places, heights, width * 0.9, label=arm, color=_COLORS[arm])
    for at, case in enumerate(cases):
        axes.hlines(
            case.table_bytes / 1e6,
            at - 0.42,
            at + 0.42,
            color="black",
            linewidth=1.5,
            label="tables" if at == 0 else None,
        )
    axes.set(ylabel="MB", yscale="log", title="Highest resident memory: open, steps, save, resume")
    axes.set_xticks(range(len(cases)), [f"{case.name}\nV={case.vocab_size:,}" for case in cases], fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    _legend_below(figure, dict(zip(labels, handles, strict=True)))
    return figure


def _rooflines(results: Results) -> Any:
    """Stacked floor of the added work beside the time that it takes."""
    cases = [case for case in results.cases if case.roofline is not None and case.roofline.added_ms]
    figure = _figure(3 + 1.5 * max(3, len(cases)), 4.6)
    axes = figure.subplots()
    for at, case in enumerate(cases):
        floor, bottom = case.roofline, 0.0
        if floor is None or floor.added_ms is None:
            continue
        for number, (part, ms) in enumerate(floor.parts.items()):
            axes.bar(at - 0.2, ms, 0.36, bottom=bottom, color=f"C{number}", label=part if at == 0 else None)
            bottom += ms
        axes.bar(
            at + 0.2,
            floor.added_ms,
            0.36,
            color="#cccccc",
            label="measured: half less plain-sgd" if at == 0 else None,
        )
        if floor.share is not None:
            axes.text(at + 0.2, floor.added_ms, f"{floor.share:.0%}", ha="center", va="bottom", fontsize=9)
    axes.set(ylabel="ms / step", title="What half adds to a step: floor of this machine, and measured")
    axes.set_xticks(range(len(cases)), [f"{case.name}\nV={case.vocab_size:,}" for case in cases], fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    _legend_below(figure, dict(zip(labels, handles, strict=True)))
    return figure


def _profiles(results: Results) -> Any:
    """Draw a panel for each workload: a bar for each profiled arm, its phases cut into operators."""
    from matplotlib import colormaps

    groups = {name: [case for case in found if case.profiles] for name, found in _by_name(results).items()}
    groups = {name: found for name, found in groups.items() if found}
    total: dict[str, float] = {}
    for case in results.cases:
        for item in case.profiles:
            for found in item.operators:
                total[found.operator] = total.get(found.operator, 0.0) + found.ms / item.step_ms
    palette: Any = colormaps["tab20"]
    shown = sorted(total, key=lambda name: -total[name])[:11]
    colors: dict[str, Any] = {name: palette(number) for number, name in enumerate(shown)}
    colors |= {"other operators": "#bbbbbb", "between operators": "#ededed"}
    heights = [sum(len(case.profiles) for case in found) + 1 for found in groups.values()]
    figure = _figure(12, 1.6 + 0.55 * sum(heights))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights).flatten()
    entries: dict[str, Any] = {}
    for axes, (name, cases) in zip(panels, groups.items(), strict=True):
        _profile_panel(axes, cases, colors, entries)
        axes.set_title(name, fontsize=11, loc="left")
    panels[-1].set_xlabel("ms / step")
    figure.suptitle("Where a step goes: phases (between black lines) and operators")
    _legend_below(figure, {name: entries[name] for name in (*colors, "host") if name in entries})
    return figure


def _profile_panel(
    axes: Any, cases: list[CaseResult], colors: dict[str, Any], entries: dict[str, Any]
) -> None:
    rows = [(case, item) for case in cases for item in case.profiles]
    # Dense optimizers take many times as long: their bars are cut off, and say how long they are.
    sparse = [item.step_ms for _, item in rows if not ARMS[item.arm].dense]
    edge = 1.12 * max(sparse or [item.step_ms for _, item in rows])
    for at, (_, item) in enumerate(rows):
        left = 0.0
        for phase in item.phases:
            start = left
            for name, ms in _cut(item, phase, colors).items():
                entries.setdefault(name, axes.barh(at, ms, 0.6, left=left, color=colors[name]))
                left += ms
            axes.plot([left, left], [at - 0.36, at + 0.36], color="black", linewidth=0.9)
            if phase.ms > 0.075 * edge and left <= edge:
                axes.text((start + left) / 2, at - 0.34, phase.phase, ha="center", va="bottom", fontsize=7)
        hatched = {"color": "white", "edgecolor": "#777777", "hatch": "////", "linewidth": 0.5}
        entries.setdefault("host", axes.barh(at, item.host_ms, 0.6, left=left, **hatched))
        if item.step_ms > edge:
            text = f"{item.step_ms:.3g} ms →"
            boxed = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            axes.text(0.99 * edge, at, text, ha="right", va="center", fontsize=9, weight="bold", bbox=boxed)
    axes.set(xlim=(0, edge), ylim=(len(rows) - 0.5, -0.8))
    labels = [f"{item.arm}, V={case.vocab_size:,}" for case, item in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def _cut(item: Profile, phase: PhaseTime, shown: dict[str, Any]) -> dict[str, float]:
    """Return a phase's milliseconds by operator.

    A profiler slows a phase down, so its operators are drawn within the time that it takes without one.
    """
    scale = min(1.0, phase.ms / phase.kernels_ms) if phase.kernels_ms else 0.0
    inside = {each.operator: each.ms * scale for each in item.operators if each.phase == phase.phase}
    cut = {name: inside[name] for name in shown if name in inside}
    cut["other operators"] = sum(ms for name, ms in inside.items() if name not in shown)
    cut["between operators"] = max(0.0, phase.ms - sum(cut.values()))
    return cut


def _convergence(results: Results) -> Any:
    """Held-out RMSE over steps and over seconds."""
    figure = _figure(11, 4.6)
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    entries: dict[str, Any] = {}
    for item in results.convergence:
        style = {**_style(item.arm), "marker": None, "linewidth": 1.5}
        label = f"{item.arm}, lr {item.lr:g}"
        entries[label] = by_steps.plot(item.at, item.rmse, **style)[0]
        each = item.seconds / max((1, *item.at))
        by_time.plot([step * each for step in item.at], item.rmse, **style)
    lowest = min(item.best for item in results.convergence)
    for axes in (by_steps, by_time):
        axes.axhline(results.level, color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    by_steps.set(xlabel="step", ylabel="held-out RMSE", ylim=(lowest - 0.005, lowest + 0.1))
    by_time.set(xlabel="seconds of training", xscale="log")
    _plain_ticks(by_time.xaxis)
    figure.suptitle("MovieLens-100k, rating prediction with biases")
    _legend_below(figure, entries)
    return figure
