"""The pages that draw a model: `inspect --html`, `diff --html`, `check --html`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.markup import Html, element, quantity, rows_table
from kfac_onnx.reports.checks import check
from kfac_onnx.reports.diff import diff, node_key
from kfac_onnx.reports.inspect import inspect
from kfac_onnx.reports.pages.drawing import drawing, names_of
from kfac_onnx.reports.pages.page import drawing_scripts, page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from kfac_onnx.device.placement import Placement
    from kfac_onnx.reports.checks import CheckReport, Finding
    from kfac_onnx.reports.diff import Difference, Section
    from kfac_onnx.reports.inspect import Inspection, SiteReport

__all__ = ["difference_page", "findings_page", "inspection_page"]

_MARKS: Final = {"inspect": "pass", "diff": "change", "check": "finding"}
"""What the colours of a page's drawing mean at first."""
_MOST_PLACES: Final = 20
"""Places of one finding that are listed."""
_MOST_LINES: Final = 400
"""Changes of one kind that a page lists; the drawing marks all of them."""


def inspection_page(
    model: ir.Model, name: str, *, report: Inspection | None = None, placement: Placement | None = None
) -> str:
    """Return the page of a transformed model; UserError as `inspect`.

    Args:
        model: what a pipeline of this package has transformed.
        name: how the page calls it.
        report: what `inspect` says of it, where that is at hand.
        placement: where its nodes run, where that is known.

    """
    report = inspect(model) if report is None else report
    tables = [_site(site) for site in report.sites]
    others = rows_table(
        ["parameter", "shape", "optimizer", "state "],
        [(p.name, list(p.shape), p.optimizer, quantity(p.state_bytes, "B")) for p in report.others],
    )
    refused = [
        element(
            "div", element("h2", r.parameter), element("p", r.reason), element("p", r.remedy), class_="card"
        )
        for r in report.refused
    ]
    phases = rows_table(["phase", "nodes "], list(report.nodes_by_phase.items()))
    about = [
        element("h3", "Pipeline"),
        element("p", report.pipeline, class_="text"),
        element("h3", "Nodes"),
        phases,
    ]
    sections = [
        ("tables", "Tables", tables + ([element("h3", "Refused"), *refused] if refused else [])),
        ("others", "Other parameters", [others]),
        ("about", "Model", about),
    ]
    return _graph_page("inspect", name, [drawing(model, name, placement=placement)], sections)


def difference_page(
    before: ir.Model, after: ir.Model, names: tuple[str, str], *, report: Difference | None = None
) -> str:
    """Return the page of two models side by side, with what changed from `before` to `after` marked."""
    report = diff(before, after) if report is None else report
    nodes = report.sections["nodes"]
    changed = dict.fromkeys(nodes.changed, "changed")
    views = [
        drawing(before, f"before: {names[0]}", statuses=changed | dict.fromkeys(nodes.removed, "removed")),
        drawing(
            after,
            f"after: {names[1]}",
            statuses=changed | dict.fromkeys(nodes.added, "added"),
            before={key: old for key, (old, _) in nodes.changed.items()},
        ),
    ]
    counts = rows_table(
        ["", "added ", "removed ", "changed "],
        [(kind, len(s.added), len(s.removed), len(s.changed)) for kind, s in report.sections.items()],
    )
    same = [] if report else [element("p", "the models are the same")]
    lines = [part for kind, section in report.sections.items() if section for part in _changes(kind, section)]
    return _graph_page("diff", " → ".join(names), views, [("changes", "Changes", [counts, *same, *lines])])


def findings_page(model: ir.Model, name: str, *, report: CheckReport | None = None) -> str:
    """Return the page of a training graph and of what `check` says of it."""
    report = check(model) if report is None else report
    counts = [
        element("span", f"{report.count(word)} {word}s", class_=f"tag {word}")
        for word in ("error", "warning", "note")
    ]
    places = _places(model)
    cards = [_finding(finding, places) for finding in report.findings]
    worst: dict[str, str] = {}
    for finding in report.findings:  # errors first
        for place in finding.where:
            worst.setdefault(places.get(_end(place), place), finding.severity)
    return _graph_page("check", name, [drawing(model, name, statuses=worst)], [
        ("findings", "Findings", [element("p", *_spaced(counts)), *cards]),
        ("checks", "Checks", [element("p", "Everything that was tried:"),
                              element("ul", *(element("li", word) for word in report.checks))]),
    ])  # fmt: skip


def _spaced(parts: Sequence[Html]) -> list[object]:
    return [piece for part in parts for piece in (part, " ")]


def _link(name: str, side: int | None = None, text: str | None = None) -> Html:
    return element("button", name if text is None else text, class_="link", data_node=name, data_side=side)


