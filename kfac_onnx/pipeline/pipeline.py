"""Pipelines of passes: from text, to text, and run over a model with the verifier in between."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kfac_onnx.errors import UserError, VerifyError, did_you_mean
from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.context import Context
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.log import Log
from kfac_onnx.pipeline.options import options_of, read_value
from kfac_onnx.pipeline.registry import pass_class
from kfac_onnx.pipeline.text import Call, read_calls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

__all__ = ["PIPELINE_KEY", "PassReport", "Pipeline", "Report", "Trace", "parse_pipeline"]

PIPELINE_KEY = "kfac.pipeline"
"""Metadata entry with the passes that made a training step: what can be run again on what was read."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What is checked and shown between the passes of a pipeline.

    `verify` checks the model after each pass, `print_after_change` logs its text after each pass that changed
    it, `timing` logs each pass's seconds and counts.
    """

    verify: bool = False
    print_after_change: bool = False
    timing: bool = False


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its text, its changes, its wall time in seconds, and what it counted."""

    text: str
    changes: Changes
    seconds: float
    statistics: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Report:
    """What a pipeline did, pass by pass."""

    passes: tuple[PassReport, ...]

    @property
    def changes(self) -> Changes:
        """All passes' changes together."""
        return sum((item.changes for item in self.passes), NO_CHANGES)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {
            "passes": [
                {
                    "pass": item.text,
                    "added": item.changes.added,
                    "removed": item.changes.removed,
                    "edited": item.changes.edited,
                    "seconds": item.seconds,
                    "statistics": dict(item.statistics),
                }
                for item in self.passes
            ]
        }


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str(pipeline)` is its text, and `parse_pipeline` of that is the pipeline again."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(str(item) for item in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def run(
        self,
        model: ir.Model,
        *,
        verify: bool = True,
        print_after_change: bool = False,
        timing: bool = False,
        log: Log | None = None,
        key: str | None = PIPELINE_KEY,
        sound: bool = False,
    ) -> Report:
        """Run the passes over `model`, in place, and record the pipeline's text in its metadata.

        With `verify` the model is checked before the first pass (unless it is `sound`: a reader has just
        checked it) and after each. `print_after_change` logs the model's text after each pass that changed
        it, `timing` each pass's seconds and counts; both through `log` at level info (else the seconds at
        level debug). The text is appended to the metadata entry `key`; with None it is not recorded.

        Raises VerifyError, naming the pass, when a pass leaves a broken model; UserError of a pass
        gets the line `in: find-embeddings, pass 1 of 3`.
        """
        log = log if log is not None else Log()
        reports: list[PassReport] = []
        if verify and not sound:
            _verify(model, "before the first pass")
        for number, item in enumerate(self.passes, start=1):
            where = f"{item.name}, pass {number} of {len(self.passes)}"
            log.statistics.clear()
            if not verify or (sound and number == 1):  # otherwise the verifier has told the names
                Context.of(model).invalidate()
            start = time.perf_counter()
            try:
                changes = item.run(model, log)
            except UserError as e:
                e.context = e.context or where
                raise
            seconds = time.perf_counter() - start
            reports.append(PassReport(str(item), changes, seconds, dict(log.statistics)))
            (log.info if timing else log.debug)(_timing_line(reports[-1]))
            if print_after_change and changes:
                from kfac_onnx.graph.printer import model_text

                log.info(f"after {where}:\n{model_text(model)}")
            if verify:
                _verify(model, f"after {where}")
            log.stale = not item.tells_shapes and (log.stale or bool(changes))
        Context.of(model).invalidate()  # what follows may edit without an emitter, as passes may
        if self.passes and key is not None:
            before = model.metadata_props.get(key)
            model.metadata_props[key] = f"{before},{self}" if before else str(self)
        return Report(tuple(reports))


def _timing_line(report: PassReport) -> str:
    changes = report.changes
    counts = "".join(f", {number} {what}" for what, number in report.statistics.items())
    return (
        f"{report.seconds * 1000:9.1f} ms  {report.text}: "
        f"+{changes.added} -{changes.removed} ~{changes.edited}{counts}"
    )


def _verify(model: ir.Model, where: str) -> None:
    from kfac_onnx.graph.verifier import problems_of

    taken: set[str] = set()
    problems = problems_of(model, taken=taken)
    Context.of(model).names_are(taken)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:10])
        raise VerifyError(f"the model is broken {where}:{listed}{more}")


@checked
def parse_pipeline(text: str) -> Pipeline:
    """Return the pipeline that `text` describes, such as `find-embeddings,lower{target=cpu}`.

    Raises UserError for a text of another form, an unknown pass or option, or a value out of range.
    """
    return Pipeline(tuple(_make(call) for call in read_calls(text)))


def _make(call: Call) -> Pass:
    cls = pass_class(call.name)
    options = {option.name: option for option in options_of(cls)}
    arguments: dict[str, Any] = {}
    for name, value in call.options:
        option = options.get(name.replace("_", "-"))
        if option is None:
            known = ", ".join(options) if options else "none"
            raise UserError(
                f"unknown option '{name}' of pass '{call.name}'{did_you_mean(name, options)}",
                help=f"the options of '{call.name}' are: {known}",
            )
        if option.field in arguments:
            raise UserError(f"option '{option.name}' of pass '{call.name}' is given twice")
        arguments[option.field] = read_value(option, value, owner=call.name)
    return cls(**arguments)
