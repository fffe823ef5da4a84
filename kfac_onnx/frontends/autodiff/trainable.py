"""Which initializers of a forward-only model are weights, and which are constants that nobody trains.

A model file does not say it. An initializer is taken for a weight if it is a floating-point tensor of one or
more dimensions on a path to the loss, unless how it is used or what it holds shows that it is something else.
What is left out is told with its reason, and the user can say otherwise by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.frontends.interface import is_float
from kfac_onnx.frontends.values import rank_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

__all__ = ["Candidates", "find_candidates"]

STATISTICS: Final = {"BatchNormalization": (3, 4)}
"""Operator -> inputs that are running statistics."""
INITIAL_STATES: Final = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Operator -> inputs that are states before the first step."""
CLASS_WEIGHTS: Final = {"SoftmaxCrossEntropyLoss": (2,), "NegativeLogLikelihoodLoss": (2,)}
"""Operator -> inputs that say how much each class counts."""
ANGLES: Final = {"RotaryEmbedding": (1, 2)}
"""Operator -> inputs that are cosines and sines of positions."""
BOUNDS: Final = {"Pow": (1,), "Clip": (1, 2), "Max": (0, 1), "Min": (0, 1), "Mod": (1,), "Where": (1, 2)}
"""Operator -> inputs at which a single number is an exponent, a bound or a filling."""
WEIGHT_OPERATORS: Final = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "FusedMatMul", "Gather"}
)
"""Operators whose matrices are weights even if they look like masks."""
AFTER_EPSILON: Final = frozenset({"Sqrt", "Pow", "Reciprocal", "Log"})
"""Functions that a small number is added for, to keep their argument away from zero."""
GELU: Final = (0.044715, math.sqrt(2 / math.pi), 1.702)
MASKED: Final = -1e3
"""Added to scores, numbers below this switch them off."""


@dataclass(frozen=True)
class Candidates:
    """Initializers and inputs to be trained, and those that are left alone, with the reason for each."""

    trained: tuple[ir.Value, ...]
    constants: dict[str, str]


def find_candidates(
    model: ir.Model, train: Sequence[str], freeze: Sequence[str], place: str | None
) -> Candidates:
    """Return which values of a forward-only graph are to be trained if the loss depends on them.

    `train` and `freeze` are names or patterns (`blocks.*`). With `train` exactly what it names is trained,
    floating-point graph inputs included.

    Raises:
        UserError: if a name or pattern fits no floating-point initializer (or input, for `train`).

    """
    known = {name: value for name, value in model.graph.initializers.items() if is_float(value)}
    inputs = {str(value.name): value for value in model.graph.inputs if is_float(value)}
    chosen = _named({**inputs, **known}, train, "--train", place)
    frozen = _named(known, freeze, "--freeze", place)
    if train:
        return Candidates(tuple(value for name, value in chosen.items() if name not in frozen), {})
    trained: list[ir.Value] = []
    constants: dict[str, str] = {}
    for name, value in known.items():
        if not rank_of(value) or name.startswith("kfac/"):
            continue
        reason = "frozen by the user" if name in frozen else _why_constant(value)
        if reason is None:
            trained.append(value)
        else:
            constants[name] = reason
    return Candidates(tuple(trained), constants)


def _named(
    known: dict[str, ir.Value], patterns: Sequence[str], option: str, place: str | None
) -> dict[str, ir.Value]:
    found: dict[str, ir.Value] = {}
    for pattern in patterns:
        hits = {name: value for name, value in known.items() if name == pattern or fnmatchcase(name, pattern)}
        if not hits:
            raise UserError(
                f"{option} '{pattern}' fits no weight of the graph{did_you_mean(pattern, known)}",
                place=place,
                help=f"its weights are {', '.join(known)}",
            )
        found.update(hits)
    return {name: value for name, value in known.items() if name in found}


def _why_constant(value: ir.Value) -> str | None:
    """Return why an initializer is no weight, or None."""
    uses = [(node, index) for node, index in value.uses() if node.op_type not in ("Shape", "Size")]
    for places, reason in (
        (STATISTICS, "running statistics of a normalization"),
        (CLASS_WEIGHTS, "class weights of a loss"),
        (ANGLES, "cosines and sines of positions"),
    ):
        if uses and all(index in places.get(node.op_type, ()) for node, index in uses):
            return reason
    tensor = value.const_value
    if tensor is None:
        return None
    array = np.asarray(tensor.numpy())
    numbers = array.astype(np.float64, copy=False) if array.size <= 1 else array
    if array.size == 1:
        number = float(numbers.reshape(()))
        return "a single number" if uses and all(_is_setting(number, *use) for use in uses) else None
    if (
        uses
        and all(index in INITIAL_STATES.get(node.op_type, ()) for node, index in uses)
        and not np.any(numbers)
    ):
        return "a recurrent layer's initial state of zeros"
    multiplied = any(node.op_type in WEIGHT_OPERATORS for node, _ in uses)
    if array.size and not multiplied and _is_mask(array):
        return "a mask"
    return None


def _is_setting(number: float, node: ir.Node, index: int) -> bool:
    """Say whether a single number is a setting of the computation: exponent, bound, epsilon, usual factor.

    A temperature, a global bias or the bias of a last layer is none of these and is trained.
    """
    if index in BOUNDS.get(node.op_type, ()):
        return True
    if node.op_type in ("Add", "Sub", "Sum"):
        after = {reader.op_type for reader, _ in node.outputs[0].uses()}
        divides = any(reader.op_type == "Div" and place == 1 for reader, place in node.outputs[0].uses())
        return bool(after & AFTER_EPSILON) or divides or (node.op_type == "Sub" and index == 0)
    return node.op_type in ("Mul", "Div") and _is_usual_factor(number)


def _is_usual_factor(number: float) -> bool:
    """Say whether a number is −1, 2ⁿ, √n, 1/√n or a constant of Gelu; 0 and 1 are what weights start at."""
    size = abs(number)
    if number == -1.0 or any(math.isclose(size, known, rel_tol=1e-5) for known in GELU):
        return True
    if size in (0.0, 1.0) or not math.isfinite(size):
        return False
    square = size * size if size > 1 else 1 / (size * size)
    return square < 1e9 and math.isclose(square, round(square), rel_tol=1e-5)


def _is_mask(array: np.ndarray) -> bool:
    """Say whether there are two different entries at most, which switch scores off, or are zero and one."""
    entries = array.astype(np.float32, copy=False).reshape(-1)
    values = np.unique(entries[:64])
    if len(values) > 2 or not np.all(np.isin(entries, values)):
        values = np.unique(entries) if len(values) <= 2 else values
    if len(values) > 2:
        return False
    if not np.all(np.isfinite(values)) or values.min() < MASKED:
        return True
    return array.ndim > 1 and values.tolist() == [0.0, 1.0]
