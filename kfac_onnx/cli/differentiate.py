"""`kfac-onnx differentiate MODEL -o OUT`: make a training graph of a forward-only model."""

from __future__ import annotations

from pathlib import Path

import click

from kfac_onnx.cli.options import common, given_options, model_argument
from kfac_onnx.cli.output import print_json, say
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.markup import quantity

__all__ = ["command"]

_OF_LOGITS = (
    "loss",
    "logits",
    "reduction",
    "labels",
    "class_axis",
    "ignore_index",
    "label_smoothing",
    "class_weights",
)
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
@click.option(
    "--label-smoothing",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="The share of each label that is spread evenly over all classes.",
)
@click.option(
    "--class-weights",
    metavar="W,W,..|FILE",
    help="How much each class counts: numbers, or a .npz or .npy file with one vector.",
)
@click.option("--loss-output", metavar="NAME", help="Differentiate this value: it is the loss already.")
@click.option(
    "--straight-through",
    is_flag=True,
    help="Take QuantizeLinear with its DequantizeLinear for the identity in derivatives.",
)
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
    label_smoothing: float,
    class_weights: str | None,
    loss_output: str | None,
    straight_through: bool,
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
    from kfac_onnx.metadata import Frozen, Loss, Parameter
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
        label_smoothing=label_smoothing,
        class_weights=() if class_weights is None else _weights_of(class_weights),
        straight_through=straight_through,
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
                "frozen": [
                    {"name": item.name, "reason": item.reason}
                    for item in metadata.read_list(made, "frozen", Frozen)
                ],
                "notes": metadata.read_strings(made, "notes"),
            }
        )
        return
    if found is not None:
        say(f"loss: {found.value} ({found.reduction})")
    say(f"trained parameters: {len(parameters)}")
    say(f"wrote {output} ({quantity(Path(output).stat().st_size, 'B')})")


def _weights_of(text: str) -> list[float]:
    """Return the numbers between commas, or those of a file.

    Raises UserError for anything else.
    """
    if Path(text).suffix not in (".npz", ".npy"):
        try:
            return [float(number) for number in text.split(",")]
        except ValueError as error:
            raise UserError(
                f"--class-weights '{text}' is no list of numbers",
                help="give one number per class: 1,0.5,2, or a .npz or .npy file with one vector",
            ) from error
    import numpy as np

    from kfac_onnx.disk.npz import read_npz

    if Path(text).suffix == ".npz":
        arrays = read_npz(text)
    else:
        try:
            arrays = {"": np.load(text, allow_pickle=False)}
        except (OSError, ValueError) as error:
            raise UserError(f"'{text}' is not a readable .npy file: {first_line(error)}") from error
    if (
        len(arrays) != 1
        or (vector := next(iter(arrays.values()))).ndim != 1
        or vector.dtype.kind not in "fiu"
    ):
        raise UserError(f"'{text}' does not hold one vector of numbers, the weights of the classes")
    return [float(number) for number in vector]
