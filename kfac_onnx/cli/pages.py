"""`--html` and `--report`: the place of a page is looked at before the work, the page written after it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path

    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.fitting import Row

    Metrics = Callable[[Row], None] | str | Path | None

__all__ = ["reported", "require_page_place", "save_page"]

_log = logging.getLogger(__name__)


def require_page_place(html: str | None, *inputs: str | Path) -> None:
    """Raise UserError for a place that a page cannot be written to, or that is an input."""
    if html is None:
        return
    from kfac_onnx.disk.models import refuse_overwrite, require_writable

    refuse_overwrite(html, *inputs)
    require_writable(html)


def save_page(html: str, text: str) -> None:
    """Write a page and say where it is."""
    from kfac_onnx.reports.pages.page import write_page

    write_page(html, text)
    _log.info("wrote %s, a page for any browser", html)


@contextlib.contextmanager
def reported(
    report: str | None, session: TrainingSession, title: str, settings: Mapping[str, object], metrics: Metrics
) -> Generator[Metrics]:
    """Yield the metrics of a run that is reported; its page is written however the run ends.

    Args:
        report: the page to write; without one the metrics are those given.
        session: the session that runs.
        title: what the page is called.
        settings: what was chosen, by option.
        metrics: where rows go besides.

    """
    if report is None:
        yield metrics
        return
    from kfac_onnx.disk.json_lines import json_lines
    from kfac_onnx.reports.pages.run import RunRecord, run_page

    record = RunRecord(session, title, settings)
    with contextlib.ExitStack() as stack:
        write = metrics if callable(metrics) else None
        if metrics is not None and not callable(metrics):
            write = stack.enter_context(json_lines(metrics, "metrics"))

        def take(row: Row) -> None:
            if write is not None:
                write(row)
            record(row)

        try:
            yield take
        except BaseException as e:
            record.outcome = f"stopped: {str(e).partition(chr(10))[0] or type(e).__name__}"
            raise
        finally:
            if record.steps:
                save_page(report, run_page(record))
