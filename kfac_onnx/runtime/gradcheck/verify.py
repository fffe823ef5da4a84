"""Is each gradient of a training graph the gradient of its loss? Checked by finite differences.

For a parameter W with gradient g, and a direction v over W's entries (a row that the graph means to drop,
`padding_idx`, stays still):

    found    = <g, v>
    expected = (loss(W + h v) - loss(W - h v)) / (2 h)
    error    = |found - expected| / |g|                     entries of v have size 1

Two directions are tried, along g (a wrong scale shows) and a random one (a missing part shows), and the
larger error counts. The loss runs in float64 where its operators can be had in float64, else in float32
with a longer step and a tolerance that allows for rounding. In float32 the curvature of the loss shows in
the difference of the slopes d(h) and d(2h): it is taken off, (4 d(h) - d(2h)) / 3 being exact to h⁴, and
the step is halved where it is large. Where the loss has a kink, as ReLU at 0, any slope between those on
its two sides is right in float64; in float32 the verdict is `unclear` there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.device.providers import provider_list
from kfac_onnx.errors import UserError
from kfac_onnx.graph.values import ancestors
from kfac_onnx.metadata import IdCheck, Loss, Parameter, Site, Vocabulary
from kfac_onnx.runtime.feed.batches import BatchInput, checked_batch
from kfac_onnx.runtime.feed.ids import check_ids
from kfac_onnx.runtime.gradcheck.derivative import (
    add_linear_loss,
    boundary_gradients,
    graph_gradients,
    open_loss,
)
from kfac_onnx.runtime.gradcheck.float_type import narrowest

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    import onnx

    from kfac_onnx.device.providers import GivenProviders
    from kfac_onnx.runtime.gradcheck.derivative import LossFunction

__all__ = ["GradientCheck", "verify_gradients"]

Array = np.ndarray[Any, np.dtype[Any]]
Status = Literal["ok", "wrong", "unclear", "skipped"]

_STEP: Final = {"DOUBLE": 1e-6, "FLOAT": 1e-6, "FLOAT16": 1e-3, "BFLOAT16": 1e-2}
"""h in units of W's root mean square, by the narrowest type that the graph computes in: longer than its
rounding, which decides on which side of a kink the graph is."""
_STEP_FLOAT32: Final = 1e-2
"""The same where the loss runs in float32: rounding is eps·loss/h."""
_TOLERANCE: Final = {"DOUBLE": 1e-6, "FLOAT": 2e-3, "FLOAT16": 5e-2, "BFLOAT16": 2e-1}
"""What the graph's own arithmetic may lose of a gradient, by the same type."""
_TOLERANCE_FLOAT32: Final = 5e-3
_UNCLEAR: Final = 0.25
"""A tolerance above this says nothing."""
_HALVINGS: Final = 4
"""How often the step of a loss in float32 is halved where the loss bends along it."""
_BENT: Final = 2.0
"""The loss bends where steps of h and 2h differ by more than so many tolerances."""
_ESTIMATE: Final = "QuantizeLinear rounds it: the loss is a staircase, and its gradient an estimate"
_WRONG: Final = "it is not the gradient of the loss"


@dataclass(frozen=True)
class GradientCheck:
    """The verdict on one parameter. `error` and `tolerance` are relative; `why` explains all but `ok`."""

    parameter: str
    gradient: str | None
    status: Status
    error: float | None
    tolerance: float | None
    arithmetic: Literal["float64", "float32"]
    why: str = ""


