"""Pages to look at: one HTML file each, with its data, styles and scripts inside, that asks no network.

| function          | shows                                                                       |
|-------------------|-----------------------------------------------------------------------------|
| `inspection_page` | a transformed model as a drawing, its tables, states and costs              |
| `difference_page` | two models side by side, with what changed marked                           |
| `findings_page`   | a training graph, and what `check` says of its nodes                        |
| `run_page`        | a run: curves, rates, settings, health of the factors, environment          |

Drawings are laid out in the browser: small levels by dagre (MIT, in `assets/`), large ones by ranks.
Names in a model are data, never markup: they travel as JSON and reach the page as text, and the page's
Content-Security-Policy runs its own scripts alone.
"""

from __future__ import annotations

from kfac_onnx.reports.pages.graphs import difference_page, findings_page, inspection_page

__all__ = ["difference_page", "findings_page", "inspection_page"]
