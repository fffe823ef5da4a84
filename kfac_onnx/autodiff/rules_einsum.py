"""Gradient of Einsum: for each operand an Einsum of dY with the other operands.

Y = einsum("a, b, .. -> y"), a, b, .. and y being subscripts: dA = einsum("y, b, .. -> a"). A subscript of A
that stands nowhere else was summed over alone: dA repeats along it.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.autodiff.backward import dimensions
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import rank_of

if TYPE_CHECKING:
    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES", "read_equation"]


def read_equation(equation: str, ranks: list[int]) -> tuple[list[str], str] | Miss:
    """Return the subscripts of each operand and of the result, with letters in place of dots."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return Miss(f"the equation '{equation}' is not for {len(ranks)} operands")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(count < 0 or ("..." not in term and count) for term, count in zip(terms, hidden, strict=True)):
        return Miss(f"the equation '{equation}' does not have the ranks of its operands")
    most = max(hidden, default=0)
    if most > len(free):
        return Miss("its operands have too many axes")
    dots = "".join(free[:most])
    full = [
        term.replace("...", dots[most - count :] if count else "")
        for term, count in zip(terms, hidden, strict=True)
    ]
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    if "..." not in right and most:
        return Miss("axes under '...' that are summed over are not supported")
    result = right.replace("...", dots)
    for term in (*full, result):
        if len(set(term)) != len(term):
            return Miss("a subscript that is repeated within one operand is not supported")
    return full, result


def einsum(back: Backward) -> Gradients:
    """Einsum(X..; equation): for each operand an Einsum of dY with the others."""
    count = len(back.node.inputs)
    ranks = [rank_of(back.x(index)) for index in range(count)]
    known = [rank for rank in ranks if rank is not None]
    if len(known) != count:
        return Miss("the rank of its inputs is unknown")
    parsed = read_equation(back.node.attributes["equation"].as_string(), known)
    if isinstance(parsed, Miss):
        return parsed
    terms, result = parsed
    sizes = _sizes(back, terms)
    if isinstance(sizes, Miss):
        return sizes
    return [
        _operand(back, index, terms, result, sizes) if back.needs(index) else None for index in range(count)
    ]


def _sizes(back: Backward, terms: list[str]) -> dict[str, int | str | None] | Miss:
    """Return the dimension of each letter; that of a broadcast axis is the one that is not 1."""
    seen: dict[str, list[int | str | None]] = {}
    for index, term in enumerate(terms):
        for letter, dim in zip(term, dimensions(back.x(index)) or [], strict=True):
            seen.setdefault(letter, []).append(dim)
    equation = back.node.attributes["equation"].as_string()
    for letter, dims in seen.items():
        if letter in equation and 1 in dims and any(isinstance(dim, int) and dim != 1 for dim in dims):
            return Miss(f"the axis '{letter}' has length 1 in one operand and another length in another")
    return {letter: next((dim for dim in dims if dim != 1), 1) for letter, dims in seen.items()}


def _operand(
    back: Backward, index: int, terms: list[str], result: str, sizes: dict[str, int | str | None]
) -> ir.Value:
    emit, own, x = back.emit, terms[index], back.x(index)
    others = [term for place, term in enumerate(terms) if place != index]
    factors = [back.x(place) for place in range(len(terms)) if place != index]
    available = set(result).union(*others)
    kept = "".join(letter for letter in own if letter in available)
    equation = f"{','.join([result, *others])}->{kept}"
    if not others and result == kept:
        total = back.dy
    else:
        total = emit.op("Einsum", back.dy, *factors, equation=equation)
    alone = [place for place, letter in enumerate(own) if letter not in available]
    if alone:
        wide = emit.op("Unsqueeze", total, emit.ints(*alone))
        shape = emit.shape(x)
        ones = [emit.part(shape, at, at + 1) if at in alone else emit.ints(1) for at in range(len(own))]
        total = emit.op("Expand", wide, emit.concat(*ones))
    if total is not back.dy:
        total.shape = ir.Shape([sizes[letter] for letter in own])
        total.type = ir.TensorType(back.dtype(x))
    return back.reduce_to(total, x)


RULES: Final[dict[str | tuple[str, str], Rule]] = {"Einsum": einsum}
