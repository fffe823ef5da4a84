"""Results as tables: for the terminal, and as Markdown for a README."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.bench.targets import targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kfac_onnx.bench.results import CaseResult, Results

__all__ = ["Sheet", "markdown", "sheets"]


class Sheet:
    """A table: title, columns (a blank at the end aligns to the right), rows of cells, and a line below."""

    def __init__(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
    ) -> None:
        self.title = title
        self.columns = tuple(columns)
        self.rows = tuple(tuple(row) for row in rows)
        self.note = note

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(column.rstrip() for column in self.columns) + " |")
        lines.append(
            "|" + "|".join("---:" if column.endswith(" ") else "---" for column in self.columns) + "|"
        )
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def sheets(results: Results) -> Iterator[Sheet]:
    """Yield the tables of a run."""
    yield _steps(results)
    if any(case.roofline is not None for case in results.cases):
        yield _rooflines(results)
    for case in results.cases:
        if case.profiles:
            yield _profiles(case)
    if results.convergence:
        yield _convergence(results)
    aims = targets(results)
    if aims:
        yield Sheet(
            "Aims",
            ("aim", "is ", "limit ", "met"),
            [
                (
                    aim.aim,
                    _number(aim.value),
                    ("≥ " if aim.at_least else "≤ ") + _number(aim.limit),
                    "yes" if aim.met else "no",
                )
                for aim in aims
            ],
        )


def markdown(results: Results) -> str:
    """Return everything as a page in Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    head = ["# Results", "", "```", results.settings.command(), "```", "", f"On: {machine}.", ""]
    return "\n".join([*head, *(sheet.markdown() for sheet in sheets(results))])


def _steps(results: Results) -> Sheet:
    rows: list[list[str]] = []
    for case in results.cases:
        peaks = {item.arm: item for item in case.memory}
        for timing in case.timings:
            row = [case.name, f"{case.vocab_size:,}", timing.arm]
            if timing.ms is None or timing.p10 is None or timing.p90 is None:
                row += ["—", timing.skipped or "", "", "", "", "", ""]
            else:
                row += [
                    _number(timing.ms),
                    f"{_number(timing.p10)} – {_number(timing.p90)}",
                    _number(timing.ratio_sgd),
                    _number(timing.ratio_torch),
                    _number(timing.ratio_fbgemm),
                    "" if timing.state_bytes is None else _bytes(timing.state_bytes),
                    "",
                ]
            if timing.arm in peaks:
                peak = peaks[timing.arm]
                row[-1] = _bytes(max(peak.opened, peak.stepped, peak.saved, peak.resumed))
            rows.append(row)
    return Sheet(
        "A step",
        (
            "workload",
            "V ",
            "tables by",
            "ms ",
            "p10 – p90 ",
            "/ SGD ",
            "/ torch SGD ",
            "/ FBGEMM ",
            "state ",
            "peak memory ",
        ),
        rows,
        "ms: median; / SGD: to plain-sgd of the same minutes; / FBGEMM: to its row-wise Adagrad; "
        "state: kept for the tables beside them; "
        "peak memory: resident, of a process that opens, steps, saves and resumes.",
    )


def _rooflines(results: Results) -> Sheet:
    rows: list[tuple[str, ...]] = []
    parts: tuple[str, ...] = ()
    for case in results.cases:
        if case.roofline is not None:
            parts = tuple(case.roofline.parts)
            rows.append(
                (
                    case.name,
                    f"{case.vocab_size:,}",
                    *(_number(ms) for ms in case.roofline.parts.values()),
                    _number(case.roofline.floor_ms),
                    _number(case.roofline.added_ms),
                    "" if case.roofline.share is None else f"{case.roofline.share:.0%}",
                )
            )
    return Sheet(
        "What half adds, and the least it could take (ms)",
        ("workload", "V ", *(f"{part} " for part in parts), "floor ", "added ", "share "),
        rows,
        "floor: each piece of work once, at the rates that this machine reaches; added: half less plain-sgd.",
    )


def _profiles(case: CaseResult) -> Sheet:
    rows: list[tuple[str, ...]] = []
    for item in case.profiles:
        for phase in item.phases:
            rows.append(
                (item.arm, phase.phase, "all", _number(phase.ms), "", _number(phase.ms / item.step_ms))
            )
            rows += [
                (
                    item.arm,
                    phase.phase,
                    operator.operator,
                    _number(operator.ms),
                    str(operator.nodes),
                    _number(operator.ms / item.step_ms),
                )
                for operator in item.operators
                if operator.phase == phase.phase and operator.ms >= 0.005 * item.step_ms
            ]
        rows.append(
            (item.arm, "host", "all", _number(item.host_ms), "", _number(item.host_ms / item.step_ms))
        )
        rows.append((item.arm, "step", "all", _number(item.step_ms), "", "1"))
    return Sheet(
        f"Where a step goes: {case.name}, V={case.vocab_size:,}",
        ("tables by", "phase", "operator", "ms ", "nodes ", "of the step "),
        rows,
        "Medians of runs; a phase that each tenth step runs counts a tenth. Phases are timed without a "
        "profiler and operators with it, so operators may add up to more than their phase.",
    )


def _convergence(results: Results) -> Sheet:
    return Sheet(
        f"MovieLens-100k to a held-out RMSE of {results.level:g}",
        ("tables by", "lr ", "best RMSE ", "steps ", "seconds "),
        [
            (
                item.arm,
                f"{item.lr:g}",
                f"{item.best:.4f}",
                "not reached" if item.steps_to_level is None else f"{item.steps_to_level:.0f}",
                _number(item.seconds_to_level),
            )
            for item in results.convergence
        ],
        "Each at the best of its learning rates; seconds of training alone.",
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _bytes(count: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
