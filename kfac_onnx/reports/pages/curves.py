"""Curves as SVG: lines over steps, ticks at round numbers, a legend, gaps where nothing was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kfac_onnx.markup import Html, element, quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NARROW", "WIDE", "Curve", "chart", "ticks"]

WIDE: Final = 720
NARROW: Final = 420
_HEIGHT: Final = 270
_LEFT: Final = 62
_RIGHT: Final = 16
_TOP: Final = 30
_BOTTOM: Final = 34
_COLOURS: Final = ("#2456d6", "#c2571a", "#1d9a5b", "#7a4fd0", "#b8357f", "#0f8b8d")
_DECADES: Final = 2.0
"""Powers of ten between smallest and largest from which an axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """A line: points in the order of x; None is a gap. `faint` lines lie behind, `dots` marks each point."""

    label: str
    points: Sequence[tuple[float, float | None]]
    faint: bool = False
    dots: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    width: int = WIDE,
    logarithmic: bool | None = None,
    x_label: str = "step",
    marks: Sequence[float] = (),
) -> Html:
    """Return curves as SVG.

    Args:
        title: what they show.
        curves: drawn in order, faint ones first.
        width: in units of the drawing, of which a letter takes 11 in height; `WIDE` or `NARROW`.
        logarithmic: the y axis; None lets the values decide: positive and over two powers of ten.
        x_label: what the x axis counts.
        marks: places on the x axis, of skipped steps.

    """
    values = [y for curve in curves for _, y in curve.points if y is not None and math.isfinite(y)]
    places = [x for curve in curves for x, _ in curve.points] + list(marks)
    if not values or not places:
        return element("p", f"{title}: nothing was measured", class_="faint")
    log = logarithmic
    if log is None:
        log = min(values) > 0 and math.log10(max(values)) - math.log10(min(values)) > _DECADES
    low, high = _range([math.log10(y) for y in values] if log else values)
    left, right = min(places), max(places)
    right += left == right

    def across(x: float) -> float:
        return round(_LEFT + (x - left) / (right - left) * (width - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        height = math.log10(y) if log else y
        return round(_TOP + (high - height) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts: list[Html] = []
    for tick in [10.0**n for n in range(math.ceil(low), math.floor(high) + 1)] if log else ticks(low, high):
        y = down(tick)
        parts.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=y, y2=y, stroke="#e6ebf1"))
        parts.append(element("text", _number(tick), x=_LEFT - 8, y=y + 4, text_anchor="end"))
    base = _HEIGHT - _BOTTOM
    for tick in ticks(left, right, 7):
        x = across(tick)
        parts.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, stroke="#9aa8b8"))
        parts.append(element("text", _number(tick), x=x, y=base + 17, text_anchor="middle"))
    parts.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=base, y2=base, stroke="#9aa8b8"))
    parts.append(element("text", x_label, x=width - _RIGHT, y=_HEIGHT - 3, text_anchor="end"))
    for mark in marks:
        x = across(mark)
        parts.append(element("line", x1=x, x2=x, y1=base - 9, y2=base, stroke="#d23f4b"))
    colours = {curve: _COLOURS[number % len(_COLOURS)] for number, curve in enumerate(map(id, curves))}
    for curve in sorted(curves, key=lambda curve: not curve.faint):
        parts += _line(curve, colours[id(curve)], across, down)
    parts += _legend(curves, [colours[id(curve)] for curve in curves], width)
    head = element("text", title + (" (logarithmic)" if log else ""), x=0, y=14, class_="title")
    return element("svg", head, *parts, viewBox=f"0 0 {width} {_HEIGHT}", role="img", aria_label=title)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - room, high + room


def _number(number: float) -> str:
    if number and not 1e-3 <= abs(number) < 1e3:
        return quantity(number) if abs(number) >= 1 else f"{number:.0e}".replace("e-0", "e-")
    return f"{round(number, 10):g}"


def _line(
    curve: Curve, colour: str, across: Callable[[float], float], down: Callable[[float], float]
) -> list[Html]:
    """Return a curve as lines between its gaps, single points among them as dots."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in curve.points:
        if y is None or not math.isfinite(y):
            pieces.append([])
        else:
            pieces[-1].append((across(x), down(y)))
    parts: list[Html] = []
    for piece in pieces:
        if len(piece) > 1:
            points = " ".join(f"{x:g},{y:g}" for x, y in piece)
            parts.append(element(
                "polyline", points=points, fill="none", stroke=colour, stroke_linejoin="round",
                stroke_width="1" if curve.faint else "2", opacity="0.35" if curve.faint else None,
            ))  # fmt: skip
        if curve.dots or len(piece) == 1:
            parts += [element("circle", cx=x, cy=y, r=3, fill=colour) for x, y in piece]
    return parts


def _legend(curves: Sequence[Curve], colours: Sequence[str], width: int) -> list[Html]:
    if len(curves) < 2:
        return []
    parts: list[Html] = []
    x = float(width - _RIGHT)
    for curve, colour in reversed(list(zip(curves, colours, strict=True))):
        parts.append(element("text", curve.label, x=x, y=14, text_anchor="end"))
        x -= 6.2 * len(curve.label) + 8
        parts.append(element("rect", x=round(x - 12, 1), y=5, width=12, height=9, rx=3, fill=colour,
                             opacity="0.4" if curve.faint else None))  # fmt: skip
        x -= 26
    return parts
