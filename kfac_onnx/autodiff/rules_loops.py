"""Gradients of Loop, Scan and If.

With s_{t+1}, y_t = f(s_t, x_t; c) the gradient is another Scan, over the iterations in reverse order: each
computes f anew from the saved state s_t, and

    ds_t, dx_t, dc += f'(s_t, x_t; c)ᵀ (ds_{t+1}, dy_t)

ds is its state, dx_t its result per iteration, and the gradient of each outer value c that the body reads is
a state too. The saved states are a stack that the node returns already, where there is one; else they
come from a second run of the node that returns them. A Loop is saved with the number of iterations that it
did make, so that one which stops early has its gradient too.

An If is differentiated branch by branch, under the same condition.

Source: Griewank & Walther, Evaluating Derivatives, 2nd ed., sec. 12.1 (recomputation from saved states).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.autodiff.backward import captured_values
from kfac_onnx.autodiff.loop_parts import (
    BodyCopy,
    float_value,
    read_by_number,
    saved_states,
    zeros_like,
)
from kfac_onnx.canonical.loops.recurrence import Recurrence
from kfac_onnx.graph.emit import Miss

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule
    from kfac_onnx.autodiff.loop_parts import Slices

__all__ = ["RULES"]


@dataclass
class _Wanted:
    """What a recurrence is differentiated by: reads, outer values read slice by slice, and others."""

    reads: list[int]
    slices: list[Slices]
    captured: list[ir.Value]


def recurrence(back: Backward) -> Gradients:
    """Loop, Scan: a Scan over the iterations in reverse order."""
    loop = Recurrence.of(back.node)
    if loop is None:
        return Miss("it is malformed")
    if any(item.outer.shape is None and item.axis for item in loop.read):
        return Miss("the rank of a scan input is not known")
    captured = back.captured()
    slices = [item for value in captured if (item := read_by_number(loop, value)) is not None]
    sliced = [item.outer for item in slices]
    wanted = _Wanted(
        [i for i in range(len(loop.read)) if back.needs(len(loop.states) + i)],
        slices,
        [value for value in captured if value not in sliced],
    )
    return _Reversed(back, loop, wanted).gradients()


class _Reversed:
    """The backward Scan under construction: its inputs and results, and the body that belongs to them."""

    def __init__(self, back: Backward, loop: Recurrence, wanted: _Wanted) -> None:
        self.back = back
        self.loop = loop
        self.wanted = wanted
        self.copy = BodyCopy(loop.body, back)
        self.states = [i for i, state in enumerate(loop.states) if float_value(state.inner, state.first)]
        self.firsts: list[ir.Value] = []
        self.carried: list[ir.Value] = []
        self.nexts: list[ir.Value] = []
        self.scanned: list[tuple[ir.Value, ir.Value, int, bool]] = []
        self.results: list[tuple[ir.Value, int, bool]] = []

    def gradients(self) -> Gradients:
        """Return the gradients of the node's inputs; those of outer values are added to `back`."""
        back, loop, copy = self.back, self.loop, self.copy
        stacks, count = saved_states(back, loop)
        for state, stack in zip(loop.states, stacks, strict=True):
            self._scan(stack, copy.of(state.inner), 0, reverse=True)
        for item in loop.read:
            self._scan(item.outer, copy.of(item.inner), item.axis, reverse=not item.reverse)
        sliced = [self._slice(item, count) for item in self.wanted.slices]
        if loop.number is not None and copy.of(loop.number).uses():
            self._scan(self._numbers(count), copy.of(loop.number), 0, reverse=True)
        seeds = self._seeds()
        by_state = [copy.of(loop.states[i].inner) for i in self.states]
        by_read = [copy.of(loop.read[i].inner) for i in self.wanted.reads]
        missing: list[str] = []
        found = copy.propagate(seeds, [*by_state, *by_read, *sliced, *self.wanted.captured], missing)
        if missing:
            return Miss(f"in its body: {'; '.join(missing)}")
        for value in by_state:
            self.nexts.append(found[value] if value in found else zeros_like(copy.emit, value))
        captured = [value for value in self.wanted.captured if value in found]
        for value in captured:
            total = self._carry(zeros_like(back.emit, value), value)
            self.nexts.append(copy.emit.op("Add", total, found[value]))
        read = [
            (i, found[copy.of(loop.read[i].inner)])
            for i in self.wanted.reads
            if copy.of(loop.read[i].inner) in found
        ]
        for index, gradient in read:
            item = loop.read[index]
            self.results.append((gradient, item.axis, not item.reverse))
        parts = [
            (item, found[value])
            for item, value in zip(self.wanted.slices, sliced, strict=True)
            if value in found
        ]
        self.results.extend((gradient, 0, True) for _, gradient in parts)
        outputs = self._emit_scan()
        return self._returned(
            outputs, captured, [index for index, _ in read], [item for item, _ in parts], count
        )

    def _scan(self, outer: ir.Value, inner: ir.Value, axis: int, *, reverse: bool) -> None:
        self.scanned.append((outer, inner, axis, reverse))

    def _numbers(self, count: ir.Value) -> ir.Value:
        zero, one = (self.back.names.constant(np.array(item, np.int64)) for item in (0, 1))
        return self.back.emit.op("Range", zero, count, one)

    def _slice(self, item: Slices, count: ir.Value) -> ir.Value:
        """Scan the slices of an outer value, instead of reading them by number; return the body's slice."""
        emit = self.back.emit
        outer = item.outer
        if not item.whole:
            end = emit.op("Reshape", count, emit.ints(-1))
            outer = emit.op("Slice", outer, emit.ints(0), end, emit.ints(0))
        inner = self.copy.input(item.reads[0].outputs[0])
        for node in item.reads:
            self.copy.replace(node.outputs[0], inner)
        self._scan(outer, inner, 0, reverse=True)
        return inner

    def _carry(self, first: ir.Value, like: ir.Value) -> ir.Value:
        inner = self.copy.input(like)
        self.firsts.append(first)
        self.carried.append(inner)
        return inner

    def _seeds(self) -> dict[ir.Value, ir.Value]:
        """Return the gradients of the body's results: of the next states, and of this iteration's slices."""
        back, loop, copy = self.back, self.loop, self.copy
        seeds: dict[ir.Value, ir.Value] = {}
        for index in self.states:
            state = loop.states[index]
            first = back.grad(index)
            first = zeros_like(back.emit, state.final) if first is None else first
            seeds[copy.end(state.next)] = self._carry(first, state.inner)
        for index, item in enumerate(loop.collected, len(loop.states)):
            gradient = back.grad(index)
            if gradient is None:
                continue
            inner = copy.input(item.inner)
            self._scan(gradient, inner, item.axis, reverse=not item.reverse)
            seeds[copy.end(item.inner)] = inner
        return seeds

    def _emit_scan(self) -> Sequence[ir.Value]:
        ends = [*self.nexts, *(value for value, _, _ in self.results)]
        body = self.copy.close([*self.carried, *(inner for _, inner, _, _ in self.scanned)], ends)
        return self.back.emit.many(
            "Scan",
            [*self.firsts, *(outer for outer, _, _, _ in self.scanned)],
            len(ends),
            {
                "body": body,
                "num_scan_inputs": len(self.scanned),
                "scan_input_axes": [axis for _, _, axis, _ in self.scanned],
                "scan_input_directions": [int(reverse) for *_, reverse in self.scanned],
                "scan_output_axes": [axis for _, axis, _ in self.results],
                "scan_output_directions": [int(reverse) for *_, reverse in self.results],
            },
        )

    def _returned(
        self,
        outputs: Sequence[ir.Value],
        captured: list[ir.Value],
        reads: list[int],
        slices: list[Slices],
        count: ir.Value,
    ) -> Gradients:
        back, loop = self.back, self.loop
        results: list[ir.Value | None] = [None] * len(back.node.inputs)
        before = 0 if loop.is_scan else 2
        rest = list(outputs)
        for index in self.states:
            results[before + index] = rest.pop(0)
        for value in captured:
            back.add(value, rest.pop(0))
        for index in reads:
            results[len(loop.states) + index] = rest.pop(0)
        for item in slices:
            gradient = rest.pop(0)
            back.add(item.outer, gradient if item.whole else self._padded(gradient, item.outer, count))
        return results

    def _padded(self, gradient: ir.Value, outer: ir.Value, count: ir.Value) -> ir.Value:
        """Return the gradient of a tensor of which only the first `count` entries are read."""
        emit = self.back.emit
        rank = len(outer.shape or ())
        missing = emit.op("Sub", emit.op("Shape", outer, start=0, end=1), count)
        zeros = emit.ints(*(0,) * rank)
        pads = (
            emit.concat(zeros, missing, emit.ints(*(0,) * (rank - 1)))
            if rank > 1
            else emit.concat(zeros, missing)
        )
        return emit.op("Pad", gradient, pads)


def branches(back: Backward) -> Gradients:
    """If: the gradients of the outer values that either branch reads, under the same condition."""
    wanted = [
        value for value in captured_values(back.node) if back.wanted(value) and float_value(value, None)
    ]
    if not wanted:
        return [None] * len(back.node.inputs)
    missing: list[str] = []
    attributes: dict[str, ir.Graph] = {}
    for name in ("then_branch", "else_branch"):
        branch = back.node.attributes[name].as_graph()
        copy = BodyCopy(branch, back)
        seeds = {
            copy.end(value): gradient
            for index, value in enumerate(branch.outputs)
            if (gradient := back.grad(index)) is not None
        }
        found = copy.propagate(seeds, wanted, missing)
        ends = [found[value] if value in found else zeros_like(copy.emit, value) for value in wanted]
        attributes[name] = copy.close([], ends)
    if missing:
        return Miss(f"in its branches: {'; '.join(missing)}")
    outputs = back.emit.many("If", [back.x(0)], len(wanted), attributes)
    for value, gradient in zip(wanted, outputs, strict=True):
        back.add(value, gradient)
    return [None] * len(back.node.inputs)


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "If": branches,
    "Loop": recurrence,
    "Scan": recurrence,
}
