"""Progress in a notebook: one output that is drawn anew a few times a second, with the curve of the loss."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.markup import Html, element

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["NotebookBar", "in_notebook"]

_PAUSE: Final = 0.3
"""Seconds between two drawings."""
_POINTS: Final = 160
_WIDTH: Final = 360
_HEIGHT: Final = 56


def in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, which shows HTML."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


class NotebookBar:
    """A bar, the running loss, examples per second and the curve; it stays as it is when the run ends."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._steps = 0
        self._losses: list[float] = []
        self._stride = 1
        self._facts = ""
        self._start = time.perf_counter()
        self._last = -math.inf
        self._display: Any = None

    def __enter__(self) -> NotebookBar:
        import importlib

        show = importlib.import_module("IPython.display")
        self._display = show.display(show.HTML(self.html()), display_id=True)
        self._page = show.HTML
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()

    def update(self, running: float, examples: int, held_out: float | None) -> None:
        """Take in a step: the running loss, all examples so far, the held-out loss if it was measured."""
        self._steps += 1
        if math.isfinite(running) and self._steps % self._stride == 0:
            self._losses.append(running)
            if len(self._losses) >= 2 * _POINTS:
                self._losses, self._stride = self._losses[1::2], 2 * self._stride
        now = time.perf_counter()
        held = "" if held_out is None else f", held out {held_out:.4f}"
        self._facts = f"loss {running:.4f}{held}, {examples / max(1e-9, now - self._start):,.0f} examples/s"
        if now - self._last >= _PAUSE:
            self._last = now
            self._draw()

    def _draw(self) -> None:
        self._display.update(self._page(self.html()))

    def html(self) -> Html:
        """Return what is shown."""
        bar = element("progress", value=self._steps, max=self._total, style="width:240px")
        of = "" if self._total is None else f" of {self._total:,}"
        line = element("div", bar if self._total else "", f" {self._steps:,}{of} steps, {self._facts}")
        return element("div", line, *self._curve())

    def _curve(self) -> list[Html]:
        if len(self._losses) < 2:
            return []
        low, high = min(self._losses), max(self._losses)
        height = (high - low) or 1.0
        points = " ".join(
            f"{_WIDTH * i / (len(self._losses) - 1):.1f},{2 + (_HEIGHT - 4) * (high - loss) / height:.1f}"
            for i, loss in enumerate(self._losses)
        )
        line = element("polyline", points=points, fill="none", stroke="#2456d6", stroke_width="2")
        return [element("svg", line, width=_WIDTH, height=_HEIGHT)]
