"""`kfac-onnx diff A B`: what changed from one model to another."""

from __future__ import annotations

import click

from kfac_onnx.cli.options import common, html_option
from kfac_onnx.cli.output import print_json, say
from kfac_onnx.cli.pages import require_page_place, save_page

__all__ = ["command"]


@click.command("diff", short_help="Show what a pipeline changed.")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@html_option
@common
def command(before: str, after: str, html: str | None, as_json: bool) -> None:
    """Show what a pipeline changed between the models A and B.

    Nodes and values are compared by name; weights by their bytes. Exits 0 also where they differ.
    With --html also both drawn side by side, with what changed marked.
    """
    from kfac_onnx.disk.models import load_model
    from kfac_onnx.reports.diff import diff

    require_page_place(html, before, after)
    old, new = load_model(before), load_model(after)
    report = diff(old, new)
    if html is not None:
        from kfac_onnx.reports.pages import difference_page

        save_page(html, difference_page(old, new, (before, after), report=report))
    if as_json:
        print_json(report.to_json())
    else:
        say(str(report))
