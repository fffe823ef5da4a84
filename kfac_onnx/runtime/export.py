"""Trained weights in a forward graph that other tools load.

Either cut from the training graph itself (what leads to the loss, or to outputs the user names), or put
into the user's own forward model: by name, then by the end of the name (`model.emb.weight` for
`emb.weight`), then by shape where one weight and one place are left of a shape.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.files import load_model, refuse_overwrite, save_model
from kfac_onnx.passes.partition import extract

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from kfac_onnx.passes.partition import Plan

__all__ = ["forward_model", "place_weights", "write_into"]

_log = logging.getLogger(__name__)


def forward_model(plan: Plan, values: Mapping[str, np.ndarray], outputs: Sequence[str]) -> ir.Model:
    """Return the part of the graph that leads to `outputs`, with these values as initializers.

    Raises UserError for an output that the graph does not have.
    """
    known = [name for item in plan.source.items for name in item.makes]
    for name in outputs:
        if name not in known:
            message = f"the graph has no value '{name}'{did_you_mean(name, known)}"
            raise UserError(message, help="outputs are names of values in the training graph")
    model = ir.from_proto(extract(plan, list(outputs)))
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in values]:
        graph.inputs.remove(value)
        name = str(value.name)
        value.const_value = ir.tensor(values[name], name=name)
        graph.register_initializer(value)
    for node in graph:
        for key in [key for key in node.metadata_props if key.startswith("kfac.")]:
            del node.metadata_props[key]
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(graph)}
    for domain in [domain for domain in graph.opset_imports if domain not in ("", *used)]:
        del graph.opset_imports[domain]
    return model


def _same_end(weight: str, place: str) -> bool:
    return place.endswith(f".{weight}") or weight.endswith(f".{place}")


def _any_name(weight: str, place: str) -> bool:
    return True


def place_weights(
    weights: Mapping[str, np.ndarray], places: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, str]:
    """Return which place each weight goes to; `places` maps a name to its shape and dtype.

    A weight that fits nowhere, or for which several places or rivals remain, is left out.
    """
    found: dict[str, str] = {}

    def options(weight: str, rule: Callable[[str, str], bool]) -> list[str]:
        kind = (tuple(weights[weight].shape), str(weights[weight].dtype))
        free = [place for place in places if place not in found.values() and places[place] == kind]
        return [place for place in free if rule(weight, place)]

    rules: tuple[Callable[[str, str], bool], ...] = (str.__eq__, _same_end, _any_name)
    for rule in rules:
        open_weights = [name for name in weights if name not in found]
        wishes = {name: options(name, rule) for name in open_weights}
        for name, wished in wishes.items():
            rivals = [other for other in open_weights if other != name and wished[:1] == wishes[other][:1]]
            if len(wished) == 1 and not rivals:
                found[name] = wished[0]
    return found


def write_into(weights: Mapping[str, np.ndarray], forward: str | Path, path: str | Path) -> dict[str, str]:
    """Write a copy of the user's forward model with these weights; return the place of each.

    Raises UserError when no weight fits any initializer of the model.
    """
    refuse_overwrite(path, forward)
    model = load_model(forward)
    tensors = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    places = {
        name: (tuple(tensor.shape.numpy()), str(tensor.dtype.numpy())) for name, tensor in tensors.items()
    }
    found = place_weights(weights, places)
    if not found:
        listed = ", ".join(f"'{name}' {list(array.shape)}" for name, array in weights.items())
        raise UserError(
            f"no trained parameter fits an initializer of '{forward}' by name or shape",
            help=f"trained parameters are {listed}",
        )
    for name in weights:
        if name in found:
            place = found[name]
            model.graph.initializers[place].const_value = ir.tensor(weights[name], name=place)
        else:
            _log.warning("'%s' has no place for the trained parameter '%s'", forward, name)
    save_model(model, path)
    return found
