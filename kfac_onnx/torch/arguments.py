"""What a module is called with: the tensors that become inputs of the graph, with names and free dimensions.

A call has positional arguments (a sequence of example inputs) or keyword arguments (a mapping). Each may be a
tensor or nested lists, tuples and dicts of tensors: every tensor is one input, `batch` or `batch.user` by
where it lies. A mapping may also hold constants (None, numbers, texts), which every call gets.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kfac_onnx.errors import UserError, did_you_mean

__all__ = ["Call", "Freedom", "call_of"]

Freedom = dict[int, Any]
"""Axis -> `torch.export.Dim` or one of its hints; an axis that is not there is fixed."""

_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Call:
    """How to call a module with a flat list of tensors."""

    names: list[str]
    tensors: list[torch.Tensor]
    free: list[Freedom]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    """The example's own nested arguments, each tensor replaced by a `_Place`."""

    def filled(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with these tensors in the places of the example's."""
        return tuple(_filled(value, tensors) for value in self.arguments), {
            name: _filled(value, tensors) for name, value in self.keywords.items()
        }

    def symbols(self) -> dict[tuple[str, int], str]:
        """Return the names of the caller's dimensions (`torch.export.Dim("length")`), by input and axis."""
        return {
            (name, axis): str(dimension.__name__)
            for name, freedom in zip(self.names, self.free, strict=True)
            for axis, dimension in freedom.items()
            if isinstance(dimension, type) or hasattr(dimension, "__name__")
        }


@dataclass(frozen=True)
class _Place:
    position: int


def _filled(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.position]
    if isinstance(value, dict):
        return {key: _filled(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_filled(entry, tensors) for entry in value])
    return value


def call_of(
    module: torch.nn.Module,
    example: Sequence[Any] | Mapping[str, Any],
    *,
    dynamic_batch: bool,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    input_names: Sequence[str] | None,
) -> Call:
    """Return the call of a module on example inputs.

    `dynamic_shapes` has an entry for each argument, by name or by position, as `torch.export.export` takes
    it: `{axis: torch.export.Dim(...)}`, a sequence with one entry per axis, or None where all is fixed. An
    argument that a mapping leaves out keeps its first dimension free if `dynamic_batch`.

    Raises `UserError` for an input that is no tensor, for one example only where the batch is to stay free,
    and for entries of `dynamic_shapes` that belong to no argument or do not have its form.
    """
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"a {type(module).__name__} is no torch.nn.Module",
            help="put it into the forward of a module that holds its parameters",
        )
    if isinstance(example, torch.Tensor):
        raise UserError(
            "example_inputs is one tensor, not a sequence or mapping of tensors",
            help="pass (tensor,), or {'name': tensor} by the name of forward's argument",
        )
    if isinstance(example, Mapping):
        values = dict(example)
    else:
        values = dict(zip(_argument_names(module, len(example)), example, strict=True))
    flat = _Flat(dynamic_batch, default=not isinstance(example, Mapping))
    shapes = _shapes_by_name(list(values), dynamic_shapes)
    nested = {
        name: flat.add(name, value, shapes.get(name, _UNSAID))
        for name, value in values.items()
        if not (isinstance(example, Mapping) and isinstance(value, _CONSTANTS))
    }
    constants = {name: value for name, value in values.items() if name not in nested}
    positional = not isinstance(example, Mapping)
    if not flat.tensors:
        raise UserError("there is no tensor among the example inputs", help="pass at least one")
    names = flat.names
    if input_names is not None:
        if len(input_names) != len(names):
            raise UserError(f"there are {len(input_names)} input_names for {len(names)} example inputs")
        names = list(input_names)
    return Call(
        names=names,
        tensors=_apart(flat.tensors),
        free=flat.free,
        arguments=tuple(nested.values()) if positional else (),
        keywords={} if positional else {name: (nested | constants)[name] for name in values},
    )


