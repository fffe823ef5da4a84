"""The scale of gradients that were found in updates: compared once with the loss's own derivative.

In W' = W − c·x with a constant c, data flow cannot say how much of c is a learning rate and how much
belongs to the gradient (an exporter may have folded the two). So the graph and the derivative of its loss
are run on small made-up inputs, and the gradient is scaled to the derivative where the two are parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff import differentiate
from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.errors import UserError
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import HALF_TYPES, Emitter
from kfac_onnx.graph.values import dtype_of, static_shape
from kfac_onnx.readers.optimizer_inside.host_update import OURS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Scales", "calibrate", "scaled"]

LARGEST: Final = 1 << 24
"""Entries of all parameters together above which the graph is not run."""
ROWS: Final = (3, 5, 4)
"""Size of every dimension that the graph leaves open, one per run: a factor must not depend on it."""
AGREE: Final = 2
"""Runs that must give the same factor."""
PARALLEL: Final = 1e-3
HALF_PARALLEL: Final = 5e-2
"""Relative distance within which two gradients are parallel: float32, and where halves take part."""


@dataclass(frozen=True)
class Scales:
    """`factors` maps a parameter to what its gradient is to be multiplied by; `apart` are not parallel."""

    factors: dict[str, float]
    apart: tuple[str, ...]


def calibrate(model: ir.Model, loss: ir.Value, gradients: Mapping[str, ir.Value]) -> Scales:
    """Compare gradients, by parameter, with the derivative of the loss; what cannot be compared is left out.

    The model is in standard operators, and is not changed.
    """
    sizes = [static_shape(value) or () for value in (*model.graph.inputs, *model.graph.initializers.values())]
    if not gradients or sum(int(np.prod(shape)) for shape in sizes) > LARGEST:
        return Scales({}, ())
    copy = ir.from_proto(ir.to_proto(model))
    known = {str(value.name): value for node in copy.graph for value in node.outputs}
    held = {str(value.name): value for value in copy.graph.inputs} | dict(copy.graph.initializers)
    try:
        copy.graph.sort()
        made = differentiate(copy, known[str(loss.name)], [held[name] for name in gradients])
    except (UserError, KeyError):
        return Scales({}, ())
    pairs = {name: (known[str(value.name)], made[held[name]]) for name, value in gradients.items()}
    half = any(dtype_of(value) in HALF_TYPES for value in known.values())
    ratios: dict[str, list[float]] = {name: [] for name in gradients}
    for found in _runs(copy, pairs):
        for name, (own, derivative) in found.items():
            ratio = _ratio(own, derivative, HALF_PARALLEL if half else PARALLEL)
            if ratio is not None:
                ratios[name].append(ratio)
    factors: dict[str, float] = {}
    apart: list[str] = []
    for name, seen in ratios.items():
        if len(seen) >= AGREE:
            same = all(ratio and abs(ratio / seen[0] - 1.0) < PARALLEL for ratio in seen)
            factors.update({name: seen[0]} if same else {})
            apart += [] if same else [name]
    return Scales(factors, tuple(apart))


def scaled(model: ir.Model, gradient: ir.Value, factor: float) -> ir.Value:
    """Return a gradient times a number, as the output that it was."""
    node = gradient.producer()
    if node is None:
        raise AssertionError("a gradient is computed")
    emit = Emitter.in_place_of(Context.of(model), node, "gradient")
    result = emit.op("Mul", gradient, emit.scalar(factor, dtype_of(gradient) or ir.DataType.FLOAT))
    result.type, result.shape = gradient.type, gradient.shape
    emit.nodes[0].metadata_props.pop("kfac.lowered", None)
    emit.nodes[0].metadata_props[OURS] = str(gradient.name)
    model.graph.extend(emit.nodes)
    outputs = model.graph.outputs
    for index, value in enumerate(outputs):
        if value is gradient:
            outputs[index] = result
    return result


def _ratio(own: np.ndarray, derivative: np.ndarray, tolerance: float) -> float | None:
    """Return k with derivative = k·own; 0 if there is none, None if it cannot be told."""
    x, g = own.astype(np.float64).reshape(-1), derivative.astype(np.float64).reshape(-1)
    if x.shape != g.shape or not (np.all(np.isfinite(x)) and np.all(np.isfinite(g))):
        return None
    if not np.any(x) or not np.any(g):
        return None
    factor = float(x @ g / (x @ x))
    if np.linalg.norm(g - factor * x) > tolerance * np.linalg.norm(g):
        return 0.0
    return 1.0 if abs(factor - 1.0) < tolerance else float(f"{factor:.5g}")


def _runs(
    model: ir.Model, pairs: Mapping[str, tuple[ir.Value, ir.Value]]
) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Run a model a few times on made-up inputs; no result where onnxruntime cannot."""
    import onnxruntime

    graph = model.graph
    wanted = list(dict.fromkeys(value for pair in pairs.values() for value in pair))
    graph.outputs.clear()
    for value in wanted:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1)
        node.outputs[0].name = f"calibrated/{value.name}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    results: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    try:
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for draw, size in enumerate(ROWS):
            arrays = session.run(None, _made_up(graph, size, np.random.default_rng(draw)))
            found = {id(value): array for value, array in zip(wanted, arrays, strict=True)}
            results.append({name: (found[id(a)], found[id(b)]) for name, (a, b) in pairs.items()})
    except Exception as e:  # it may refuse made-up inputs
        if not from_onnxruntime(e):
            raise
        return results
    return results


def _made_up(graph: ir.Graph, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return an array for every input: numbers around zero, and ids, labels and counts of zero and one."""
    feed: dict[str, np.ndarray] = {}
    for value in graph.inputs:
        if value.name in graph.initializers:
            continue
        dims = [dim if isinstance(dim, int) else size for dim in (value.shape or ())]
        dtype = (dtype_of(value) or ir.DataType.FLOAT).numpy()
        if (dtype_of(value) or ir.DataType.FLOAT).is_floating_point():
            array = rng.standard_normal(dims) * 0.5
        else:
            array = rng.integers(0, 2, dims)
        feed[str(value.name)] = np.asarray(array).astype(dtype)
    return feed
