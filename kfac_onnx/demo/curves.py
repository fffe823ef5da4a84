"""Curves of held-out loss over steps: when one reaches a level, and how they look.

A level is reached at the first evaluation at or below it; between that evaluation and the one before, the
loss is taken to be linear in the step.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.disk.models import atomic_path, require_writable
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Curve", "check_plot", "draw_png", "draw_text"]


_COLORS: Final = ("blue", "orange", "green", "red", "magenta")


@dataclass(frozen=True)
class Curve:
    """Held-out loss in nats at some steps, in the order of the steps."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        """The lowest held-out loss."""
        return min(self.losses)

    def first_below(self, level: float) -> float | None:
        """Return the step at which the loss first is at or below `level`, or None if it never is."""
        before: tuple[int, float] | None = None
        for step, loss in zip(self.steps, self.losses, strict=True):
            if loss <= level:
                if before is None:
                    return float(step)
                return before[0] + (step - before[0]) * (before[1] - level) / (before[1] - loss)
            before = step, loss
        return None


def draw_text(curves: Sequence[tuple[str, Curve]], *, width: int = 80, height: int = 20) -> str:
    """Return the curves as a drawing for the terminal, in ANSI colours, `width` by `height` characters."""
    import plotext  # pyright: ignore[reportMissingTypeStubs]

    library: Any = plotext
    figure = library.figure  # the library's one canvas, hence cleared
    figure.clear()
    library.terminal.limit(False, False)
    figure.plot_size(width, height)
    figure.theme("simple")
    for (name, curve), color in zip(curves, itertools.cycle(_COLORS)):
        signal = figure.signal(list(curve.steps), list(curve.losses), marker=library.marker("braille", color))
        signal.lines()
        signal.label(name)
        figure.draw(signal)
    figure.label("step", "x")
    figure.label("held-out loss", "y")
    right = max(curve.steps[-1] for _, curve in curves)
    top = max(max(curve.losses) for _, curve in curves)
    figure.legend(x=right, y=top, ha="right", va="top", relative=True)
    return figure.build().string().rstrip("\n")


def check_plot(path: Path) -> None:
    """Raise `UserError` if `draw_png` could not draw to this path; called before the training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("drawing a PNG needs matplotlib", help="pip install 'kfac-onnx[plot]'")
    if path.suffix != ".png":
        raise UserError(f"the plot is a PNG, so its name must end in .png, not '{path.name}'")
    if not path.parent.is_dir():
        raise UserError(f"the plot cannot be written to {path}: {path.parent} is not a folder")
    require_writable(path)


def draw_png(curves: Sequence[tuple[str, Curve]], path: Path, *, title: str) -> None:
    """Write the curves as a PNG of about 1000 x 600 pixels; the dashed line is the first curve's best."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes: Any = figure.subplots()
    for name, curve in curves:
        axes.plot(curve.steps, curve.losses, label=name)
    axes.axhline(curves[0][1].best, linestyle="--", linewidth=0.8, color="gray")
    axes.set(xlabel="step", ylabel="held-out loss, nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as place:
        figure.savefig(place)