def _site(site: SiteReport) -> Html:
    share = site.state_bytes / site.adam_bytes if site.adam_bytes else 0.0
    adam = f"Adam would keep {quantity(site.adam_bytes, 'B')} ({share:.1%} of it)"
    facts: list[tuple[str, object]] = [
        ("size", f"{site.vocab_size} x {site.embedding_dim} {site.dtype}" + (", tied" if site.tied else "")),
        ("lookups per step", site.lookups),
        ("statistics", site.statistics),
        ("state", f"{quantity(site.state_bytes, 'B')}; {adam}"),
        ("each step", site.step_cost.text()),
        ("each refresh", site.refresh_cost.text()),
    ]
    if site.statistics_cost.flops:
        facts.append(("each update of G", site.statistics_cost.text()))
    facts += [(name, list(shape)) for name, shape in site.states.items()]
    table = element(
        "table",
        *(element("tr", element("th", name), element("td", text)) for name, text in facts),
        class_="facts",
    )
    groups = rows_table(
        ["phase", "operator", "nodes ", "cost"],
        [
            (
                g.phase,
                _link(g.nodes[0], text=g.operator) if g.nodes else g.operator,
                len(g.nodes),
                g.cost.text(),
            )
            for g in site.groups
        ],
    )
    return element(
        "div", element("h2", _link(site.parameter)), table, element("h3", "Parts"), groups, class_="card"
    )


def _places(model: ir.Model) -> dict[str, str]:
    """Return the key of the node that each name in a finding leads to; of a parameter its first reader."""
    keys: dict[str, str] = {}
    for node in model.graph:
        for name in names_of(node, node_key(node)):
            keys.setdefault(name, node_key(node))
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None:
                keys.setdefault(str(value.name), node_key(node))
    return keys


def _end(place: str) -> str:
    """Return the node that a path `a -> b (Op)` ends at, by its name; any other place as it is."""
    return place.rpartition(" -> ")[2].rpartition(" (")[0] if " -> " in place else place


def _finding(finding: Finding, keys: Mapping[str, str]) -> Html:
    places = [
        element("li", _link(keys[_end(place)], text=place) if _end(place) in keys else place)
        for place in finding.where[:_MOST_PLACES]
    ]
    more = len(finding.where) - len(places)
    return element(
        "div",
        element("p", element("span", finding.severity, class_=f"tag {finding.severity}"), " ", finding.id),
        element("h2", finding.what),
        element("p", finding.why),
        element("p", element("b", "What to do: "), finding.remedy),
        *([element("ul", *places)] if places else []),
        *([element("p", f"and {more} more places", class_="faint")] if more > 0 else []),
        class_="card",
    )


def _changes(kind: str, section: Section) -> list[Html]:
    def line(status: str, name: str, text: str, side: int) -> Html:
        mark = element("span", status, class_=f"tag {status}")
        place = _link(name, side) if kind == "nodes" else element("b", name)
        return element(
            "tr", element("td", mark), element("td", place, element("div", text, class_="text faint"))
        )

    lines = [line("removed", name, text, 0) for name, text in section.removed.items()]
    lines += [line("changed", name, f"{old}  →  {new}", 1) for name, (old, new) in section.changed.items()]
    lines += [line("added", name, text, 1) for name, text in section.added.items()]
    more = len(lines) - _MOST_LINES
    note = [element("p", f"and {more} more", class_="faint")] if more > 0 else []
    return [element("h3", kind), element("table", *lines[:_MOST_LINES], class_="grid"), *note]


def _graph_page(
    verb: str,
    name: str,
    views: list[dict[str, Any]],
    sections: Sequence[tuple[str, str, Sequence[object]]],
) -> str:
    """Return a page of drawings with a panel: `sections` are (id, title, content)."""
    tools = [
        element("label", element("input", type="checkbox", id="blocks"), " fold inserted parts"),
        element("label", "colour by ", element("select", id="colour")),
        element(
            "input", type="search", id="search", placeholder="Search nodes  ( / )", aria_label="search nodes"
        ),
        element(
            "span",
            element("button", "+", id="nearer", title="zoom in"),
            element("button", "−", id="farther", title="zoom out"),
            element("button", "Fit", id="whole", title="show the whole graph"),
            class_="tools",
        ),
    ]
    header = element(
        "header",
        element("h1", f"kfac-onnx {verb}"),
        element("span", name, class_="file"),
        *tools,
        element("div", id="results", hidden=""),
    )
    figures = [
        element(
            "figure",
            element("figcaption", view["caption"]),
            element("canvas", tabindex="0", aria_label="graph"),
        )
        for view in views
    ]
    tabs = [element("button", title, data_tab=place) for place, title, _ in sections]
    hint = "Choose a node in the drawing. Drag to move, wheel to zoom, double-click to unfold."
    panels = [element("section", *content, id=place) for place, _, content in sections]
    aside = element(
        "aside",
        element("nav", *tabs, element("button", "Node", data_tab="chosen"), class_="tabs"),
        *panels,
        element("section", element("p", hint, class_="faint"), id="chosen"),
    )
    main = element("main", *figures, element("div", id="legend"))
    body = element("div", header, main, aside, class_="graph")
    return page(
        f"{name} · kfac-onnx {verb}",
        body,
        data={"views": views, "marks": _MARKS[verb]},
        scripts=drawing_scripts(),
    )
