"""What a loss of logits is of, where a model's output is a probability already.

A model that is meant for inference often ends in a Sigmoid or a Softmax, which the loss applies itself. Seen
in the graph, the loss takes the value before it. Views between that value and the output (a squeeze, a cast)
are applied to it again; a Clip that keeps probabilities from 0 and 1 is left out, since the loss of logits
needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.backward import dimensions
from kfac_onnx.errors import UserError
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.values import ONNX_DOMAINS, constant, int_attribute

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ends_in", "is_probability", "scores_before"]

VIEWS: Final = frozenset(
    {"Cast", "CastLike", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
WHOLE: Final = frozenset({"Cast", "CastLike", "Identity"})
"""Views that leave every axis where it is."""
PROBABLE: Final = frozenset({"Sigmoid", "Softmax", "HardSigmoid", "Hardmax"})
KEEPING: Final = VIEWS | {
    "Concat",
    "Expand",
    "Gather",
    "GatherElements",
    "GatherND",
    "Max",
    "Mean",
    "Min",
    "Mul",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "Slice",
    "Split",
    "Tile",
}
"""Operators whose result is a probability where all their operands are."""
MANY: Final = frozenset({"Concat", "Max", "Mean", "Min", "Mul"})
"""Operators all of whose inputs are data; of the others only the first is."""


@dataclass(frozen=True)
class Ending:
    """What a value ends in: the `kind` of activation, its node and input, the views behind it, in order."""

    kind: str
    node: ir.Node
    source: ir.Value
    views: tuple[ir.Node, ...]


def scores_before(
    model: ir.Model, logits: ir.Value, loss: str, class_axis: int | None, place: str | None
) -> tuple[ir.Value, str | None]:
    """Return the value that a loss of logits is of, and a sentence where it is not `logits` itself.

    Appends copies of views to the graph where there are any.

    Raises:
        UserError: if the logits are probabilities, and no value before them is what this loss wants.

    """
    if loss not in ("bce", "cross-entropy"):
        return logits, None
    ending = ends_in(logits)
    wanted = ("Sigmoid",) if loss == "bce" else ("Softmax", "LogSoftmax")
    if ending is None or ending.kind not in wanted:
        kind = None if ending is None else ending.kind
        if kind is not None or is_probability(logits):
            raise _refusal(logits, loss, kind, place)
        return logits, None
    if loss == "cross-entropy" and not _along_classes(ending, logits, class_axis):
        raise UserError(
            f"the {ending.kind} that '{logits.name}' ends in is not taken along the axis of the classes",
            place=place,
            help=f"name the value before it: --logits {ending.source.name}, or the axis: --class-axis N",
        )
    scores = _again(model, ending)
    name = "log probabilities" if ending.kind == "LogSoftmax" else "probabilities"
    return scores, (
        f"the output '{logits.name}' holds {name}: the loss is of '{ending.source.name}', "
        f"before the {ending.kind}"
    )


def _refusal(logits: ir.Value, loss: str, kind: str | None, place: str | None) -> UserError:
    what = {
        "Sigmoid": "probabilities of a Sigmoid",
        "Softmax": "probabilities of a Softmax",
        "LogSoftmax": "logarithms of probabilities",
    }.get(str(kind), "probabilities")
    other = {("cross-entropy", "Sigmoid"): "--loss bce", ("bce", "Softmax"): "--loss cross-entropy"}.get(
        (loss, str(kind)),
        {("bce", "LogSoftmax"): "--loss cross-entropy"}.get((loss, str(kind)), "--loss mse"),
    )
    return UserError(
        f"'{logits.name}' holds {what}, and {loss} takes logits: it would squash them a second time",
        place=place,
        help=f"name the value before with --logits NAME, a loss that the graph computes with --loss-output "
        f"NAME, or another loss: {other}",
    )


def ends_in(value: ir.Value) -> Ending | None:
    """Return the sigmoid, softmax or log softmax that a value ends in, behind views and clips; else None."""
    views: list[ir.Node] = []
    while (node := value.producer()) is not None and node.domain in ONNX_DOMAINS:
        for recognise in (_single, _written_sigmoid, _written_softmax, _log_of_softmax):
            source = recognise(node)
            if source is not None:
                return Ending(source[0], node, source[1], tuple(reversed(views)))
        first = node.inputs[0] if node.inputs else None
        if first is None:
            return None
        if node.op_type in VIEWS:
            views.append(node)
        elif not (node.op_type == "Clip" and _within_one(node)):
            return None
        value = first
    return None


def _single(node: ir.Node) -> tuple[str, ir.Value] | None:
    source = node.inputs[0] if node.inputs else None
    if node.op_type in ("Sigmoid", "Softmax", "LogSoftmax") and source is not None:
        return node.op_type, source
    return None


def _written_sigmoid(node: ir.Node) -> tuple[str, ir.Value] | None:
    """Read 1 / (1 + exp(−x)) as the sigmoid of x."""
    if node.op_type == "Reciprocal":
        below = node.inputs[0]
    elif node.op_type == "Div" and _is_number(node.inputs[0], 1.0):
        below = node.inputs[1]
    else:
        return None
    added = _made_by(below, "Add")
    if added is None:
        return None
    for one, other in (added.inputs, reversed(added.inputs)):
        grown = _made_by(other, "Exp")
        negative = None if grown is None else _made_by(grown.inputs[0], "Neg")
        source = None if negative is None else negative.inputs[0]
        if source is not None and _is_number(one, 1.0):
            return "Sigmoid", source
    return None


def _written_softmax(node: ir.Node) -> tuple[str, ir.Value] | None:
    """Read exp(x) / Σ exp(x) as the softmax of x."""
    if node.op_type != "Div":
        return None
    above, below = _made_by(node.inputs[0], "Exp"), _made_by(node.inputs[1], "ReduceSum")
    if above is None or below is None or below.inputs[0] is not node.inputs[0]:
        return None
    source = above.inputs[0]
    return None if source is None else ("Softmax", source)


def _log_of_softmax(node: ir.Node) -> tuple[str, ir.Value] | None:
    """Read the logarithm of a softmax, perhaps clipped or with something small added, as a log softmax."""
    if node.op_type != "Log":
        return None
    value = node.inputs[0]
    added = _made_by(value, "Add")
    if (
        added is not None
        and (small := constant(added.inputs[1])) is not None
        and np.all(np.abs(small) < 1e-3)
    ):
        value = added.inputs[0]
    ending = None if value is None else ends_in(value)
    if ending is None or ending.kind != "Softmax" or any(view.op_type not in WHOLE for view in ending.views):
        return None
    return "LogSoftmax", ending.source


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain in ONNX_DOMAINS else None


def _is_number(value: ir.Value | None, number: float) -> bool:
    array = constant(value)
    return array is not None and array.size > 0 and bool(np.all(array == number))


def _within_one(node: ir.Node) -> bool:
    """Say whether a Clip keeps to bounds near 0 and 1, or inside them."""
    bounds = [constant(value) for value in node.inputs[1:3]]
    numbers = [float(array.reshape(-1)[0]) for array in bounds if array is not None and array.size == 1]
    return len(numbers) == 2 and numbers[0] >= -1e-3 and numbers[1] <= 1 + 1e-3


def _along_classes(ending: Ending, logits: ir.Value, class_axis: int | None) -> bool:
    dims, own = dimensions(logits), dimensions(ending.source)
    if dims is None or own is None:
        return False
    axis = (-1 if class_axis is None else class_axis) % len(dims)
    node = ending.node
    if node.op_type in ("Softmax", "LogSoftmax"):
        taken = int_attribute(node, "axis", -1) % len(own)
    elif node.op_type == "Log":
        inner = ends_in(node.inputs[0]) if node.inputs[0] is not None else None
        taken = -1 if inner is None else int_attribute(inner.node, "axis", -1)
        taken %= len(own)
    else:
        axes = constant(_denominator(node))
        if axes is None or axes.size != 1:
            return False
        taken = int(axes.reshape(-1)[0]) % len(own)
    if all(view.op_type in WHOLE for view in ending.views):
        return axis == taken
    # Behind a change of shape an axis is known by its place at the end, and by its size.
    last = axis == len(dims) - 1 and taken == len(own) - 1
    unmoved = all(view.op_type != "Transpose" for view in ending.views)
    return last and unmoved and isinstance(dims[-1], int) and dims[-1] == own[-1]


def _denominator(node: ir.Node) -> ir.Value | None:
    below = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return below.inputs[1] if below is not None and len(below.inputs) > 1 else None


def _again(model: ir.Model, ending: Ending) -> ir.Value:
    """Return the activation's input behind copies of the views that the output is behind."""
    value, names = ending.source, Context.of(model)
    for view in ending.views:
        copy = ir.Node(
            view.domain,
            view.op_type,
            [value, *view.inputs[1:]],
            attributes=list(view.attributes.values()),
            num_outputs=1,
        )
        output = copy.outputs[0]
        output.name = names.fresh(f"kfac/scores/{view.outputs[0].name}")
        output.type, output.shape = view.outputs[0].type, view.outputs[0].shape
        model.graph.append(copy)
        value = output
    return value


def is_probability(value: ir.Value | None) -> bool:
    """Say whether the operators show that every entry of a value lies from 0 to 1, constants aside."""
    known: dict[ir.Value, bool] = {}

    def probable(value: ir.Value | None, depth: int = 0) -> bool:
        if value is None or depth > 64:
            return False
        if value not in known:
            known[value] = False
            known[value] = _is_probable(value, lambda item: probable(item, depth + 1))
        return known[value]

    return probable(value)


def _is_probable(value: ir.Value, probable: Callable[[ir.Value | None], bool]) -> bool:
    node = value.producer()
    if node is None:
        array = constant(value)  # a factor; longer constants may be weights
        return array is not None and array.size == 1 and bool(np.all((array >= 0) & (array <= 1)))
    if node.domain not in ONNX_DOMAINS:
        return False
    if node.op_type in PROBABLE or _written_sigmoid(node) or _written_softmax(node):
        return True
    if node.op_type == "Clip" and _within_one(node):
        return probable(node.inputs[0])
    if node.op_type == "Sub":
        return _is_number(node.inputs[0], 1.0) and probable(node.inputs[1])
    if node.op_type not in KEEPING:
        return False
    return all(map(probable, node.inputs if node.op_type in MANY else node.inputs[:1]))