def verify_gradients(
    model: ir.Model,
    batch: Mapping[str, Array],
    *,
    parameters: Mapping[str, Array] | None = None,
    sites: Iterable[Site] = (),
    id_checks: Iterable[IdCheck] = (),
    providers: GivenProviders = ("CPUExecutionProvider",),
    seed: int = 0,
) -> list[GradientCheck]:
    """Return a verdict on each trained parameter of a canonical training graph.

    Where the loss lies outside the graph, the loss Σ prediction · v is taken, whose gradient with respect to
    the prediction is v: the batch's own, or a random one where the batch has none.

    Args:
        model: as `read_training_graph` returns it; not changed.
        batch: one batch by input name.
        parameters: values of parameters and constants that the graph takes as inputs.
        sites: the tables, for their padding rows.
        id_checks: which batch inputs are ids of which table; a gradient means nothing for ids out of range.
        providers: ONNX Runtime's execution providers that run the graph; its loss runs on the CPU.
        seed: of the random directions.

    Raises:
        UserError: a value is missing, the batch does not fit, an id is no row of its table, the graph has no
            loss, or it is random or not finite.

    """
    ready = provider_list(providers)
    loss = metadata.read(model, "loss", Loss)
    if loss is None or (loss.value is None and not loss.predictions):
        raise UserError(
            "the graph has no loss, so its gradients cannot be checked", help="name it with --loss"
        )
    pairs = metadata.read_list(model, "parameters", Parameter)
    proto = ir.to_proto(model)
    values = _values(model, pairs, parameters or {})
    rng = np.random.default_rng(seed)
    inputs = _with_keys(model, _batch_inputs(proto, values))
    fed_back = {name for name in loss.predictions.values() if name is not None and name not in batch}
    fed = checked_batch(batch, [item for item in inputs if item.name not in fed_back])
    arrays = {name: value for name, value in fed.items() if isinstance(value, np.ndarray)}
    ending = loss.value
    if ending is None:
        arrays |= boundary_gradients(proto, loss.predictions, values, arrays, rng)
        ending = add_linear_loss(proto, loss.predictions)
    named = {pair.name: pair.gradient for pair in pairs if pair.gradient is not None}
    for check in id_checks:
        if check.ids in arrays:
            check_ids(check, arrays[check.ids], lambda name=check.ids: f"input '{name}'")
    gradients = graph_gradients(proto, ending, named, values, arrays, ready)
    evaluate = open_loss(proto, ending, [pair.name for pair in pairs], values, arrays)
    digits = narrowest(proto)
    padding = {site.parameter: site for site in sites if site.padding_idx is not None}
    estimated = _rounded(model, ending)
    return [
        GradientCheck(pair.name, pair.gradient, "skipped", None, None, evaluate.arithmetic, _ESTIMATE)
        if pair.name in estimated
        else _check(
            pair, values[pair.name], gradients.get(pair.name), evaluate, padding.get(pair.name), rng, digits
        )
        for pair in pairs
    ]


def _rounded(model: ir.Model, loss: str) -> set[str]:
    """Return the names of the values that reach the loss through a quantization, at least in part."""
    ends = [value for node in model.graph for value in node.outputs if value.name == loss]
    rounding = {
        node.inputs[0]
        for value in ancestors(ends)
        if (node := value.producer()) is not None and node.op_type == "QuantizeLinear"
    }
    return {str(value.name) for value in ancestors(value for value in rounding if value is not None)}


def _values(model: ir.Model, pairs: Iterable[Parameter], given: Mapping[str, Array]) -> dict[str, Array]:
    """Return the value of every parameter and constant: given ones first, then the graph's own.

    Raises UserError for a parameter without a value, or of another shape.
    """
    values: dict[str, Array] = {}
    for pair in pairs:
        if pair.name in given:
            values[pair.name] = np.asarray(given[pair.name])
        elif pair.name in model.graph.initializers:
            tensor = model.graph.initializers[pair.name].const_value
            if tensor is not None:
                values[pair.name] = tensor.numpy()
        if pair.name not in values:
            raise UserError(
                f"the parameter '{pair.name}' has no value", help="give it with --parameters FILE"
            )
        if values[pair.name].shape != pair.shape:
            raise UserError(
                f"the value of parameter '{pair.name}' has shape {list(values[pair.name].shape)}, "
                f"but the graph wants {list(pair.shape)}"
            )
    inputs = {str(value.name) for value in model.graph.inputs}
    values |= {name: np.asarray(value) for name, value in given.items() if name in inputs}
    return values


def data_inputs(model: ir.Model, parameters: Mapping[str, Array] | None) -> list[BatchInput]:
    """Return the inputs of a training graph that a batch fills, when parameters and constants have values."""
    pairs = metadata.read_list(model, "parameters", Parameter)
    inputs = _batch_inputs(ir.to_proto(model), {pair.name for pair in pairs} | set(parameters or {}))
    loss = metadata.read(model, "loss", Loss)
    # Gradients of predictions are made where a batch does not hold them.
    made: set[str | None] = set() if loss is None else set(loss.predictions.values())
    return _with_keys(model, [item for item in inputs if item.name not in made])


def _with_keys(model: ir.Model, inputs: Iterable[BatchInput]) -> list[BatchInput]:
    keys = {item.input: item.keys for item in metadata.read_list(model, "vocabularies", Vocabulary)}
    return [replace(item, keys=keys.get(item.name, ())) for item in inputs]


def _batch_inputs(proto: onnx.ModelProto, values: Container[str]) -> list[BatchInput]:
    held = {tensor.name for tensor in proto.graph.initializer}
    return [
        BatchInput(value.name, value.type.tensor_type.elem_type, _dims(value.type.tensor_type))
        for value in proto.graph.input
        if value.name not in values and value.name not in held
    ]


def _dims(kind: onnx.TypeProto.Tensor) -> tuple[int | str | None, ...] | None:
    if not kind.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim
    )


