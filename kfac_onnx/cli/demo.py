"""`kfac-onnx demo`: the main job on data that ships with the package."""

from __future__ import annotations

import click

from kfac_onnx.cli.options import chosen_providers, common, provider_option
from kfac_onnx.cli.output import console

__all__ = ["command"]


@click.command("demo", short_help="Train a small language model with Adam, Muon and K-FAC.")
@click.option("--quick", is_flag=True, help="A short run, under 40 s on two cores.")
@click.option("--steps", type=int, metavar="N", help="Steps of each optimizer.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and batches."
)
@click.option("--plot", metavar="PNG", help="Also draw the curves to this file (extra 'plot').")
@click.option("--threads", type=int, metavar="N", help="Threads (default: all cores).")
@provider_option
@common
@click.pass_context
def command(
    ctx: click.Context,
    quick: bool,
    steps: int | None,
    seed: int,
    plot: str | None,
    threads: int | None,
    provider: tuple[str, ...],
    as_json: bool,
) -> None:
    """Scan, transform and train a language model that ships with the package, with several optimizers.

    Prints a table of what each took to reach the best held-out losses of Adam and of Muon + Adam, and the
    curves. Needs no network.
    """
    from kfac_onnx.demo import run

    run(
        quick=quick,
        seed=seed,
        steps=steps,
        plot=plot,
        threads=threads,
        json=as_json,
        console=console(),
        providers=chosen_providers(ctx, provider),
    )
