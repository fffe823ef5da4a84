"""Which value is the gradient of which parameter.

In this order: what the user says; what the reader found in the interface; as a last resort, position with
a check of every shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.errors import NoGradientsError, UserError, did_you_mean
from kfac_onnx.graph.values import dtype_of, is_float, static_shape
from kfac_onnx.metadata import Parameter, Refusal
from kfac_onnx.readers.pair_by_flow import FlowPairs, owners_by_flow, pair_by_flow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.readers.interface import Interface

__all__ = ["Pairing", "candidates", "find_value", "named_values", "pair", "parameter_of"]


@dataclass(frozen=True)
class Pairing:
    """Trained parameters (values of the graph) with their gradients, in the order of the graph."""

    parameters: dict[str, ir.Value]
    gradients: dict[str, ir.Value]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    orphans: tuple[str, ...] = ()
    """Gradients of parameters that are gone."""

    def described(self) -> list[Parameter]:
        """Return what `kfac.parameters` says of them."""
        return [parameter_of(value, self.gradients[name].name) for name, value in self.parameters.items()]


def parameter_of(value: ir.Value, gradient: str | None) -> Parameter:
    """Return what `kfac.parameters` says of one parameter."""
    dtype = dtype_of(value) or ir.DataType.FLOAT
    return Parameter(str(value.name), static_shape(value) or (), str(dtype.numpy()), gradient)


def candidates(model: ir.Model) -> dict[str, ir.Value]:
    """Return what may be a parameter: float inputs, then float initializers, by name."""
    found = {value.name: value for value in model.graph.inputs if value.name and is_float(value)}
    found.update(
        {
            name: value
            for name, value in model.graph.initializers.items()
            if name not in found and is_float(value)
        }
    )
    return found


def named_values(model: ir.Model) -> dict[str, ir.Value]:
    """Return the outputs of nodes and the graph's outputs by name."""
    found = {str(value.name): value for node in model.graph for value in node.outputs if value.name}
    found.update((str(value.name), value) for value in model.graph.outputs)
    return found


def find_value(
    model: ir.Model, name: str, what: str, place: str | None, values: Mapping[str, ir.Value] | None = None
) -> ir.Value:
    """Return the graph output, or else any value, with this name; `values` are `named_values`, if at hand.

    Raises:
        UserError: if there is none.

    """
    found = (named_values(model) if values is None else values).get(name)
    if found is not None:
        return found
    known = [value.name for value in model.graph.outputs if value.name]
    raise UserError(
        f"the graph has no value '{name}', given as {what}{did_you_mean(name, known)}",
        place=place,
        help=f"its outputs are {', '.join(known)}",
    )


def pair(
    model: ir.Model,
    interface: Interface,
    losses: Sequence[ir.Value],
    chosen: Mapping[str, str] | None,
    place: str | None,
) -> Pairing:
    """Return the trained parameters and their gradients; the shapes of each pair agree.

    Raises:
        UserError: if a name that the user gave is unknown, or a gradient's shape is not its parameter's.

    """
    known, values = candidates(model), named_values(model)
    gradients = {
        name: find_value(model, output, f"the gradient of '{name}'", place, values)
        for name, output in interface.gradients.items()
    }
    notes: list[str] = []
    for name, output in (chosen or {}).items():
        if name not in known:
            raise UserError(
                f"the graph has no parameter '{name}', given in the gradients{did_you_mean(name, known)}",
                place=place,
            )
        gradients[name] = find_value(model, output, f"the gradient of '{name}'", place, values)
    orphans = dict(interface.orphans)
    if not gradients and interface.by_position:
        found, how = _by_position(model, losses), "position and shape"
        if found is None:
            pairs, how = _by_flow(model, losses, place), "the flow of data"
            orphans |= {_owner_of(output): output for output in pairs.gone}
            found = pairs.found
        else:
            notes += _checked_positions(model, losses, found, place)
        gradients = found
        notes.append(f"paired {len(gradients)} gradients with parameters by {how}")
    taken = {value.name for value in gradients.values()}
    refused = tuple(
        Refusal(
            parameter=name,
            path=f"gradient output {output}",
            reason="its gradient is computed, but the parameter is gone: the exporter folded it away",
            remedy="export without constant folding (torch.onnx.export(..., optimize=False)) "
            "or with the parameters as inputs",
        )
        for name, output in orphans.items()
        if output not in taken
    )
    ordered = {name: gradients[name] for name in known if name in gradients}
    fed = [name for name in ordered if name not in (chosen or {}) and _varies(known[name])]
    if fed and len(fed) < len(ordered):
        notes += [
            f"'{ordered[name].name}' is the gradient of the batch input '{name}', not used" for name in fed
        ]
        ordered = {name: value for name, value in ordered.items() if name not in fed}
    for name, gradient in ordered.items():
        _check_shapes(known[name], gradient, place)
    gone = tuple(output for output in orphans.values() if output not in taken)
    return Pairing({name: known[name] for name in ordered}, ordered, refused, tuple(notes), gone)


