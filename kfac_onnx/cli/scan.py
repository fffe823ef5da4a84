"""`kfac-onnx scan MODEL`: which tables a training graph has, and what was refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kfac_onnx.cli.options import common, gradient_pairs, model_argument, reading_options
from kfac_onnx.cli.output import print_json, print_refusals, print_table

if TYPE_CHECKING:
    from kfac_onnx.passes.api import Report

__all__ = ["command"]


@click.command("scan", short_help="List the embedding tables of a training graph.")
@model_argument
@reading_options
@common
def command(model: str, loss: str | None, gradients: tuple[str, ...], as_json: bool) -> None:
    """List the embedding tables of a training graph, and what was refused and why.

    Exits 0 whenever the graph could be read: a refusal is a result.
    """
    from kfac_onnx.passes.api import scan

    report = scan(model, loss=loss, gradients=gradient_pairs(gradients))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Report) -> None:
    if report.sites:
        print_table(
            "Embedding tables",
            ["parameter", "V x D ", "dtype", "stored as", "lookups (operator: ids)", "gradient of the rows"],
            [
                (
                    site.parameter + (" (tied)" if site.dense_uses else ""),
                    f"{site.vocab_size} x {site.embedding_dim}",
                    site.dtype,
                    site.layout,
                    "\n".join(f"{use.op}: {use.ids or 'constant'}" for use in site.uses),
                    "\n".join(use.output_gradient or "none" for use in site.uses),
                )
                for site in report.sites
            ],
        )
    else:
        click.echo("no embedding tables")
    print_refusals(report.refused)
    if not report.trainable:
        click.echo(
            "the graph has no gradients, so it cannot be trained: export loss and gradients as outputs"
        )
    click.echo(f"loss: {report.loss or 'none'} ({report.reduction})")
    click.echo(f"batch inputs: {', '.join(report.batch_inputs) or 'none'}")
    click.echo(f"{'trained ' if report.trainable else ''}parameters: {len(report.parameters)}")
    for note in report.notes:
        click.echo(f"note: {note}")
