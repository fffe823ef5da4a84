"""`kfac-onnx train MODEL --data FILE`: train, show progress, write weights."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kfac_onnx.cli.config import ConfiguredCommand, config_options, settings_of, settings_text
from kfac_onnx.cli.data_options import data_options
from kfac_onnx.cli.measuring import chosen_logs, chosen_measures, measure_options, require_measures
from kfac_onnx.cli.options import (
    BLOCK_OPTIONS,
    REST_OPTIONS,
    block_options,
    block_settings,
    chosen_providers,
    common,
    given_options,
    gradient_pairs,
    is_given,
    is_quiet,
    model_argument,
    optimizer_options,
    parameters_option,
    provider_option,
    reading_options,
    target_of,
)
from kfac_onnx.cli.output import print_json, say
from kfac_onnx.cli.pages import reported, require_page_place
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from kfac_onnx.passes.standard import TransformOptions
    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.feed.data import Batches
    from kfac_onnx.runtime.fitting import FitOptions, FitResult

__all__ = ["command"]

_log = logging.getLogger(__name__)
_SETTINGS = ("preset", "lr", "rest", "rest_lr", "schedule")
"""What a checkpoint already says, like what `block_settings` returns."""


@click.command("train", cls=ConfiguredCommand, short_help="Train a training graph on a file of arrays.")
@model_argument
@config_options
@click.option(
    "--data",
    metavar="DATA",
    required=True,
    help="A file, folder or pattern: Parquet, Arrow, CSV, TSV, JSON lines, .npz, a folder of .npy by input, "
    "or one of Hugging Face's save_to_disk.",
)
@data_options
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
    "--shuffle-window",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows among which tables are shuffled, and which are in memory (default 65536).",
)
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
@measure_options
@click.option("--metrics", metavar="FILE", help="Add one JSON line per step to this file.")
@click.option("--report", metavar="FILE", help="Write a page about the run: curves, settings, factors.")
@click.option(
    "--checkpoint",
    metavar="PATH",
    help="Save checkpoints in this folder, or one checkpoint in this FILE.ckpt.",
)
@click.option("--checkpoint-every", type=int, metavar="N", help="Save every N steps (default: at the end).")
@click.option("--keep", type=int, metavar="N", help="How many checkpoints the folder keeps (default: 3).")
@click.option(
    "--skip-limit",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    metavar="N",
    help="Stop after so many steps in a row that were skipped because something was not finite; 0: never.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="Make so many batches ahead, in a thread of their own; 0: none.",
)
@click.option(
    "--resume",
    metavar="[PATH]",
    is_flag=False,
    flag_value="",
    help="Go on from the newest checkpoint of a folder, or from a file; without PATH from --checkpoint's.",
)
@click.option(
    "--export",
    "export",
    metavar="OUT",
    help="Write a forward model with the trained weights, or OUT.safetensors: the weights.",
)
@click.option(
    "--into", metavar="FORWARD", help="Put the weights into this model of yours and write it to --export."
)
@click.option("--threads", type=int, metavar="N", help="Threads of the parallel phases (default: all cores).")
@click.option(
    "--cuda-graph",
    is_flag=True,
    help="On CUDA, capture the stages that can be and launch each as one (batches of one shape).",
)
@click.option(
    "--tables-in",
    metavar="DIR",
    help="Train each table in its file in this folder, beyond memory; --resume writes them anew.",
)
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
    print_config: bool,
    data: str,
    batch_size: int | None,
    steps: int | None,
    epochs: int | None,
    seed: int,
    no_shuffle: bool,
    shuffle_window: int | None,
    schedule: str,
    held_out: str | None,
    eval_every: int | None,
    metrics: str | None,
    report: str | None,
    checkpoint: str | None,
    checkpoint_every: int | None,
    keep: int | None,
    skip_limit: int,
    prefetch: int,
    resume: str | None,
    export: str | None,
    into: str | None,
    threads: int | None,
    cuda_graph: bool,
    tables_in: str | None,
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
    settings_toml = settings_text(ctx)
    if print_config:
        say(settings_toml.rstrip("\n"))
        return
    from kfac_onnx.ranks.fabric import launched_ranks

    if (started := launched_ranks()) > 1:
        from kfac_onnx.cli.train_ranks import train_on_ranks

        train_on_ranks(ctx, model, started, lambda: _for_ranks(ctx, model))
        return
    begun = resume or checkpoint
    place = checkpoint or begun
    for option in given_options(ctx, ("checkpoint_every", "keep")) if place is None else ():
        raise UserError(f"{option} is given, but no --checkpoint to save to")
    require_measures(ctx, held_out, eval_every)
    inputs = [model, data, *(path for path in (parameters, held_out, into) if path)]
    _check(export, into, place, resume, metrics, report, inputs)
    from kfac_onnx.cli.resumed import changed_options
    from kfac_onnx.cli.rows import Rows
    from kfac_onnx.passes.standard import TransformOptions
    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.fitting import FitOptions
    from kfac_onnx.runtime.saved.export import filled
    from kfac_onnx.runtime.saved.saved_run import require_source, source_hash
    from kfac_onnx.runtime.saved.weights import read_weights

    options = FitOptions(
        steps=steps,
        epochs=epochs,
        eval_every=eval_every,
        metrics=metrics,
        progress=not (as_json or is_quiet()),
        checkpoint=place,
        checkpoint_every=checkpoint_every,
        keep=keep,
        skip_limit=skip_limit or None,
        prefetch=prefetch,
        **chosen_logs(ctx),
    )
    providers = chosen_providers(ctx, provider)
    if resume is not None and begun is not None:
        session = TrainingSession.resume(
            begun, providers=providers, threads=threads, cuda_graph=cuda_graph, tables_in=tables_in
        )
        require_source(session, model)
        words = {name: ctx.params[name] for name in _SETTINGS if is_given(ctx, name)}
        changed = changed_options(session, {**words, **block_settings(ctx)})
        if changed:
            _log.warning("the run goes on as it was begun, without %s", ", ".join(changed))
        batch_size, seed, no_shuffle = _data_settings(ctx, session, batch_size, seed, no_shuffle)
        if shuffle_window is None and session.data is not None:
            shuffle_window = session.data.get("window")
    else:
        settings = TransformOptions(
            preset=preset,
            lr=lr,
            rest=rest,
            rest_lr=rest_lr,
            target=target_of(providers),
            parameters=None if parameters is None else read_weights(parameters),
            loss=loss,
            gradients=gradient_pairs(gradients),
            **block_settings(ctx),
        )
        made, values = _prepared(ctx, model, settings)
        session = TrainingSession(
            made,
            providers=providers,
            parameters=values,
            threads=threads,
            lr=lr,
            rest_lr=rest_lr,
            schedule=schedule,
            seed=seed,
            cuda_graph=cuda_graph,
            tables_in=tables_in,
        )
        session.source = source_hash(model)
    session.settings = settings_toml
    with session:
        if not session.updates_parameters:
            raise UserError(
                f"'{model}' updates no parameter: it returns gradients (--shape dense)",
                help="train one of --shape rows, or give the gradients to an optimizer of your own",
            )
        fixed = _fixed_size(session)
        size = batch_size if batch_size is not None else fixed
        rows = Rows.chosen(ctx, model, session)
        valid = None if held_out is None else rows.batches(held_out, size, full=fixed is not None)
        options = replace(options, held_out=valid, **chosen_measures(ctx))
        if valid is not None:
            first = itertools.islice(valid, 1)
            session.measure(
                first, options.measures, scores=options.scores, labels=options.labels
            )  # what is wrong with it shows before training
        if into is not None:
            filled(session.parameters, into)  # and so does a model that the weights do not fit
        order = None if no_shuffle else seed
        batches = rows.batches(data, size, seed=order, full=fixed is not None, window=shuffle_window)
        left = None if resume is None else _remaining(session, batches, options)
        result = _fit(ctx, session, batches, options, left)
        if export is not None:
            session.export(export, into=into)
        _print(session, result, settings_of(ctx), as_json)


def _data_settings(
    ctx: click.Context, session: TrainingSession, batch_size: int | None, seed: int, no_shuffle: bool
) -> tuple[int | None, int, bool]:
    """Return the batch size, the seed and whether not to shuffle: as the run was begun, unless given."""
    before = session.data
    if before is None:
        return batch_size, seed, no_shuffle
    if batch_size is None:
        batch_size = before.get("batch_size")
    if not given_options(ctx, ("seed", "no_shuffle")):
        seed, no_shuffle = before.get("seed") or 0, before.get("seed") is None
    return batch_size, seed, no_shuffle


def _remaining(session: TrainingSession, batches: Batches, options: FitOptions) -> int:
    """Return how many steps of the whole run are still to be made."""
    size, epochs = len(batches), options.epochs
    ends = [n for n in (options.steps, None if epochs is None else epochs * size) if n is not None]
    return max(0, min(ends or [size]) - session.position)


def _fit(
    ctx: click.Context, session: TrainingSession, batches: Batches, options: FitOptions, left: int | None
) -> FitResult:
    """Train, a resumed run for the steps that are `left` of it; where none is, only evaluate.

    A signal ends the command with 130 or 143.
    """
    from kfac_onnx.runtime.fitting import FitResult
    from kfac_onnx.runtime.stopping import Interrupted, Terminated

    if left == 0:
        _log.info("the run is complete: it was saved after batch %d", session.position)
        if options.held_out is None:
            return FitResult()
        values = session.measure(
            options.held_out, options.measures, scores=options.scores, labels=options.labels
        )
        at = session.position
        return FitResult(held_out={at: values["loss"]}, measured={at: values}, best=session.best)
    if left is not None:
        options = replace(options, steps=left, epochs=None)
    report, title = ctx.params["report"], Path(ctx.params["model"]).name
    settings = {name: value for name, value in settings_of(ctx).items() if value not in (None, False, [])}
    try:
        with reported(report, session, title, settings, options.metrics) as metrics:
            return session.fit_as(batches, replace(options, metrics=metrics))
    except (Interrupted, Terminated) as e:
        place = options.checkpoint
        more = "with --checkpoint it could go on" if place is None else f"`--resume {place}` goes on"
        say(f"{e}; {more}", err=True)
        ctx.exit(e.status)


def _check(
    export: str | None,
    into: str | None,
    checkpoint: str | None,
    resume: str | None,
    metrics: str | None,
    report: str | None,
    inputs: list[str],
) -> None:
    """Raise UserError for what would fail after hours of training: options, places, a wrong --into."""
    from kfac_onnx.disk.models import load_proto, refuse_overwrite, require_folder, require_writable
    from kfac_onnx.runtime.saved.checkpoint_folder import is_folder
    from kfac_onnx.runtime.saved.export import require_format

    if into is not None and export is None:
        raise UserError("--into says where the weights go, but there is no --export to write")
    if resume is not None and checkpoint is None:
        raise UserError(
            "--resume needs a checkpoint to go on from", help="give --resume PATH or --checkpoint PATH"
        )
    if export is not None:
        refuse_overwrite(export, *inputs)
        require_format(export)
        require_writable(export)
    if checkpoint is not None and is_folder(checkpoint):
        require_folder(checkpoint)
    elif checkpoint is not None:
        refuse_overwrite(checkpoint, *inputs)
        require_folder(Path(checkpoint).parent)
    if metrics is not None:
        refuse_overwrite(metrics, *inputs)
    require_page_place(report, *inputs)
    for one, other in itertools.combinations([export, checkpoint, metrics, report], 2):
        if one is not None and other is not None and Path(one).absolute() == Path(other).absolute():
            raise UserError(f"'{one}' is named for two outputs", help="give each its own name")
    if into is not None:
        load_proto(into, external=False)


def _prepared(
    ctx: click.Context, path: str, settings: TransformOptions
) -> tuple[ir.Model, Mapping[str, Any] | None]:
    """Return a transformed model, and the values that it still needs.

    Raises UserError where an option would change a model that is already transformed.
    """
    from kfac_onnx import metadata
    from kfac_onnx.api import transform_as
    from kfac_onnx.disk.models import load_model

    model = load_model(path)
    if metadata.read(model, "step", metadata.Step) is None:
        return transform_as(path, settings), None
    for option in given_options(ctx, ("preset", "rest", "loss", "gradients", *REST_OPTIONS, *BLOCK_OPTIONS)):
        raise UserError(
            f"'{path}' is already transformed, so {option} cannot change it",
            help="give the original training graph",
        )
    return model, settings.parameters


def _for_ranks(ctx: click.Context, path: str) -> tuple[ir.Model, Mapping[str, Any] | None]:
    """Return the model that each rank cuts, and values for it."""
    from kfac_onnx.disk.models import refuse_overwrite, require_writable
    from kfac_onnx.passes.standard import TransformOptions
    from kfac_onnx.runtime.saved.export import require_format
    from kfac_onnx.runtime.saved.weights import read_weights

    chosen = ctx.params
    if chosen["export"] is not None:
        refuse_overwrite(chosen["export"], path, chosen["data"])
        require_format(chosen["export"])
        require_writable(chosen["export"])
    values = None if chosen["parameters"] is None else read_weights(chosen["parameters"])
    settings = TransformOptions(
        preset=chosen["preset"],
        lr=chosen["lr"],
        rest=chosen["rest"],
        rest_lr=chosen["rest_lr"],
        target="cpu",
        parameters=values,
        loss=chosen["loss"],
        gradients=gradient_pairs(chosen["gradients"]),
        **block_settings(ctx),
    )
    return _prepared(ctx, path, settings)


def _fixed_size(session: TrainingSession) -> int | None:
    """Return the batch size that the graph's inputs fix, or None."""
    sizes = {item.dims[0] for item in session.batch_inputs if item.dims}
    return next((size for size in sizes if isinstance(size, int)), None) if len(sizes) == 1 else None


