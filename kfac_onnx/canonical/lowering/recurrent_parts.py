"""What the rules of LSTM and GRU share: directions, the Scan over time, and sizes.

Shapes are those of `recurrent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.lowering.scatter import END
from kfac_onnx.graph.emit import HALF_TYPES, Emitter, Miss
from kfac_onnx.graph.values import dtype_of, int_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.graph.emit import Lowered, Rule

__all__ = ["Cell", "Step", "by_direction", "refusal", "scan"]

ACTIVATIONS = {
    "LSTM": [["sigmoid", "tanh", "tanh"]],
    "GRU": [["sigmoid", "tanh"]],
    "RNN": [["tanh"], ["relu"]],
}
"""What each direction of a layer may apply."""


def refusal(node: ir.Node, optional: dict[int, str]) -> Miss | None:
    """Return why a node is outside what the formulas cover; `optional` names inputs that must be absent."""
    kind = next(kind for kind in ACTIVATIONS if node.op_type.startswith(kind))
    chosen = node.attributes.get("activations")
    names = [] if chosen is None else [name.lower() for name in chosen.as_strings()]
    width = len(ACTIVATIONS[kind][0])
    if any(names[start : start + width] not in ACTIVATIONS[kind] for start in range(0, len(names), width)):
        usual = " or ".join(", ".join(each) for each in ACTIVATIONS[kind])
        return Miss(f"activations other than {usual} are not supported")
    if "clip" in node.attributes:
        return Miss("clip is not supported")
    if int_attribute(node, "layout", 0) != 0:
        return Miss("layout=1 is not supported")
    if int_attribute(node, "input_forget", 0) != 0:
        return Miss("input_forget=1 is not supported")
    for index, name in optional.items():
        if index < len(node.inputs) and node.inputs[index] is not None:
            return Miss(f"{name} are not supported")
    if dtype_of(node.inputs[0]) in (None, *HALF_TYPES):
        return Miss("only float32 and float64 are supported")
    return None


@dataclass(frozen=True)
class Step:
    """The values of one time step: states carried along, and slices of the scanned tensors."""

    emit: Emitter
    states: tuple[ir.Value, ...]
    slices: tuple[ir.Value, ...]


def scan(
    emit: Emitter,
    node: ir.Node,
    states: Sequence[ir.Value],
    scanned: Sequence[ir.Value],
    step: Callable[[Step], tuple[Sequence[ir.Value], Sequence[ir.Value]]],
    *,
    outputs: int,
    backward: bool,
) -> tuple[ir.Value, ...]:
    """Run `step` over the first axis (backwards if asked); return final states and stacked outputs."""
    dtype = dtype_of(node.inputs[0]) or ir.DataType.FLOAT
    inner = Emitter.in_place_of(emit.context, node)
    label = next((value.name for value in node.outputs if value.name), node.op_type)

    def parameter(what: str) -> ir.Value:
        name = emit.context.fresh(f"kfac/lower/{label}/{what}")
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([None, None]))

    carried = tuple(parameter("state") for _ in states)
    slices = tuple(parameter("slice") for _ in scanned)
    new_states, stacked = step(Step(inner, carried, slices))
    results = [inner.op("Identity", value) for value in (*new_states, *stacked)]
    for value in results:
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape([None, None])
    body = ir.Graph(
        [*carried, *slices],
        results,
        nodes=inner.nodes,
        name=emit.context.fresh(f"kfac/lower/{label}/step"),
    )
    direction = [int(backward)]
    return emit.many(
        "Scan",
        [*states, *scanned],
        len(states) + outputs,
        {
            "body": body,
            "num_scan_inputs": len(scanned),
            "scan_input_directions": direction * len(scanned),
            "scan_output_directions": direction * outputs,
        },
    )


@dataclass(frozen=True)
class Cell:
    """The parts that forward and backward share: weights without their direction axis, and sizes."""

    emit: Emitter
    node: ir.Node
    reverse: bool
    """The recurrence runs from the last time step to the first."""

    def squeeze(self, value: ir.Value, axis: int = 0) -> ir.Value:
        """Drop the direction axis."""
        return self.emit.op("Squeeze", value, self.emit.ints(axis))

    def unsqueeze(self, value: ir.Value, axis: int = 0) -> ir.Value:
        """Put the direction axis back."""
        return self.emit.op("Unsqueeze", value, self.emit.ints(axis))

    def initial(self, value: ir.Value | None, x: ir.Value, recurrent: ir.Value) -> ir.Value:
        """Return an initial state float[B, H], zeros if the node has none."""
        if value is not None:
            return self.squeeze(value)
        batch = self.emit.part(self.emit.op("Shape", x), 1, 2)
        hidden = self.emit.part(self.emit.op("Shape", recurrent), 1, 2)
        return self.emit.zeros(self.emit.concat(batch, hidden), dtype_of(x) or ir.DataType.FLOAT)

    def previous(self, first: ir.Value, states: ir.Value) -> ir.Value:
        """Return float[T, B, H]: the state entering each step, from those that leave (same shape)."""
        start, end = (1, END) if self.reverse else (0, -1)
        others = self.emit.part(states, start, end)
        joined = (others, self.unsqueeze(first)) if self.reverse else (self.unsqueeze(first), others)
        return self.emit.op("Concat", *joined, axis=0)

    def biases(self, bias: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
        """Return the input and recurrent biases, float[gH] each."""
        if bias is None:
            return None
        halves = self.emit.many("Split", [self.squeeze(bias)], 2, {"axis": 0, "num_outputs": 2})
        return halves[0], halves[1]

    def linear(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Return x weightᵀ + bias for all steps, float[T, B, gH]."""
        product = self.emit.op("MatMul", x, self.emit.op("Transpose", weight, perm=(1, 0)))
        return product if bias is None else self.emit.op("Add", product, bias)

    def outer(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Return Σ over T and B of left rightᵀ, with the direction axis: float[1, gH, n]."""
        a = self.flat(left)
        return self.unsqueeze(
            self.emit.op("MatMul", self.emit.op("Transpose", a, perm=(1, 0)), self.flat(right))
        )

    def flat(self, value: ir.Value) -> ir.Value:
        """Return float[T B, n] of float[T, B, n]."""
        return self.emit.op("Flatten", value, axis=2)

    def total(self, *values: ir.Value) -> ir.Value:
        """Return the sums over T and B, joined, with the direction axis: float[1, Σ n]."""
        sums = [self.emit.op("ReduceSum", value, self.emit.ints(0, 1), keepdims=0) for value in values]
        return self.unsqueeze(self.emit.concat(*sums))

    def upstream(self, every: ir.Value | None, like: ir.Value) -> ir.Value:
        """Return dL/dY of every step, float[T, B, H], zeros if the loss does not read Y."""
        if every is not None:
            return self.squeeze(every, 1)
        return self.emit.op("Sub", like, like)


DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


def by_direction(
    rule: Callable[[Emitter, ir.Node, Sequence[ir.Value | None], bool], Sequence[ir.Value] | Miss],
    *,
    inputs: str,
    outputs: str,
) -> Rule:
    """Make a rule of one that takes inputs of one direction and whether it is the reverse one.

    `inputs` and `outputs` have a letter each: the axis of the direction (0 or 1), `x` where there is none;
    an output without one is the sum over directions. Inputs that a node leaves out are None.
    """

    def every(emit: Emitter, node: ir.Node) -> Lowered:
        given = node.attributes.get("direction")
        name = "forward" if given is None else given.as_string()
        if name not in DIRECTIONS:
            return Miss(f"direction '{name}' is not known")
        values = [*node.inputs, *([None] * len(inputs))][: len(inputs)]
        found: list[Sequence[ir.Value]] = []
        for place, reverse in enumerate(DIRECTIONS[name]):
            own = values
            if name == "bidirectional":
                own = [
                    value if value is None or axis == "x" else _one(emit, value, place, int(axis))
                    for value, axis in zip(values, inputs, strict=True)
                ]
            results = rule(emit, node, own, reverse)
            if isinstance(results, Miss):
                return results
            found.append(results)
        joined = found[0]
        if name == "bidirectional":
            joined = [
                emit.op("Add", *pair) if axis == "x" else emit.op("Concat", *pair, axis=int(axis))
                for pair, axis in zip(zip(*found, strict=True), outputs, strict=True)
            ]
        return [item if output.name else None for output, item in zip(node.outputs, joined, strict=False)]

    every.__doc__ = rule.__doc__
    return every


def _one(emit: Emitter, value: ir.Value, place: int, axis: int) -> ir.Value:
    """Return one direction of a value, the axis kept."""
    return emit.op("Slice", value, emit.ints(place), emit.ints(place + 1), emit.ints(axis))
