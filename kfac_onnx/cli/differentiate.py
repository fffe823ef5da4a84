"""`kfac-onnx differentiate MODEL -o OUT`: make a training graph of a forward-only model."""

from __future__ import annotations

from pathlib import Path

import click

from kfac_onnx.cli.options import common, given_options, model_argument
from kfac_onnx.cli.output import print_json, quantity, say
from kfac_onnx.errors import UserError

__all__ = ["command"]

_OF_LOGITS = ("loss", "logits", "reduction", "labels", "class_axis", "ignore_index")
"""Parameters of `command` that say which loss to append."""


@click.command("differentiate", short_help="Write a training graph: a forward-only model with its gradients.")
@model_argument
@click.option("-o", "--output", metavar="OUT", required=True, help="The training graph to write.")
@click.option(
    "--loss",
    metavar="cross-entropy|mse|bce",
    default="cross-entropy",
    show_default=True,
    help="The loss of the logits; bce takes them before the sigmoid.",
)
@click.option(
    "--logits", metavar="NAME", help="The value that the loss is of (default: the only float output)."
)
@click.option(
    "--reduction",
    metavar="mean|sum",
    default="mean",
    show_default=True,
    help="Over examples; over elements for mse and bce.",
)
@click.option("--labels", metavar="NAME", default="labels", show_default=True, help="The new input.")
@click.option(
    "--class-axis", type=int, metavar="N", help="The axis of the classes in the logits (default: the last)."
)
@click.option("--ignore-index", type=int, metavar="N", help="The label of examples that do not count.")
@click.option("--loss-output", metavar="NAME", help="Differentiate this value: it is the loss already.")
@click.option(
    "--train",
    metavar="PATTERN",
    multiple=True,
    help="Train exactly the weights of this name or pattern (emb*); may be given several times.",
)
@click.option(
    "--freeze",
    metavar="PATTERN",
    multiple=True,
    help="Do not train the weights of this name or pattern; may be given several times.",
)
@common
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    output: str,
    loss: str,
    logits: str | None,
    reduction: str,
    labels: str,
    class_axis: int | None,
    ignore_index: int | None,
    loss_output: str | None,
    train: tuple[str, ...],
    freeze: tuple[str, ...],
    as_json: bool,
) -> None:
    """Append labels, loss and the gradients of all weights to the forward-only MODEL.

    OUT is a training graph: `scan`, `transform` and `train` take it. What is trained, and which constants
    are not, is said on stderr.
    """
    from kfac_onnx import metadata
    from kfac_onnx.api import save
    from kfac_onnx.disk.models import refuse_overwrite, require_writable
    from kfac_onnx.metadata import Loss, Parameter
    from kfac_onnx.passes.differentiate import differentiate

    refuse_overwrite(output, model)
    require_writable(output)
    if loss_output is not None:
        for option in given_options(ctx, _OF_LOGITS):
            raise UserError(
                f"--loss-output says that the graph has its loss, so {option} cannot be given with it",
                help="leave one of them out",
            )
    made = differentiate(
        model,
        loss=loss,
        logits=logits,
        loss_output=loss_output,
        reduction=reduction,
        labels=labels,
        class_axis=class_axis,
        ignore_index=ignore_index,
        train=train,
        freeze=freeze,
    )
    save(made, output)
    found = metadata.read(made, "loss", Loss)
    parameters = metadata.read_list(made, "parameters", Parameter)
    if as_json:
        print_json(
            {
                "output": output,
                "loss": None if found is None else found.value,
                "reduction": None if found is None else found.reduction,
                "labels": None if loss_output is not None else labels,
                "parameters": [
                    {"name": item.name, "shape": list(item.shape), "gradient": item.gradient}
                    for item in parameters
                ],
                "notes": metadata.read_strings(made, "notes"),
            }
        )
        return
    if found is not None:
        say(f"loss: {found.value} ({found.reduction})")
    say(f"trained parameters: {len(parameters)}")
    say(f"wrote {output} ({quantity(Path(output).stat().st_size, 'B')})")
