"""Trained weights in a forward graph that other tools load.

Either cut from the training graph itself (what leads to the loss, or to outputs the user names), or put
into the user's own forward model: by name, then by the end of the name (`model.emb.weight` for
`emb.weight`), then by shape where one weight and one place are left of a shape and it cannot be the transpose
of another. Copies and transposes that an exporter folded out of a weight get the trained one too; where one
may have been folded and cannot be told, nothing is written.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.disk.atomic import atomic_path
from kfac_onnx.disk.models import load_model, refuse_overwrite, save_model
from kfac_onnx.disk.stored import write_safetensors
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.graph.lifting import lift_constants
from kfac_onnx.step.plan import extract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kfac_onnx.step.plan import Plan

__all__ = ["filled", "forward_model", "place_weights", "require_format", "write_into", "write_weights"]

_OTHER_FORMATS: Final = frozenset({".bin", ".ckpt", ".csv", ".h5", ".npy", ".npz", ".parquet", ".pt", ".pth"})
"""Names that promise what `export` does not write."""

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


Kind = tuple[tuple[int, ...], str]
"""Shape and dtype."""


def _certain(kind: Kind, others: Iterable[Kind]) -> bool:
    """Say whether a shape alone tells which way round a matrix lies: exporters fold transposes."""
    shape, dtype = kind
    return len(shape) < 2 or (shape != shape[::-1] and (shape[::-1], dtype) not in set(others))


def _kind(array: np.ndarray) -> Kind:
    return tuple(array.shape), str(array.dtype)


def place_weights(weights: Mapping[str, np.ndarray], places: Mapping[str, Kind]) -> dict[str, str]:
    """Return which place each weight goes to; `places` maps a name to its shape and dtype.

    A weight that fits nowhere, or for which several places or rivals remain, is left out.
    """
    found: dict[str, str] = {}
    kinds = {name: _kind(array) for name, array in weights.items()}

    def options(weight: str, rule: Callable[[str, str], bool]) -> list[str]:
        free = [place for place in places if place not in found.values()]
        if rule is _any_name:
            others = [places[place] for place in free] + [kinds[name] for name in kinds if name not in found]
            if not _certain(kinds[weight], others):
                return []
        return [place for place in free if places[place] == kinds[weight] and rule(weight, place)]

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

    Raises UserError as `filled`, and when the place cannot be written.
    """
    refuse_overwrite(path, forward)
    model, found = filled(weights, forward)
    save_model(model, path)
    return found


def require_format(path: str | Path) -> None:
    """Raise UserError for the name of a file in a format that `export` does not write."""
    suffix = Path(path).suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise UserError(
            f"weights are not written as {suffix} files: '{path}'",
            help="end it in .safetensors for the weights alone, or in .onnx for a model with them",
        )


def write_weights(weights: Mapping[str, np.ndarray], path: str | Path) -> dict[str, str]:
    """Write the weights alone, as a safetensors file with their own names; return these.

    Raises UserError when the place cannot be written.
    """
    with atomic_path(path) as temporary:
        write_safetensors(
            temporary, {name: np.ascontiguousarray(array) for name, array in weights.items()}, {}
        )
    return {name: name for name in weights}


def filled(weights: Mapping[str, np.ndarray], forward: str | Path) -> tuple[ir.Model, dict[str, str]]:
    """Return the user's forward model with these weights, and the place of each.

    Raises UserError when no weight fits any initializer of the model, or when one that fits none may be
    in it under another name, so that the model would be trained in part.
    """
    model = load_model(forward)
    lift_constants(model)
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
    copies = [copy for name in found for copy in _copies(name, weights[name], found, tensors)]
    taken = {*found.values(), *(place for place, _ in copies)}
    for name in (name for name in weights if name not in found):
        shape, dtype = _kind(weights[name])
        for place, (other, kind) in places.items():
            if place not in taken and kind == dtype and len(shape) > 1 and sorted(other) == sorted(shape):
                raise UserError(
                    f"trained parameter '{name}' {list(shape)} is no initializer of '{forward}' by name, but "
                    f"'{place}' {list(other)} may be what an exporter made of it",
                    help="export the forward model with its parameters unfolded: do_constant_folding=False, "
                    "or optimize=False with dynamo=True",
                )
        if weights[name].dtype.kind not in "iub":  # a counter of batches is in no forward graph
            _log.warning("'%s' has no place for the trained parameter '%s'", forward, name)
    for place, array in [*((place, weights[name]) for name, place in found.items()), *copies]:
        model.graph.initializers[place].const_value = ir.tensor(array, name=place)
    return model, found


def _copies(
    name: str,
    weight: np.ndarray,
    found: Mapping[str, str],
    tensors: Mapping[str, ir.TensorProtocol],
) -> list[tuple[str, np.ndarray]]:
    """Return the other initializers that hold what the weight's place held, or its transpose, renewed."""
    old = tensors[found[name]]
    shape, dtype = tuple(old.shape.numpy()), str(old.dtype.numpy())
    free = {
        place: tensor.numpy()
        for place, tensor in tensors.items()
        if place not in found.values()
        and str(tensor.dtype.numpy()) == dtype
        and tuple(tensor.shape.numpy()) in (shape, shape[::-1])
    }
    if len(shape) < 2 or not free or not weight.size:
        return []
    held = old.numpy()
    if (held == held.flat[0]).all():  # equal zeros or ones say nothing
        return []
    made = [(place, weight) for place, array in free.items() if np.array_equal(array, held)]
    turned = [
        (place, np.ascontiguousarray(weight.T))
        for place, array in free.items()
        if not np.array_equal(array, held) and np.array_equal(array, held.T)
    ]
    return made + turned
