"""`kfac-onnx scan MODEL|FOLDER`: which tables training graphs have, and what was refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from kfac_onnx.cli.options import common, gradient_pairs, reading_options, trace_of, trace_options
from kfac_onnx.cli.output import print_accounts, print_json, print_refusals, print_table, say
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from kfac_onnx.api import Report
    from kfac_onnx.cli.scan_folder import Row

__all__ = ["command"]

BUG: Final = 3


@click.command("scan", short_help="List the embedding tables of a training graph.")
@click.argument("model", metavar="MODEL|FOLDER")
@reading_options
@trace_options
@common
@click.pass_context
def command(
    ctx: click.Context, model: str, loss: str | None, gradients: tuple[str, ...], as_json: bool
) -> None:
    """List the embedding tables of a training graph, what was refused and why, and each parameter's role.

    Of a FOLDER: one row for every .onnx file in it and the folders in it. Exits 0 whenever the graph could be
    read, or the folder has a graph: a refusal is a result.
    """
    from kfac_onnx.api import scan

    if Path(model).is_dir():
        if loss is not None or gradients:
            raise UserError("--loss and --gradients are for one model, and this is a folder", place=model)
        _folder(ctx, model, as_json)
        return
    report = scan(model, loss=loss, gradients=gradient_pairs(gradients), trace=trace_of(ctx))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _folder(ctx: click.Context, folder: str, as_json: bool) -> None:
    from kfac_onnx.cli.scan_folder import scan_folder

    rows = scan_folder(folder)
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        read = [row.report for row in rows if row.report is not None]
        print_table(
            f"{len(rows)} graphs, {len(read)} read, {sum(len(report.sites) for report in read)} tables",
            ["graph", "read as", "tables (V x D, lookups)", "refused ", "loss", "trainable"],
            [_cells(row) for row in rows],
        )
        for row in rows:
            for item in row.report.refused if row.report is not None else ():
                say(f"refused: {item.parameter} of {row.graph}: {item.reason}")
    if any(row.bug for row in rows):
        ctx.exit(BUG)


def _cells(row: Row) -> tuple[str | int | None, ...]:
    report = row.report
    if report is None:
        return (row.graph, None, f"error: {row.error}", None, None, None)
    tables = [
        f"{site.parameter} {site.vocab_size} x {site.embedding_dim}, {len(site.uses)}"
        + (" (tied)" if site.dense_uses else "")
        for site in report.sites
    ]
    return (
        row.graph,
        report.frontend,
        "\n".join(tables) or None,
        len(report.refused) or None,
        report.loss and report.reduction,
        "yes" if report.trainable else "no",
    )


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
        say("no embedding tables")
    for site in report.sites:
        for use in site.penalties:
            say(f"penalty on '{site.parameter}': {use.op} '{use.output}' (its gradient goes past the block)")
        for use in site.dead_ends:
            say(f"dead end of '{site.parameter}': no gradient passes through {use.op} '{use.output}'")
    print_refusals(report.refused)
    print_accounts(report.accounts)
    if not report.trainable:
        say("the graph has no gradients, so it cannot be trained: `kfac-onnx differentiate` appends them")
    say(f"loss: {report.loss or 'none'} ({report.reduction})")
    say(f"batch inputs: {', '.join(report.batch_inputs) or 'none'}")
    say(f"{'trained ' if report.trainable else ''}parameters: {len(report.parameters)}")
    if report.roles:
        shapes = {item.name: list(item.shape) for item in report.parameters}
        print_table(
            "Roles of parameters",
            ["parameter", "shape", "role", "because"],
            [(role.parameter, shapes[role.parameter], role.kind, role.reason) for role in report.roles],
        )
    for note in report.notes:
        say(f"note: {note}")
