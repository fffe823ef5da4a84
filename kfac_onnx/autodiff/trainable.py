"""Which initializers of a forward-only model are weights, and which are constants that nobody trains.

A model file does not say it. An initializer is taken for a weight if it is a floating-point tensor of one or
more dimensions on a path to the loss, unless how it is used or what it holds shows that it is something else.
What is left out is told with its reason, and the user can say otherwise by name.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.autodiff.buffers import why_buffer
from kfac_onnx.autodiff.contents import (
    are_cosine_and_sine,
    is_mask,
    is_positions,
    is_uniform,
    is_usual_factor,
)
from kfac_onnx.disk.mapped import greatest
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.graph.operators import SIZES, Trait, having
from kfac_onnx.graph.values import is_float, rank_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import onnx_ir as ir

__all__ = ["BY_THE_USER", "Candidates", "find_candidates"]

STATISTICS: Final = {"BatchNormalization": (3, 4)}
"""Operator -> inputs that are running statistics."""
SCALES: Final = {
    "QuantizeLinear": (1,),
    "DequantizeLinear": (1,),
    "GatherBlockQuantized": (2, 3),
    "MatMulNBits": (2, 3),
    "MatMulBnb4": (2,),
    "MatMulFpQ4": (2,),
    "MatMulIntegerToFloat": (2, 3, 6),
    "DynamicQuantizeMatMul": (2, 4),
}
"""Operator -> inputs that are scales, floating-point zero points or biases of quantized tensors."""
QUANTIZED: Final = {
    "ConvInteger": (1,),
    "DequantizeLinear": (0,),
    "DynamicQuantizeMatMul": (1,),
    "GatherBlockQuantized": (0,),
    "MatMulBnb4": (1,),
    "MatMulFpQ4": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "MatMulNBits": (1,),
    "QLinearConv": (3,),
    "QLinearMatMul": (3,),
}
"""Operator -> inputs that are weights in quantized form: integers."""
INITIAL_STATES: Final = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Operator -> inputs that are states before the first step."""
CLASS_WEIGHTS: Final = {"SoftmaxCrossEntropyLoss": (2,), "NegativeLogLikelihoodLoss": (2,)}
"""Operator -> inputs that say how much each class counts."""
ANGLES: Final = {"RotaryEmbedding": (1, 2)}
"""Operator -> inputs that are cosines and sines of positions."""
BY_THE_USER: Final = "frozen by the user"
ANGLES_REASON: Final = "cosines and sines of positions"
PLAIN_SCALES: Final = {"InstanceNormalization": (1, 2)}
"""Operator -> inputs at which ones and zeros, behind a Reshape, only stand for no scale and no bias."""
MOST: Final = 16
"""Initializers of one shape among which cosines and sines are looked for."""
BOUNDS: Final = {"Pow": (1,), "Clip": (1, 2), "Max": (0, 1), "Min": (0, 1), "Mod": (1,), "Where": (1, 2)}
"""Operator -> inputs at which a single number is an exponent, a bound or a filling."""
WEIGHT_OPERATORS: Final = having(Trait.WEIGHTED) | {"Gather"}  # a table of ids is a weight as well
"""Operators whose matrices are weights even if they look like masks."""
ADDS: Final = having(Trait.ADDS)
AFTER_EPSILON: Final = having(Trait.STEEP_AT_ZERO)
"""Functions that a small number is added for, to keep their argument away from zero."""


@dataclass(frozen=True)
class Candidates:
    """Initializers and inputs to be trained, and those that are left alone, with the reason for each."""

    trained: tuple[ir.Value, ...]
    constants: dict[str, str]


