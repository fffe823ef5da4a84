"""`kfac-onnx check MODEL`: what is wrong with a training graph, or probably not meant.

`--json` prints `{"errors": n, "warnings": n, "notes": n, "findings": [{"id", "severity", "what", "where",
"why", "remedy"}], "checks": [...]}`: `where` lists nodes or values, `checks` everything that was tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from kfac_onnx.cli.options import (
    common,
    gradient_pairs,
    html_option,
    model_argument,
    parameters_option,
    reading_options,
)
from kfac_onnx.cli.output import print_json, say
from kfac_onnx.cli.pages import require_page_place, save_page

if TYPE_CHECKING:
    from kfac_onnx.reports.checks import CheckReport

__all__ = ["command"]

CHECK_FAILED: Final = 2
PLACES: Final = 6


@click.command("check", short_help="Find what is wrong with a training graph.")
@model_argument
@parameters_option
@reading_options
@html_option
@common
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    parameters: str | None,
    loss: str | None,
    gradients: tuple[str, ...],
    html: str | None,
    as_json: bool,
) -> None:
    """Find what is wrong with the training graph MODEL, or probably not meant.

    Looks for sums lost in races, operators that onnxruntime lacks, parameters that an exporter lost, and
    more. Exits 2 if there is an error, 0 with warnings and notes. With --html also the graph drawn, with the
    nodes marked that findings are about.
    """
    from kfac_onnx.disk.models import load_model
    from kfac_onnx.reports.checks import check
    from kfac_onnx.runtime.saved.weights import read_weights

    require_page_place(html, model, *(() if parameters is None else (parameters,)))
    source = model if html is None else load_model(model)
    report = check(
        source,
        loss=loss,
        gradients=gradient_pairs(gradients),
        parameters=None if parameters is None else read_weights(parameters),
    )
    if html is not None and not isinstance(source, str):
        from kfac_onnx.reports.pages import findings_page

        save_page(html, findings_page(source, model, report=report))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
    if report.count("error"):
        ctx.exit(CHECK_FAILED)


def _print(report: CheckReport) -> None:
    for item in report.findings:
        say(f"{item.severity}: {item.what} [{item.id}]")
        if item.where:
            more = f" and {len(item.where) - PLACES} more" if len(item.where) > PLACES else ""
            say(f"  where: {', '.join(item.where[:PLACES])}{more}")
        say(f"  why:   {item.why}")
        say(f"  help:  {item.remedy}")
    counts = {
        "error": report.count("error"),
        "warning": report.count("warning"),
        "note": report.count("note"),
    }
    say(", ".join(f"{number} {word}{'' if number == 1 else 's'}" for word, number in counts.items()))
