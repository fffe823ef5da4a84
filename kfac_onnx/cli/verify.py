"""`kfac-onnx verify`: gradients against finite differences, or the block against golden files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kfac_onnx.cli.data_options import chosen_columns, chosen_vocabularies, data_options
from kfac_onnx.cli.options import (
    chosen_providers,
    common,
    gradient_pairs,
    parameters_option,
    provider_option,
    reading_options,
)
from kfac_onnx.cli.output import print_json, print_table

if TYPE_CHECKING:
    from kfac_onnx.device.providers import Provider
    from kfac_onnx.runtime.gradcheck.verify import GradientCheck

__all__ = ["command"]

_CHECK_FAILED = 2


@click.command("verify", short_help="Check a model's gradients, or the block against golden files.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--data", metavar="DATA", help="What `train` reads, to check gradients on its first batch.")
@data_options
@click.option(
    "--batch-size", type=int, metavar="N", help="Take the first N examples (default: the whole file)."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random directions."
)
@click.option("--golden", metavar="FILE", multiple=True, help="A golden file; may be given several times.")
@click.argument("more", nargs=-1, metavar="")
@provider_option
@parameters_option
@reading_options
@common
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    data: str | None,
    batch_size: int | None,
    seed: int,
    golden: tuple[str, ...],
    more: tuple[str, ...],
    provider: tuple[str, ...],
    parameters: str | None,
    loss: str | None,
    gradients: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check each gradient of MODEL against its loss, by finite differences on a batch of --data.

    With --golden FILE..., check the block's numbers against golden files instead: by ONNX on ONNX Runtime and
    in float64. Exits 2 if a check fails. --provider runs the graph, or the block; what it is compared with is
    always made on the CPU.
    """
    providers = chosen_providers(ctx, provider)
    if golden:
        _golden(ctx, [*golden, *([model] if model else []), *more], providers, as_json)
        return
    if model is None or data is None or more:
        raise click.UsageError("verify wants MODEL and --data FILE, or --golden FILE...")
    from kfac_onnx.passes.find_embeddings import find_sites
    from kfac_onnx.readers import read_training_graph
    from kfac_onnx.runtime.feed.table_batches import batches_of
    from kfac_onnx.runtime.gradcheck.verify import data_inputs, verify_gradients
    from kfac_onnx.runtime.saved.weights import read_weights

    graph = read_training_graph(model, loss=loss, gradients=gradient_pairs(gradients))
    sites, id_checks = find_sites(graph)
    values = None if parameters is None else read_weights(parameters)
    batches = batches_of(
        data,
        data_inputs(graph, values),
        batch_size,
        columns=chosen_columns(ctx),
        vocabularies={name: path for name, path in chosen_vocabularies(ctx).items() if path is not None},
    )
    checks = verify_gradients(
        graph,
        next(iter(batches)),
        parameters=values,
        sites=sites,
        id_checks=id_checks,
        providers=providers,
        seed=seed,
    )
    _print(checks, as_json)
    if any(check.status == "wrong" for check in checks):
        ctx.exit(_CHECK_FAILED)


def _print(checks: list[GradientCheck], as_json: bool) -> None:
    if as_json:
        print_json([vars(check) for check in checks])
        return
    print_table(
        "Gradients against finite differences of the loss",
        ["parameter", "gradient", "verdict", "relative error ", "tolerance ", "loss in", "why"],
        [
            (
                check.parameter,
                check.gradient,
                check.status,
                None if check.error is None else f"{check.error:.1e}",
                None if check.tolerance is None else f"{check.tolerance:.0e}",
                check.arithmetic,
                check.why,
            )
            for check in checks
        ],
    )


def _golden(ctx: click.Context, paths: list[str], providers: list[Provider], as_json: bool) -> None:
    from kfac_onnx.reports.golden import TOLERANCE, verify_golden

    rows = verify_golden(paths, providers=providers)
    if as_json:
        print_json([vars(row) for row in rows])
    else:
        print_table(
            f"Relative error (largest difference over the array's largest entry; at most {TOLERANCE:g})",
            ["file", "quantity", "made by", "ONNX ", "float64 ", ""],
            [
                (row.file, row.quantity, row.path, f"{row.error_onnx:.1e}", f"{row.error_reference:.1e}",
                 "ok" if row.ok else "FAILED")
                for row in rows
            ],
        )  # fmt: skip
    if not all(row.ok for row in rows):
        ctx.exit(_CHECK_FAILED)
