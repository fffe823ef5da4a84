"""One file of HTML: a head that forbids whatever it does not bring along, a body, its data and scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.disk.atomic import atomic_path
from kfac_onnx.disk.json_lines import plain_json
from kfac_onnx.errors import safe
from kfac_onnx.markup import Html, element, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["drawing_scripts", "page", "write_page"]

_DRAWING: Final = ("layout.js", "scene.js", "view.js", "app.js")


def _asset(name: str) -> str:
    return resources.files(__name__.rpartition(".")[0]).joinpath("assets", name).read_text(encoding="utf-8")


def drawing_scripts() -> list[str]:
    """Return the scripts of a drawing: dagre with its licence in front, then this package's."""
    licence = _asset("dagre.LICENSE.txt").strip()
    return [f"/*! @dagrejs/dagre\n\n{licence}\n*/\n{_asset('dagre.min.js')}", *map(_asset, _DRAWING)]


def _data(data: object) -> Html:
    """Return JSON that no name in it can end, as the content of a script element."""
    text = json.dumps(_safe(plain_json(data)), separators=(",", ":"), allow_nan=False)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _safe(data: Any) -> Any:
    if isinstance(data, str):
        return safe(data)
    if isinstance(data, dict):
        return {safe(name): _safe(value) for name, value in data.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  JSON data
    return [_safe(value) for value in data] if isinstance(data, list) else data  # pyright: ignore[reportUnknownVariableType]  JSON data


def _hash(text: str) -> str:
    """Return how a Content-Security-Policy names an inline script or style that may be used."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(title: str, body: Html, *, data: object = None, scripts: Sequence[str] = ()) -> str:
    """Return a whole HTML file.

    Args:
        title: the window's, as text.
        body: the content of `<body>`.
        data: JSON data that the scripts read from the element `#data`.
        scripts: JavaScript, one element each.

    """
    style = _asset("page.css")
    allowed = " ".join(map(_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; base-uri 'none'"
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=Html(policy)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light"),
        element("title", title),
        Html(f"<style>{style}</style>"),
    ]
    tail = (
        [Html(f'<script type="application/json" id="data">{_data(data)}</script>')]
        if data is not None
        else []
    )
    tail += [Html(f"<script>{script}</script>") for script in scripts]
    whole = element("html", element("head", *head), element("body", body, *tail), lang="en")
    return f"<!doctype html>\n{text_of(whole)}\n"


def write_page(path: str | Path, text: str) -> None:
    """Write a page to a file, as a whole or not at all; UserError where that is not allowed."""
    with atomic_path(path) as place:
        place.write_text(text, encoding="utf-8")
