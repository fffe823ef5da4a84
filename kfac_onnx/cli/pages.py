"""`--html` and `--report`: where a page is written, asked before the work and done after it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["require_page_place", "save_page"]

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
