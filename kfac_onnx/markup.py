"""HTML for notebooks and pages, built of elements whose text is always escaped, and quantities for people."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Html", "element", "quantity", "rows_table", "text_of"]

_PREFIXES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_VOID: Final = ("input", "meta", "path", "line", "circle", "rect", "polyline")
"""Elements without content."""


class Html(str):
    """Text that is HTML already, so that it is not escaped again."""

    __slots__ = ()


def text_of(value: object) -> Html:
    """Return a value as HTML: `Html` as it is, None as a dash, anything else escaped."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(safe("—" if value is None else str(value))))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Return `<tag ...>children</tag>`; `class_` is `class`, `data_node` `data-node`, None leaves one out."""
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text_of(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID and not children:
        return Html(f"<{tag}{words}/>")
    return Html(f"<{tag}{words}>{''.join(map(text_of, children))}</{tag}>")


def rows_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    name: str | None = "grid",
    style: str | None = None,
) -> Html:
    """Return a table; a column whose name ends in a blank is aligned to the right."""
    kinds = ["number" if column.endswith(" ") else None for column in columns]
    right = ["text-align:right" if kind and style is not None else style for kind in kinds]
    head = [
        element("th", column.rstrip(), class_=kind if style is None else None, style=cell)
        for column, kind, cell in zip(columns, kinds, right, strict=True)
    ]
    body = [
        element("tr", *(
            element("td", value, class_=kind if style is None else None, style=cell)
            for value, kind, cell in zip(row, kinds, right, strict=True)
        ))
        for row in rows
    ]  # fmt: skip
    return element("table", element("thead", element("tr", *head)), element("tbody", *body), class_=name)


def quantity(number: float, unit: str = "") -> str:
    """Return `1.25 M`, `3.20 GB`: a number with a decimal prefix and its unit."""
    for factor, prefix in _PREFIXES:
        if abs(number) >= factor:
            return f"{number / factor:.2f} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()
