"""Uses of a whole table that are no projection: penalties in the loss, and decay added to the gradient.

A dense use is a *projection* if it is multiplied with activations: its gradient is a sum over positions, as
that of the lookups is, and goes through the block. Anything else (Σ W², |W|, a norm, products of two tables,
the mean of the rows) has a gradient of its own, which no factor of the lookups describes: it is applied as it
is, by plain gradient descent at the table's learning rate. Of c·W, the gradient of c/2·Σ W², the number c is
read off, so that it can also be applied to the looked-up rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from kfac_onnx.graph.operators import SIZES, Keeps, Trait, having, keeping
from kfac_onnx.graph.values import constant, label, static_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.lookups import DenseUse
    from kfac_onnx.tables.terms import DenseTerm, RowTerm

__all__ = ["Coefficient", "Factor", "Penalties", "decay_of", "parts_of", "split_penalties"]

Kind: TypeAlias = Literal["projection", "penalty", "other"]


@dataclass(frozen=True)
class Factor:
    """A number that a coefficient is multiplied with or divided by: a value of one entry, or a constant."""

    number: ir.Value | float
    divide: bool = False


@dataclass(frozen=True)
class Coefficient:
    """The number c of a gradient c·W, as a sum of products."""

    summands: tuple[tuple[Factor, ...], ...]

    def times(self, factor: Factor) -> Coefficient:
        """Return the coefficient with one more factor in every summand."""
        return Coefficient(tuple((*each, factor) for each in self.summands))


@dataclass(frozen=True)
class Penalties:
    """Dense uses and terms of a table, told apart."""

    projections: tuple[DenseUse, ...]
    projection_terms: tuple[DenseTerm, ...]
    uses: tuple[DenseUse, ...] = ()
    terms: tuple[DenseTerm, ...] = ()


def split_penalties(
    uses: Sequence[DenseUse], terms: Sequence[DenseTerm], facts: Facts
) -> Penalties | DenseUse:
    """Tell penalties from projections; return the use that stands in the way where their terms mix."""
    kinds = {use.node: _kind(use, facts) for use in uses}
    projections = tuple(use for use in uses if kinds[use.node] == "projection")
    others = tuple(use for use in uses if kinds[use.node] != "projection")
    fixed = tuple(term for term in terms if not facts.varies(term.value))
    if not projections:
        if not others and len(fixed) < len(terms):
            return Penalties((), tuple(terms))  # a part of the gradient that belongs to no use
        return Penalties((), (), others, tuple(terms))
    mixed = next((use for use in others if kinds[use.node] == "other"), None)
    if mixed is not None:
        return mixed
    return Penalties(projections, tuple(term for term in terms if term not in fixed), others, fixed)


def _kind(use: DenseUse, facts: Facts) -> Kind:
    """Say how a use of the whole table first meets the batch: in a product, not at all, or otherwise."""
    kind: Kind = "penalty"
    stack: list[tuple[ir.Node, ir.Value]] = [(use.node, output) for output in use.node.outputs]
    seen: set[ir.Value] = set()
    while stack:
        node, value = stack.pop()
        if value in seen or not facts.is_carrying(value):
            continue
        seen.add(value)
        if facts.varies(value):
            if node.op_type in having(Trait.WEIGHTED) or node.op_type == "Mul":
                return "projection"
            kind = "other"
        elif not _is_number(value):
            stack.extend(
                (reader, output)
                for reader, _ in value.uses()
                if reader.op_type not in SIZES
                for output in reader.outputs
            )
    return kind


def _is_number(value: ir.Value) -> bool:
    shape = static_shape(value)
    return shape is not None and int(np.prod(shape)) == 1


def parts_of(terms: Sequence[DenseTerm], every: Sequence[DenseTerm | RowTerm]) -> list[ir.Value] | str:
    """Return each term as a value of the gradient's own shape, or why there is no such value.

    `every` are all terms of the gradient: a view that several of them go through holds their sum.
    """
    parts: list[ir.Value] = []
    for term in terms:
        if not term.steps:
            parts.append(term.value)
            continue
        outer = term.steps[0].node
        shared = [each for each in every if each.steps and each.steps[0].node is outer and each not in terms]
        if shared or outer.op_type in keeping(Keeps.JOINS, Keeps.SOME):
            return f"{label(outer)} is computed from it and from other parts of the gradient together"
        if outer.outputs[0] not in parts:
            parts.append(outer.outputs[0])
    return parts


def decay_of(parts: Sequence[ir.Value], weight: ir.Value) -> Coefficient | None:
    """Return c where the sum of the parts is c·W, otherwise None."""
    found = [_coefficient(part, weight) for part in parts]
    summands = tuple(summand for each in found if each is not None for summand in each.summands)
    return None if None in found or not summands else Coefficient(summands)


def _coefficient(value: ir.Value | None, weight: ir.Value) -> Coefficient | None:
    if value is weight:
        return Coefficient(((),))
    node = None if value is None else value.producer()
    if node is None or value is None:
        return None
    match node.op_type:
        case op if op in keeping(Keeps.PLACES):
            return _coefficient(node.inputs[0], weight)
        case "Neg":
            inner = _coefficient(node.inputs[0], weight)
            return None if inner is None else inner.times(Factor(-1.0))
        case "Pow":
            exponent = constant(node.inputs[1])
            one = exponent is not None and bool(np.all(exponent == 1))
            return _coefficient(node.inputs[0], weight) if one else None
        case "Mul" | "Div":
            for index in (0, 1) if node.op_type == "Mul" else (0,):
                number = _number(node.inputs[1 - index])
                inner = None if number is None else _coefficient(node.inputs[index], weight)
                if inner is not None and number is not None:
                    return inner.times(replace(number, divide=node.op_type == "Div"))
            return None
        case op if op in having(Trait.ADDS):
            terms = [_coefficient(item, weight) for item in node.inputs]
            if op == "Sub" and terms[1] is not None:
                terms[1] = terms[1].times(Factor(-1.0))
            summands = tuple(summand for each in terms if each is not None for summand in each.summands)
            return None if None in terms else Coefficient(summands)
        case _:
            return None


def _number(value: ir.Value | None) -> Factor | None:
    """Return the number that all entries of a value are."""
    while value is not None:
        if _is_number(value):
            return Factor(value)
        array = constant(value)
        if array is not None and array.size and np.all(array == array.flat[0]):
            return Factor(float(array.flat[0]))
        node = value.producer()
        if node is None or node.op_type not in keeping(Keeps.PLACES, Keeps.ORDER, Keeps.REPEATS):
            return None
        value = node.inputs[0]
    return None