def _print(session: TrainingSession, result: FitResult, settings: dict[str, object], as_json: bool) -> None:
    from kfac_onnx.runtime.step.skip_causes import reasons

    milliseconds = 1000 * result.seconds / max(1, result.steps)
    if as_json:
        print_json(
            {
                "steps": result.steps,
                "skipped": result.skipped,
                "last_skip": [cause.to_json() for cause in result.last_skip],
                "position": session.position,
                "examples": result.examples,
                "seconds": result.seconds,
                "ms_per_step": milliseconds,
                "loss": result.loss if math.isfinite(result.loss) else None,
                "held_out": result.held_out,
                "held_out_metrics": {
                    at: {name: value for name, value in values.items() if name != "loss"}
                    for at, values in result.measured.items()
                },
                "best": result.best,
                "stopped_early": result.stopped_early,
                "host_roots": session.host_roots,
                "roots": [health.to_json() for health in session.health()],
                "settings": settings,
            }
        )
        return
    skipped = f" ({result.skipped} skipped: not finite)" if result.skipped else ""
    say(f"{result.steps} steps{skipped}, {result.examples} examples, last loss {result.loss:.6f}")
    if result.last_skip:
        say(f"not finite in the last skipped step: {reasons(result.last_skip)}")
    if session.root_fallbacks:
        say(f"{session.root_fallbacks} inverse roots did not converge and were computed on the host instead")
    say(f"{result.seconds:.1f} s, {milliseconds:.2f} ms per step")
    for at, loss in result.held_out.items():
        others = [(name, x) for name, x in result.measured.get(at, {}).items() if name != "loss"]
        say(f"held-out loss at step {at}: {loss:.6f}" + "".join(f", {name} {x:.6f}" for name, x in others))
    if result.stopped_early:
        say("stopped early: what is monitored did not become better")
