"""`kfac-onnx why MODEL PARAM`: the reasons for one parameter."""

from __future__ import annotations

from dataclasses import asdict

import click

from kfac_onnx.cli.options import common, gradient_pairs, model_argument, reading_options
from kfac_onnx.cli.output import print_json, say

__all__ = ["command"]


@click.command("why", short_help="Explain why a parameter matched or did not.")
@model_argument
@click.argument("parameter", metavar="PARAM")
@reading_options
@common
def command(model: str, parameter: str, loss: str | None, gradients: tuple[str, ...], as_json: bool) -> None:
    """Explain why the parameter PARAM of MODEL was taken as an embedding table, or was not.

    Lists what was tried at each node from the parameter to its uses, and from its gradient back to what is
    scattered into it.
    """
    from kfac_onnx.api import why

    found = why(model, parameter, loss=loss, gradients=gradient_pairs(gradients))
    if as_json:
        print_json(asdict(found))
        return
    verdict = {"embedding": "is an embedding table", "refused": "was refused"}
    gradients_missing = "" if found.trainable else ", but the graph has no gradients"
    say(f"'{parameter}' {verdict.get(found.verdict, 'is not an embedding table')}{gradients_missing}")
    if found.role is not None:
        say(f"  role:  {found.role.kind}: {found.role.reason}")
    for line in found.trail:
        say(f"  {line}")
    if found.refusal is not None:
        say(f"  path:  {found.refusal.path}")
        say(f"  why:   {found.refusal.reason}")
    if found.remedy is not None:
        say(f"  help:  {found.remedy}")
