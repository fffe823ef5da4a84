"""`kfac-onnx train MODEL --data FILE`: train, show progress, write weights."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kfac_onnx.cli.options import (
    BLOCK_OPTIONS,
    block_options,
    block_settings,
    common,
    given_options,
    gradient_pairs,
    is_quiet,
    model_argument,
    optimizer_options,
    parameters_option,
    provider_names,
    provider_option,
    reading_options,
)
from kfac_onnx.cli.output import print_json
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.data import Batches
    from kfac_onnx.runtime.fitting import FitResult

__all__ = ["command"]

_CHECKPOINT = "run.ckpt"
_log = logging.getLogger(__name__)
_SETTINGS = ("preset", "lr", "rest", "rest_lr", "schedule", "parameters", *BLOCK_OPTIONS)
"""What a checkpoint already says."""


@click.command("train", short_help="Train a training graph on a file of arrays.")
@model_argument
@click.option(
    "--data", metavar="FILE", required=True, help="A .npz of arrays by input name, or a folder of them."
)
@click.option(
    "--batch-size", type=int, metavar="N", help="Default: the graph's, else each file is one batch."
)
@click.option(
    "--steps",
    type=int,
    metavar="N",
    help="How many steps, those before --resume counted in; without --epochs and --steps: one epoch.",
)
@click.option("--epochs", type=int, metavar="N", help="How many passes over the data.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of shuffling and of random operators.",
)
@click.option("--no-shuffle", is_flag=True, help="Keep the order of the file.")
@click.option(
    "--schedule",
    metavar="TEXT",
    default="constant",
    show_default=True,
    help="constant, linear or cosine, with options: 'cosine:warmup=100,final=0.1'.",
)
@click.option(
    "--held-out",
    metavar="FILE",
    help="Data to evaluate on, as --data: the mean over its examples.",
)
@click.option("--eval-every", type=int, metavar="N", help="Evaluate every N steps (default: at the end).")
@click.option("--metrics", metavar="FILE", help="Add one JSON line per step to this file.")
@click.option("--checkpoint", metavar="DIR", help="Keep a checkpoint in this folder.")
@click.option(
    "--checkpoint-every", type=int, metavar="N", help="Save it every N steps (default: at the end)."
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint.")
@click.option("--export", "export", metavar="OUT", help="Write a forward model with the trained weights.")
@click.option(
    "--into", metavar="FORWARD", help="Put the weights into this model of yours and write it to --export."
)
@click.option("--threads", type=int, metavar="N", help="Threads of the parallel phases (default: all cores).")
@provider_option
@optimizer_options
@block_options
@parameters_option
@reading_options
@common
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    data: str,
    batch_size: int | None,
    steps: int | None,
    epochs: int | None,
    seed: int,
    no_shuffle: bool,
    schedule: str,
    held_out: str | None,
    eval_every: int | None,
    metrics: str | None,
    checkpoint: str | None,
    checkpoint_every: int | None,
    resume: bool,
    export: str | None,
    into: str | None,
    threads: int | None,
    provider: tuple[str, ...],
    preset: str,
    lr: float | None,
    rest: str,
    rest_lr: float | None,
    parameters: str | None,
    loss: str | None,
    gradients: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train MODEL: a transformed one, or a training graph, which is transformed on the fly.

    Ids, shapes and dtypes of every batch are checked before anything is written.
    """
    _check(export, into, checkpoint, resume, [model, data, *(p for p in (parameters, held_out, into) if p)])
    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.export import filled

    providers = provider_names(provider)
    saved = None if checkpoint is None else Path(checkpoint) / _CHECKPOINT
    if resume and saved is not None:
        session = TrainingSession.resume(saved, providers=providers, threads=threads)
        steps = None if steps is None else max(steps - session.position, 0)
        ignored = given_options(ctx, _SETTINGS)
        if ignored:
            _log.warning("%s is not read on --resume: the run goes on as it was begun", ", ".join(ignored))
    else:
        made, values = _prepared(ctx, model, parameters, loss, gradients, preset, lr, rest, rest_lr)
        session = TrainingSession(
            made,
            providers=providers,
            parameters=values,
            threads=threads,
            lr=lr,
            rest_lr=rest_lr,
            schedule=schedule,
            seed=seed,
        )
    with session:
        if not session.updates_parameters:
            raise UserError(
                f"'{model}' updates no parameter: it returns gradients (--shape dense)",
                help="train one of --shape rows, or give the gradients to an optimizer of your own",
            )
        fixed = _fixed_size(session)
        size = batch_size if batch_size is not None else fixed
        valid = None if held_out is None else _batches(held_out, size, None, full=fixed is not None)
        if valid is not None:
            session.evaluate(itertools.islice(valid, 1))  # what is wrong with it shows before training
        if into is not None:
            filled(session.parameters, into)  # and so does a model that the weights do not fit
        result = session.fit(
            _batches(data, size, None if no_shuffle else seed, full=fixed is not None),
            steps=steps,
            epochs=epochs,
            held_out=valid,
            eval_every=eval_every,
            metrics=metrics,
            progress=not (as_json or is_quiet()),
            checkpoint=saved,
            checkpoint_every=checkpoint_every,
        )
        if export is not None:
            session.export(export, into=into)
        _print(session, result, as_json)


