"""`kfac-onnx diff A B`: what changed from one model to another."""

from __future__ import annotations

import click

from kfac_onnx.cli.options import common
from kfac_onnx.cli.output import print_json, say

__all__ = ["command"]


@click.command("diff", short_help="Show what a pipeline changed.")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@common
def command(before: str, after: str, as_json: bool) -> None:
    """Show what a pipeline changed between the models A and B.

    Nodes and values are compared by name; weights by their bytes. Exits 0 also where they differ.
    """
    from kfac_onnx.reports.diff import diff

    report = diff(before, after)
    if as_json:
        print_json(report.to_json())
    else:
        say(str(report))