def _varies(value: ir.Value) -> bool:
    """Say whether a value is an input with a dimension that the graph leaves open, as a batch has one."""
    return value.is_graph_input() and value.const_value is None and static_shape(value) is None


def _check_shapes(parameter: ir.Value, gradient: ir.Value, place: str | None) -> None:
    own, other = static_shape(parameter), static_shape(gradient)
    if own is None:
        raise UserError(f"the shape of the parameter '{parameter.name}' is not static", place=place)
    if other is not None and own != other:
        raise UserError(
            f"the gradient '{gradient.name}' has shape {list(other)}, "
            f"but its parameter '{parameter.name}' has shape {list(own)}",
            place=place,
        )


def _by_position(model: ir.Model, losses: Sequence[ir.Value]) -> dict[str, ir.Value] | None:
    outputs = [value for value in model.graph.outputs if is_float(value) and value not in losses]
    inputs = [value for value in model.graph.inputs if is_float(value)][: len(outputs)]
    pairs = zip(map(static_shape, inputs), map(static_shape, outputs), strict=False)
    same = [own is not None and own == other for own, other in pairs]
    if not outputs or len(inputs) < len(outputs) or not all(same):
        return None
    return {str(value.name): output for value, output in zip(inputs, outputs, strict=True)}


def _checked_positions(
    model: ir.Model, losses: Sequence[ir.Value], pairs: Mapping[str, ir.Value], place: str | None
) -> list[str]:
    """Return a note on what position alone decided between parameters of one shape.

    Raises:
        UserError: if the flow of data says that a gradient belongs to another parameter.

    """
    owners = owners_by_flow(model, losses[0], pairs) if losses else {}
    for name, others in owners.items():
        # What else may look like another's gradient is a sum with it; that one then has its own.
        if others and name not in others and all(item not in owners[item] for item in others):
            raise UserError(
                f"by position '{pairs[name].name}' is the gradient of '{name}', "
                f"but it is made as that of {_either(others)}",
                place=place,
                help="name the pairs with --gradients PARAMETER=OUTPUT",
            )
    unsure = [name for name, others in owners.items() if others != [name]]
    if not unsure:
        return []
    return [f"position alone tells the gradients of {', '.join(unsure)}: `verify` checks them"]


def _by_flow(model: ir.Model, losses: Sequence[ir.Value], place: str | None) -> FlowPairs:
    pairs = pair_by_flow(model, losses[0]) if losses else FlowPairs()
    tried = ["by name: no output is called <parameter>_grad", "by position: the shapes differ"]
    tried += [
        f"by the flow of data: '{output}' could belong to {_either(owners)}"
        for output, owners in pairs.unsure.items()
    ] or ["by the flow of data: no output is made as the gradient of a parameter is"]
    if pairs.unsure or not pairs.found:
        raise NoGradientsError(
            "the graph does not say which outputs are the gradients of which parameters",
            place=place,
            tried=tried,
            help="name the pairs with --gradients PARAMETER=OUTPUT, or export the gradients as outputs",
        )
    return pairs


def _owner_of(output: str) -> str:
    """Return how to call the parameter of which nothing but the gradient is left."""
    name = output.removesuffix("_grad")
    return f"parameter of {output}" if name == output else name


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names[:4]) + (" or others" if len(names) > 4 else "")
