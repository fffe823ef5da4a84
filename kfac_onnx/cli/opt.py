"""`kfac-onnx opt MODEL -p PIPELINE`: run passes over a model, for people who write passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kfac_onnx.cli.options import common
from kfac_onnx.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from kfac_onnx.pipeline.pipeline import Report

__all__ = ["command"]


@click.command("opt", short_help="Run a textual pipeline of passes over a model.")
@click.argument("model", metavar="MODEL", required=False)
@click.option("-p", "--pipeline", metavar="TEXT", help="The passes: 'find-embeddings,lower{target=cpu},dce'.")
@click.option("-o", "--output", metavar="FILE", help="Write the model (.onnx, or .onnxtxt as text).")
@click.option("--canonical", is_flag=True, help="First read MODEL as a training graph, as transform does.")
@click.option("--print-after-change", is_flag=True, help="Log the model after each pass that changed it.")
@click.option("--timing", is_flag=True, help="Log seconds and counts of each pass.")
@click.option("--no-verify", is_flag=True, help="Skip the checks between passes.")
@click.option("--list", "listing", is_flag=True, help="List the passes and their options, and stop.")
@common
def command(
    model: str | None,
    pipeline: str | None,
    output: str | None,
    canonical: bool,
    print_after_change: bool,
    timing: bool,
    no_verify: bool,
    listing: bool,
    as_json: bool,
) -> None:
    """Run a textual pipeline of passes over MODEL (.onnx, .onnxtxt, or - for stdin).

    Without -o the model is printed as text; with -o it is written, and what each pass did is printed.
    """
    if listing:
        _list(as_json)
        return
    if model is None or pipeline is None:
        raise click.UsageError("opt wants MODEL and -p PIPELINE, or --list")
    from kfac_onnx.disk.models import load_model, refuse_overwrite, save_model
    from kfac_onnx.graph.invalid import blames_the_graph
    from kfac_onnx.graph.printer import model_text
    from kfac_onnx.graph.verifier import require_sound
    from kfac_onnx.pipeline.pipeline import Trace, parse_pipeline

    passes = parse_pipeline(pipeline)
    if output is not None:
        refuse_overwrite(output, model)
    if canonical:
        from kfac_onnx.readers import read_training_graph

        trace = Trace(verify=not no_verify, print_after_change=print_after_change, timing=timing)
        loaded = read_training_graph(model, trace=trace)
    else:
        loaded = load_model(model)
    if not no_verify:
        require_sound(loaded, model, own_operators=True)

    def run(source: str) -> Report:
        return passes.run(loaded, verify=not no_verify, print_after_change=print_after_change, timing=timing)

    report = blames_the_graph(run)(model)
    if output is not None:
        save_model(loaded, output)
    if as_json:
        print_json(report.to_json())
    elif output is None:
        say(model_text(loaded))
    else:
        print_table(
            "Passes",
            ["pass", "added ", "removed ", "edited ", "ms "],
            [
                (item.text, *(item.changes.added, item.changes.removed, item.changes.edited),
                 f"{item.seconds * 1000:.1f}")
                for item in report.passes
            ],
        )  # fmt: skip


def _list(as_json: bool) -> None:
    from kfac_onnx.pipeline.options import format_value, options_of
    from kfac_onnx.pipeline.registry import pass_class, pass_names

    classes = [pass_class(name) for name in pass_names()]
    if as_json:
        print_json(
            [
                {
                    "pass": cls.name,
                    "help": cls.summary(),
                    "options": [
                        {"name": option.name, "default": format_value(option.default),
                         "accepts": option.accepts, "help": option.help}
                        for option in options_of(cls)
                    ],
                }
                for cls in classes
            ]
        )  # fmt: skip
        return
    for cls in classes:
        say(f"{cls.name}: {cls.summary()}")
        for option in options_of(cls):
            default = format_value(option.default)
            say(f"    {option.name}={default}    {option.help} ({option.accepts})")