def find_candidates(
    model: ir.Model,
    stored: Collection[str],
    given: Sequence[ir.Value],
    train: Sequence[str],
    freeze: Sequence[str],
    place: str | None,
) -> Candidates:
    """Return which values of a forward-only graph are to be trained if the loss depends on them.

    `stored` names the initializers that the file holds: others were computed of constants. `given` are the
    graph's own inputs, `train` and `freeze` names or patterns (`blocks.*`). With `train`
    exactly what it names is trained, floating-point graph inputs included.

    Raises:
        UserError: if a name or pattern fits no floating-point initializer (or input, for `train`).

    """
    known = {name: value for name, value in model.graph.initializers.items() if is_float(value)}
    known = {name: value for name, value in known.items() if name in stored}
    inputs = {str(value.name): value for value in given if is_float(value)}
    chosen = _named({**inputs, **known}, train, "--train", place)
    frozen = _named(known, freeze, "--freeze", place)
    if train:
        return Candidates(tuple(value for name, value in chosen.items() if name not in frozen), {})
    trained: list[ir.Value] = []
    constants: dict[str, str] = {}
    for name, value in known.items():
        if not rank_of(value) or name.startswith("kfac/"):
            continue
        reason = BY_THE_USER if name in frozen else _why_constant(value)
        if reason is None:
            trained.append(value)
        else:
            constants[name] = reason
    for name, value in model.graph.initializers.items():
        uses = [(node, index) for node, index in value.uses()]
        if (
            uses
            and not is_float(value)
            and all(index in QUANTIZED.get(node.op_type, ()) for node, index in uses)
        ):
            constants[name] = "quantized numbers have no derivative: train it in floating point"
    for value in _cosines_and_sines(trained):
        constants[str(value.name)] = ANGLES_REASON
    return Candidates(tuple(value for value in trained if value.name not in constants), constants)


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
    uses = [(node, index) for node, index in value.uses() if node.op_type not in SIZES]
    for places, reason in (
        (STATISTICS, "running statistics of a normalization"),
        (CLASS_WEIGHTS, "class weights of a loss"),
        (ANGLES, ANGLES_REASON),
        (SCALES, "scales of a quantized tensor"),
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
        and greatest(numbers) == 0.0
    ):
        return "a recurrent layer's initial state of zeros"
    if is_positions(array):
        return ANGLES_REASON
    buffer = why_buffer(value, array) if uses else None
    if buffer is not None:
        return buffer
    if is_uniform(array, (0.0, 1.0)) and uses and all(_is_plain_scale(*use) for use in uses):
        return "no scale or bias: a group normalization made of another one"
    multiplied = any(node.op_type in WEIGHT_OPERATORS for node, _ in uses)
    if array.size and not multiplied and is_mask(array):
        return "a mask"
    return None


def _is_plain_scale(node: ir.Node, index: int) -> bool:
    """Say whether a node normalizes what a Reshape put into groups, and this input is its scale or bias."""
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    grouped = source is not None and source.op_type == "Reshape"
    return grouped and index in PLAIN_SCALES.get(node.op_type, ())


def _cosines_and_sines(values: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the initializers that are, two by two, the cosine and the sine of the same angles."""
    by_shape: dict[tuple[int, ...], list[tuple[ir.Value, np.ndarray]]] = {}
    for value in values:
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) > 1:
            array = np.asarray(tensor.numpy())
            if greatest(array) <= 1.001:
                by_shape.setdefault(array.shape, []).append((value, array))
    found: list[ir.Value] = []
    for group in by_shape.values():
        for first, second in itertools.combinations(group[:MOST], 2):
            if are_cosine_and_sine(first[1], second[1]):
                found += [first[0], second[0]]
    return found


def _is_setting(number: float, node: ir.Node, index: int) -> bool:
    """Say whether a single number is a setting of the computation: exponent, bound, epsilon, usual factor.

    A temperature, a global bias or the bias of a last layer is none of these and is trained.
    """
    if index in BOUNDS.get(node.op_type, ()) or (node.op_type == "Expand" and number in (0.0, 1.0)):
        return True
    if node.op_type in ADDS:
        after = {reader.op_type for reader, _ in node.outputs[0].uses()}
        divides = any(reader.op_type == "Div" and place == 1 for reader, place in node.outputs[0].uses())
        return bool(after & AFTER_EPSILON) or divides or (node.op_type == "Sub" and index == 0)
    return node.op_type in ("Mul", "Div") and is_usual_factor(number)