def _apart(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors with a copy of each that comes again: a trace takes one object for one input."""
    seen: set[int] = set()
    apart: list[torch.Tensor] = []
    for tensor in tensors:
        apart.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return apart


_UNSAID: Any = object()


class _Flat:
    """Collects tensors of nested arguments, with names and freedoms."""

    def __init__(self, dynamic_batch: bool, *, default: bool) -> None:
        self.dynamic_batch = dynamic_batch
        self.by_position = default
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.free: list[Freedom] = []

    def add(self, name: str, value: Any, shapes: Any) -> Any:
        """Return `value` with places for its tensors, and collect them."""
        if isinstance(value, torch.Tensor):
            self.names.append(name)
            self.tensors.append(value)
            self.free.append(self._freedom(value, shapes))
            return _Place(len(self.tensors) - 1)
        if isinstance(value, Mapping) and value:
            return {
                key: self.add(f"{name}.{key}", entry, _part(name, shapes, key))
                for key, entry in value.items()
            }
        if isinstance(value, (list, tuple)) and value:
            parts = [
                self.add(f"{name}.{place}", entry, _part(name, shapes, place))
                for place, entry in enumerate(value)
            ]
            return parts if isinstance(value, list) else tuple(parts)
        raise UserError(
            f"{self._shown(name)} is of type {type(value).__name__}, not a tensor",
            help="pass tensors, and let the module hold whatever is constant",
        )

    def _shown(self, name: str) -> str:
        return f"example input {len(self.tensors)}" if self.by_position else f"example input '{name}'"

    def _freedom(self, tensor: torch.Tensor, shapes: Any) -> Freedom:
        shown = (
            f"example input {len(self.tensors) - 1}"
            if self.by_position
            else f"example input '{self.names[-1]}'"
        )
        if shapes is _UNSAID:
            if not self.dynamic_batch:
                return {}
            if tensor.ndim == 0:
                raise UserError(
                    f"{shown} is a scalar, which has no batch dimension",
                    help="give it a first dimension, or pass dynamic_batch=False",
                )
            shapes = {0: torch.export.Dim.DYNAMIC}
        elif shapes is None:
            return {}
        elif isinstance(shapes, (list, tuple)):
            shapes = dict(enumerate(shapes))
        if not isinstance(shapes, Mapping) or any(not isinstance(axis, int) for axis in shapes):
            raise UserError(
                f"the entry of dynamic_shapes for '{self.names[-1]}' is no mapping of axes to dimensions",
                help="such as {0: torch.export.Dim.DYNAMIC}, or None where all dimensions are fixed",
            )
        free = {
            axis: size
            for axis, size in shapes.items()
            if size is not None and size is not torch.export.Dim.STATIC and not isinstance(size, int)
        }
        for axis in shapes:
            if not 0 <= axis < tensor.ndim:
                raise UserError(
                    f"dynamic_shapes names axis {axis} of '{self.names[-1]}', which has {tensor.ndim}",
                    help="axes are counted from 0",
                )
        for axis in free:
            if tensor.shape[axis] < 2:
                along = "its first dimension" if axis == 0 else f"axis {axis}"
                batch = " the batch" if axis == 0 else " it"
                raise UserError(
                    f"{shown} has {tensor.shape[axis]} along {along}, which would fix{batch}",
                    help="pass two examples or more, or dynamic_batch=False"
                    if axis == 0
                    else "pass an example of length two or more",
                )
        return free


def _part(name: str, shapes: Any, key: Any) -> Any:
    """Return what `dynamic_shapes` says of one part of a nested argument."""
    if shapes is _UNSAID or shapes is None:
        return shapes
    if isinstance(shapes, Mapping) and key in shapes:
        return shapes[key]
    if isinstance(shapes, (list, tuple)) and isinstance(key, int) and key < len(shapes):
        return shapes[key]
    raise UserError(
        f"dynamic_shapes says nothing of '{name}.{key}'",
        help=f"give the entry of '{name}' the form of the argument itself",
    )


def _shapes_by_name(names: list[str], shapes: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, Any]:
    if shapes is None:
        return {}
    if isinstance(shapes, Mapping):
        for name in shapes:
            if name not in names:
                raise UserError(
                    f"dynamic_shapes names '{name}', which is no example input"
                    f"{did_you_mean(str(name), names)}",
                    help=f"example inputs are {', '.join(map(repr, names))}",
                )
        return dict(shapes)
    if len(shapes) != len(names):
        raise UserError(f"dynamic_shapes has {len(shapes)} entries for {len(names)} example inputs")
    return dict(zip(names, shapes, strict=True))


def _argument_names(module: torch.nn.Module, count: int) -> list[str]:
    """Return the names of the first arguments of `forward`, then `input_<position>`."""
    arguments = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [argument.name for argument in arguments if argument.kind in plain][:count]
    return names + [f"input_{position}" for position in range(len(names), count)]