def _check(
    export: str | None, into: str | None, checkpoint: str | None, resume: bool, inputs: list[str]
) -> None:
    """Raise UserError for what would fail after hours of training: options, places, a wrong --into."""
    from kfac_onnx.files import load_proto, refuse_overwrite, require_folder, require_writable

    if into is not None and export is None:
        raise UserError("--into says where the weights go, but there is no --export to write")
    if resume and checkpoint is None:
        raise UserError("--resume needs --checkpoint DIR, the folder to go on from")
    if export is not None:
        refuse_overwrite(export, *inputs)
        require_writable(export)
    if checkpoint is not None:
        require_folder(checkpoint)
    if into is not None:
        load_proto(into, external=False)


def _prepared(
    ctx: click.Context,
    path: str,
    parameters: str | None,
    loss: str | None,
    gradients: tuple[str, ...],
    preset: str,
    lr: float | None,
    rest: str,
    rest_lr: float | None,
) -> tuple[ir.Model, dict[str, Any] | None]:
    """Return a transformed model, and the values that it still needs.

    Raises UserError where an option would change a model that is already transformed.
    """
    from kfac_onnx import metadata
    from kfac_onnx.files import load_model
    from kfac_onnx.passes.api import transform
    from kfac_onnx.runtime.weights import read_weights

    model = load_model(path)
    values = None if parameters is None else read_weights(parameters)
    if metadata.read(model, "step", metadata.Step) is None:
        made = transform(
            path, preset=preset, lr=lr, rest=rest, rest_lr=rest_lr,
            parameters=values, loss=loss, gradients=gradient_pairs(gradients), **block_settings(ctx),
        )  # fmt: skip
        return made, None
    for option in given_options(ctx, ("preset", "rest", "loss", "gradients", *BLOCK_OPTIONS)):
        raise UserError(
            f"'{path}' is already transformed, so {option} cannot change it",
            help="give the original training graph",
        )
    return model, values


def _fixed_size(session: TrainingSession) -> int | None:
    """Return the batch size that the graph's inputs fix, or None."""
    sizes = {item.dims[0] for item in session.batch_inputs if item.dims}
    return next((size for size in sizes if isinstance(size, int)), None) if len(sizes) == 1 else None


def _batches(path: str, size: int | None, seed: int | None, *, full: bool) -> Batches:
    from kfac_onnx.runtime.data import Batches
    from kfac_onnx.runtime.file_batches import FileBatches

    if size is None:
        return FileBatches(path, seed=seed)
    return Batches(path, size, seed=seed, drop_last=full)


def _print(session: TrainingSession, result: FitResult, as_json: bool) -> None:
    milliseconds = 1000 * result.seconds / max(1, result.steps)
    if as_json:
        print_json(
            {
                "steps": result.steps,
                "skipped": result.skipped,
                "position": session.position,
                "examples": result.examples,
                "seconds": result.seconds,
                "ms_per_step": milliseconds,
                "loss": result.loss,
                "held_out": result.held_out,
                "host_roots": session.host_roots,
            }
        )
        return
    skipped = f" ({result.skipped} skipped: not finite)" if result.skipped else ""
    click.echo(f"{result.steps} steps{skipped}, {result.examples} examples, last loss {result.loss:.6f}")
    click.echo(f"{result.seconds:.1f} s, {milliseconds:.2f} ms per step")
    for at, loss in result.held_out.items():
        click.echo(f"held-out loss at step {at}: {loss:.6f}")
