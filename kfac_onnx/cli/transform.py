"""`kfac-onnx transform MODEL -o OUT`: write the whole preconditioned training step as one model."""

from __future__ import annotations

from pathlib import Path

import click

from kfac_onnx.cli.options import (
    BLOCK_OPTIONS,
    REST_OPTIONS,
    block_options,
    block_settings,
    common,
    given_options,
    gradient_pairs,
    model_argument,
    optimizer_options,
    parameters_option,
    reading_options,
    trace_of,
    trace_options,
)
from kfac_onnx.cli.output import print_json, say
from kfac_onnx.errors import UserError
from kfac_onnx.markup import quantity

__all__ = ["command"]

_SETTINGS = (
    "preset", "lr", "rest", "rest_lr", "shape", "target", "deterministic", "grad_scale", "allow_fallback",
)  # fmt: skip
"""Parameters of `command` that make up a pipeline."""


@click.command("transform", short_help="Write a model that trains its embedding tables with K-FAC.")
@model_argument
@click.option("-o", "--output", metavar="OUT", required=True, help="The model to write.")
@optimizer_options
@block_options
@click.option(
    "--shape",
    metavar="rows|dense",
    default="rows",
    show_default=True,
    help="rows: a whole training step, tables updated in place. dense: only the tables' gradients change.",
)
@click.option(
    "--target", metavar="cpu|cuda", default="cpu", show_default=True, help="Where OUT runs unaided."
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="With --target cuda: sum rows in one order, so that every run gives the same bits; it costs a sort.",
)
@click.option(
    "--grad-scale",
    type=float,
    help="What a mean loss divides by, for preset r1.7 where the graph does not tell.",
)
@click.option(
    "--allow-fallback",
    metavar="PARAM",
    multiple=True,
    help="Leave this refused table to --rest; may be given several times.",
)
@click.option(
    "--initialize",
    is_flag=True,
    help="Start from the file's own initialization (training_info), not from the values that are stored.",
)
@click.option("--pipeline", metavar="TEXT", help="Run these passes instead of the preset's.")
@parameters_option
@reading_options
@trace_options
@common
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    output: str,
    preset: str,
    lr: float | None,
    rest: str,
    rest_lr: float | None,
    shape: str,
    target: str,
    deterministic: bool,
    grad_scale: float | None,
    allow_fallback: tuple[str, ...],
    initialize: bool,
    pipeline: str | None,
    parameters: str | None,
    loss: str | None,
    gradients: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a model that trains the embedding tables of MODEL with K-FAC, all else with --rest.

    The result is one ONNX file that runs on plain ONNX Runtime.
    """
    from kfac_onnx.api import TransformOptions, save, transform_as
    from kfac_onnx.disk.models import refuse_overwrite
    from kfac_onnx.reports.inspect import inspect
    from kfac_onnx.runtime.saved.weights import read_weights

    refuse_overwrite(output, model, *([parameters] if parameters else []))
    if pipeline is not None:
        for option in given_options(ctx, (*_SETTINGS, *REST_OPTIONS, *BLOCK_OPTIONS)):
            raise UserError(
                f"--pipeline says everything, so {option} cannot be given with it",
                help="write it into the pipeline: `kfac-onnx opt --list` lists the passes and their options",
            )
    options = TransformOptions(
        preset=preset,
        lr=lr,
        rest=rest,
        rest_lr=rest_lr,
        shape=shape,
        target=target,
        deterministic=deterministic,
        grad_scale=grad_scale,
        allow_fallback=allow_fallback,
        initialize=initialize,
        pipeline=pipeline,
        parameters=None if parameters is None else read_weights(parameters),
        loss=loss,
        gradients=gradient_pairs(gradients),
        trace=trace_of(ctx),
        **block_settings(ctx),
    )
    made = transform_as(model, options)
    report = inspect(made)
    save(made, output)
    if as_json:
        print_json(
            {"output": output, "pipeline": report.pipeline, "sites": [s.to_json() for s in report.sites]}
        )
        return
    for site in report.sites:
        say(
            f"{site.parameter}: {site.vocab_size} x {site.embedding_dim}, "
            f"state {quantity(site.state_bytes, 'B')} (Adam: {quantity(site.adam_bytes, 'B')})"
        )
    say(f"wrote {output} ({quantity(Path(output).stat().st_size, 'B')})")