def _check(
    pair: Parameter,
    value: Array,
    gradient: Array | None,
    loss: LossFunction,
    padded: Site | None,
    rng: np.random.Generator,
    digits: str,
) -> GradientCheck:
    def verdict(status: Status, error: float | None, tolerance: float | None, why: str = "") -> GradientCheck:
        return GradientCheck(pair.name, pair.gradient, status, error, tolerance, loss.arithmetic, why)

    if gradient is None:
        return verdict("skipped", None, None, "the graph has no gradient of it")
    if gradient.shape != value.shape:
        return verdict(
            "wrong", None, None, f"its gradient has shape {list(gradient.shape)}, not {list(value.shape)}"
        )
    if not np.isfinite(gradient).all():
        return verdict("wrong", None, None, "its gradient is not finite on this batch")
    if pair.name not in loss.feeds:
        zero = not gradient.any()
        return verdict(
            "ok" if zero else "wrong", None, None, "" if zero else "the loss does not depend on it"
        )
    start = value.astype(np.float64)
    rough = loss.arithmetic == "float32"
    size = max(float(np.sqrt(np.mean(start**2))) if start.size else 0.0, 0.1)  # a bias may be all zeros
    scale = size * (max(_STEP_FLOAT32, _STEP[digits]) if rough else _STEP[digits])
    norm = float(np.linalg.norm(gradient))
    random: Array = np.reshape(rng.standard_normal(start.size), start.shape)
    if padded is not None:
        _hold_still(random, padded)
    directions: list[Array] = [random] if norm == 0.0 else [gradient * (np.sqrt(start.size) / norm), random]
    if rough:
        return verdict(
            *_rough_verdict(pair.name, start, gradient, directions, scale, loss, _TOLERANCE[digits])
        )
    error, middle = 0.0, loss.at(pair.name, start)
    for direction in directions:
        ahead, behind = _sides(loss, pair.name, start, direction, scale, middle)
        found = float(np.vdot(gradient, direction))
        error = max(error, _distance(found, ahead, behind) / max(norm, 1e-30))
    if error <= _TOLERANCE[digits]:
        return verdict("ok", error, _TOLERANCE[digits])
    return verdict("wrong", error, _TOLERANCE[digits], _WRONG)


def _rough_verdict(
    name: str,
    start: Array,
    gradient: Array,
    directions: Sequence[Array],
    step: float,
    loss: LossFunction,
    tolerance: float,
) -> tuple[Status, float, float, str]:
    """Return status, error, tolerance and reason where the loss runs in float32: see the module.

    The worst of the directions counts.
    """
    norm = max(float(np.linalg.norm(gradient)), 1e-30)
    middle = loss.at(name, start)
    rounding = 8 * float(np.finfo(np.float32).eps) * abs(middle) / norm
    found: list[tuple[int, float, float]] = []
    for direction in directions:
        slope, h, halvings = float(np.vdot(gradient, direction)), step, 0
        far = sum(_sides(loss, name, start, direction, 2 * h, middle)) / 2
        while True:
            ahead, behind = _sides(loss, name, start, direction, h, middle)
            near = (ahead + behind) / 2
            allowed = max(tolerance, _TOLERANCE_FLOAT32) + rounding / h
            error = abs(slope - (4 * near - far) / 3) / norm
            kink = _distance(slope, ahead, behind) / norm <= allowed
            bent = kink or abs(near - far) / norm > _BENT * allowed
            if error <= allowed or not bent or halvings == _HALVINGS:
                break
            h, far, halvings = h / 2, near, halvings + 1
        right = error <= allowed
        unclear = allowed > _UNCLEAR or (bent and not right)
        found.append((1 if unclear else 0 if right else 2, error, allowed))
    rank, error, allowed = max(found)
    reasons = ("", "float32 has too few digits for this parameter", _WRONG)
    statuses: tuple[Status, ...] = ("ok", "unclear", "wrong")
    return statuses[rank], error, allowed, reasons[rank]


def _sides(
    loss: LossFunction, name: str, start: Array, direction: Array, h: float, middle: float
) -> tuple[float, float]:
    """Return the slopes of the loss from a parameter's value, where it is `middle`, to h ahead and behind."""
    up, down = (loss.at(name, start + sign * h * direction) for sign in (1.0, -1.0))
    return (up - middle) / h, (middle - down) / h


def _distance(found: float, ahead: float, behind: float) -> float:
    """Return how far `found` is from the slopes of the loss on both sides.

    At a kink (ReLU at 0, a maximum of equals) a gradient may be anything between the slopes on both sides;
    in float64 the two agree elsewhere.
    """
    low, high = sorted((ahead, behind))
    return max(low - found, found - high, 0.0)


def _hold_still(direction: Array, site: Site) -> None:
    """Set the padding row of a table to 0, in the layout in which the parameter stores it."""
    row = site.padding_idx
    if row is None:
        return
    match site.layout:
        case "rows":
            direction[row] = 0.0
        case "columns":
            direction[:, row] = 0.0
        case "flat":
            direction[row * site.embedding_dim : (row + 1) * site.embedding_dim] = 0.0
