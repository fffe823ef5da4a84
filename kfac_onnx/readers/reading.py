"""Running parts of the canonical pipeline over a model that is being read, and keeping what they said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import UserError, VerifyError
from kfac_onnx.graph.verifier import problems_of
from kfac_onnx.pipeline.log import Log
from kfac_onnx.pipeline.pipeline import Trace, parse_pipeline

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["READING_KEY", "Reading"]

READING_KEY: Final = "kfac.reading"
"""Metadata entry with the passes that were run when the file was read. `kfac.pipeline` has those that came
after: what can be run again on the graph that was read."""


class Reading:
    """One model on its way from an exporter's file to the canonical graph.

    The verifier runs between the passes only where `trace` says so; `finish` runs it once.
    """

    def __init__(self, model: ir.Model, place: str | None, trace: Trace | None, log: Log | None) -> None:
        self.model = model
        self.place = place
        self.trace = trace if trace is not None else Trace()
        self.log = log if log is not None else Log()
        self.log.notes = []
        self.log.stale = True
        model.metadata_props.pop(READING_KEY, None)

    @property
    def notes(self) -> list[str]:
        """Sentences for `kfac.notes`, in order; a reader adds its own."""
        return self.log.notes

    def run(self, text: str) -> None:
        """Run passes over the model.

        Raises UserError of a pass, with the file as its place.
        """
        try:
            parse_pipeline(text).run(
                self.model,
                verify=self.trace.verify,
                print_after_change=self.trace.print_after_change,
                timing=self.trace.timing,
                log=self.log,
                key=READING_KEY,
            )
        except UserError as e:
            e.place, e.context = e.place or self.place, None
            raise

    def finish(self) -> None:
        """Check the graph as it was read.

        Raises VerifyError when it is broken: a pass or a reader is wrong.
        """
        if problems := problems_of(self.model):
            raise VerifyError("the graph is broken when it has been read:\n  " + "\n  ".join(problems[:10]))
