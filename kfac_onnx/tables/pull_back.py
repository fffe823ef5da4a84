"""Pulls the views between a scatter and a gradient back over the scattered rows.

With S = scatter(ids, rows) and gradient = view(S), linear views act on rows alone: a scaling scales the
rows, a slice of rows drops ids outside of its window and shifts the others, a transpose changes only how
the parameter stores the table. What is left is `Pulled`: row operations and the table's layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kfac_onnx.graph.operators import Keeps, keeping
from kfac_onnx.graph.values import static_shape
from kfac_onnx.tables.terms import RowStep

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.terms import DenseTerm, RowTerm, ViewStep

__all__ = ["Miss", "Pulled", "pull", "pull_whole"]

Layout = Literal["rows", "columns", "flat"]


@dataclass(frozen=True)
class Miss:
    """Why something did not match: a clause that reads after "because"."""

    reason: str
    at: ir.Node | None = None


@dataclass(frozen=True)
class Pulled:
    """A row term in the parameter's own coordinates."""

    layout: Layout
    vocab_size: int
    embedding_dim: int
    steps: tuple[RowStep, ...] = ()

    def then(self, step: RowStep) -> Pulled:
        """Append an operation on the rows."""
        return replace(self, steps=(*self.steps, step))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the parameter that stores this table."""
        match self.layout:
            case "rows":
                return (self.vocab_size, self.embedding_dim)
            case "columns":
                return (self.embedding_dim, self.vocab_size)
            case "flat":
                return (self.vocab_size * self.embedding_dim,)


def pull(term: RowTerm, weight_shape: tuple[int, ...]) -> Pulled | Miss:
    """Pull the views of a row term back over its rows, for a parameter stored as `weight_shape`."""
    shape = term.shape
    if len(shape) == 1:
        start = Pulled("flat", shape[0], 1)
    elif term.axis == 0:
        start = Pulled("rows", shape[0], shape[1])
    else:
        start = Pulled("columns", shape[1], shape[0])
    return _apply(start, term.steps, weight_shape)


def pull_whole(term: DenseTerm, weight_shape: tuple[int, ...]) -> Pulled | Miss:
    """As `pull`, for a dense term that is all rows of a table in order (a position table read whole)."""
    shape = static_shape(term.value)
    if shape is None or len(shape) < 2 or any(dim != 1 for dim in shape[:-2]):
        return Miss("the dense gradient is not one row per table row", term.value.producer())
    return _apply(Pulled("rows", shape[-2], shape[-1]), term.steps, weight_shape)


def _apply(state: Pulled, steps: tuple[ViewStep, ...], weight_shape: tuple[int, ...]) -> Pulled | Miss:
    for step in reversed(steps):
        following = _apply_one(state, step)
        if isinstance(following, Miss):
            return following
        state = following
    if state.stored_shape == weight_shape:
        return state
    if state.layout != "flat" and state.embedding_dim == 1 and weight_shape == (state.vocab_size,):
        return replace(state, layout="flat")
    if state.layout == "flat" and state.embedding_dim == 1 and weight_shape == (state.vocab_size, 1):
        return replace(state, layout="rows")
    return Miss(f"its gradient has the shape {list(state.stored_shape)}, the parameter {list(weight_shape)}")


def _apply_one(state: Pulled, step: ViewStep) -> Pulled | Miss:
    match step.kind:
        case op if op in keeping(Keeps.PLACES):
            return state
        case "Neg":
            return state.then(RowStep("negate"))
        case "Transpose":
            return _transpose(state, step)
        case op if op in keeping(Keeps.ORDER):
            return _reshape(state, step)
        case "Mul" | "Div":
            return _scale(state, step)
        case "Slice" | "Pad":
            return _window(state, step)
        case other:
            return Miss(f"{other} between the scatter and the gradient is not a view", step.node)


def _transpose(state: Pulled, step: ViewStep) -> Pulled | Miss:
    perm = step.node.attributes.get("perm")
    rank = len(step.node.inputs[0].shape or ()) if step.node.inputs[0] is not None else 0
    order = list(perm.as_ints()) if perm is not None else list(range(rank))[::-1]
    if order == sorted(order):
        return state
    if order != [1, 0] or state.layout == "flat":
        return Miss("a Transpose of more than two axes lies between the scatter and the gradient", step.node)
    return replace(state, layout="columns" if state.layout == "rows" else "rows")


def _reshape(state: Pulled, step: ViewStep) -> Pulled | Miss:
    shape = static_shape(step.node.outputs[0])
    if shape is None:
        return Miss("a Reshape to an unknown shape lies between the scatter and the gradient", step.node)
    if _squeezed(shape) == _squeezed(state.stored_shape):
        if state.layout == "flat" and state.embedding_dim == 1 and len(shape) == 2:
            return replace(state, layout="rows" if shape[1] == 1 else "columns")
        return state
    size = state.vocab_size * state.embedding_dim
    if state.layout == "rows" and shape == (size,):
        return replace(state, layout="flat")
    if state.layout == "flat" and shape == (state.vocab_size, state.embedding_dim):
        return replace(state, layout="rows")
    return Miss("a Reshape between the scatter and the gradient mixes rows", step.node)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dim for dim in shape if dim != 1)


def _scale(state: Pulled, step: ViewStep) -> Pulled | Miss:
    shape = static_shape(step.operand)
    divide = step.kind == "Div"
    if shape is None:
        return Miss("the table is scaled by something of unknown shape", step.node)
    if all(dim == 1 for dim in shape):
        return state.then(RowStep("scale", step.operand, divide))
    full = (1,) * (2 - len(shape)) + shape
    if len(full) == 2 and state.layout != "flat":
        across, along = (1, 0) if state.layout == "rows" else (0, 1)
        if full[along] == 1 and full[across] == state.embedding_dim:
            return state.then(RowStep("scale", step.operand, divide))
        if full[across] == 1 and full[along] == state.vocab_size:
            return state.then(RowStep("scale-rows", step.operand, divide))
    return Miss("the table is scaled element by element", step.node)


def _window(state: Pulled, step: ViewStep) -> Pulled | Miss:
    if step.window is None:
        return Miss(f"the {step.kind} has bounds that are not constant", step.node)
    axis, start, stop = step.window
    row_axis = 1 if state.layout == "columns" else 0
    if state.layout == "flat" and state.embedding_dim != 1:
        return Miss(f"a {step.kind} of a flat table cuts rows", step.node)
    if step.kind == "Pad":
        if start == stop == 0:
            return state
        if axis != row_axis:
            return Miss("a Pad of the table's columns lies between the scatter and the gradient", step.node)
        padded = replace(state, vocab_size=state.vocab_size + start + stop)
        return padded.then(RowStep("shift", start=start)) if start else padded
    if axis == row_axis:
        return replace(state, vocab_size=stop - start).then(RowStep("window", start=start, stop=stop))
    return replace(state, embedding_dim=stop - start).then(RowStep("columns", start=start, stop=stop))
