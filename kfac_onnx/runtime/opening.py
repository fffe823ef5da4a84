"""From a model file and the user's values to buffers: what `TrainingSession` does when it opens.

Three kinds of inputs get their values here: states (parameters from the user or the file, everything
else from `State.initial`), constants, and learning rates. What is left is the batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx

from kfac_onnx import metadata
from kfac_onnx.disk.mapped import MappedTensor
from kfac_onnx.disk.memory import require_memory
from kfac_onnx.disk.stored import StoredArray
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.errors.arguments import LARGEST_RATE, finite_number
from kfac_onnx.metadata import State, Step
from kfac_onnx.runtime.feed.batches import BatchInput
from kfac_onnx.runtime.step.runner import Holder
from kfac_onnx.runtime.step.tensors import BFLOAT16, Buffer, Device, dtype_name, element_type, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import onnx_ir as ir

    from kfac_onnx.disk.stored import Array
    from kfac_onnx.metadata import Vocabulary
    from kfac_onnx.runtime.step.mapped_tables import MappedTables
    from kfac_onnx.step.plan import Plan

__all__ = [
    "assignable",
    "batch_inputs",
    "build_constants",
    "build_holders",
    "check_names",
    "fitting_value",
    "learning_rates",
    "own_outputs",
    "require_step",
]


_PIECE: Final = 1 << 22
"""Entries that are checked at once."""


def require_step(model: ir.Model, name: str) -> Step:
    """Return the model's `kfac.step`; UserError with the remedy where it has none."""
    step = metadata.read(model, "step", Step)
    if step is None:
        raise UserError(
            f"{name} is not a training step: it has no 'kfac.step' entry",
            help="make one from a training graph first: `kfac-onnx transform MODEL -o OUT`,"
            " or `kfac_onnx.transform(...)`",
        )
    return step


def check_names(plan: Plan, values: Mapping[str, Array]) -> None:
    """Raise UserError for a value that belongs to no parameter and no input of the graph."""
    own = {state.input for state in plan.states if state.initial != "parameter"}
    own |= {rate.input for rate in plan.step.learning_rates}
    known = ({state.input for state in plan.states} | set(plan.source.inputs)) - own
    for name in values:
        if name not in known:
            message = f"there is no parameter '{name}' in the model{did_you_mean(name, sorted(known))}"
            raise UserError(message)


def _initial(state: State, plan: Plan, values: Mapping[str, Array], element: int) -> Array:
    if state.initial == "parameter":
        if state.input in values:
            return fitting_value(values[state.input], state)
        tensor = plan.initial.get(state.input)
        if tensor is None:
            raise UserError(
                f"parameter '{state.input}' has no value",
                help="the model file holds none: give it in parameters= (or --parameters FILE)",
            )
        return fitting_value(tensor.stored if isinstance(tensor, MappedTensor) else tensor.numpy(), state)
    dtype = numpy_dtype(element)
    require_memory(math.prod(state.shape) * dtype.itemsize, f"the state '{state.input}'")
    match state.initial:
        case "zeros":
            return np.zeros(state.shape, dtype)
        case "ones":
            return np.ones(state.shape, dtype)
        case "identity":
            return np.broadcast_to(np.eye(state.shape[-1], dtype=np.float64), state.shape).astype(dtype)
        case _:
            return np.full(state.shape, float(state.initial), dtype)


def fitting_value(array: Array, state: State) -> Array:
    """Return a parameter's value in the state's dtype (bfloat16 may come as uint16 bits).

    Raises UserError for another shape or dtype, and for entries that are not finite: no step would be kept.
    The entries of an array in a file are looked at when they are read.
    """
    element = element_type(state.dtype)
    wanted = numpy_dtype(element)
    if element == BFLOAT16 and array.dtype == np.uint16:
        array = _as_bfloat16(array)
    if tuple(array.shape) != tuple(state.shape):
        message = (
            f"the value of parameter '{state.input}' must have shape {list(state.shape)},"
            f" got {list(array.shape)}"
        )
        raise UserError(message)
    if array.dtype != wanted:
        message = f"the value of parameter '{state.input}' must be {dtype_name(element)}, got {array.dtype}"
        raise UserError(message, help=f"convert it: array.astype('{dtype_name(element)}')")
    if not isinstance(array, StoredArray):
        require_finite(array, state)
    return array


def _as_bfloat16(array: Array) -> Array:
    """Return 16-bit patterns as the bfloat16 numbers that they are."""
    if isinstance(array, StoredArray):
        return replace(array, dtype=numpy_dtype(BFLOAT16))
    return np.ascontiguousarray(array).view(numpy_dtype(BFLOAT16))


def require_finite(array: np.ndarray, state: State) -> None:
    """Raise UserError for a parameter with an entry that is not finite."""
    if not _all_finite(array):
        raise UserError(f"the value of parameter '{state.input}' holds entries that are not finite")


def _all_finite(array: np.ndarray) -> bool:
    """Say whether every entry is finite, in pieces: a table may be most of the memory."""
    if array.ndim == 0:
        return bool(np.isfinite(array))
    rows = max(1, _PIECE // max(1, array[:1].size))
    return all(bool(np.isfinite(array[i : i + rows]).all()) for i in range(0, len(array), rows))


def assignable(
    plan: Plan, holders: Mapping[str, Holder], values: Mapping[str, np.ndarray]
) -> dict[str, Array]:
    """Return new values of trained parameters in their dtypes.

    Raises UserError for a name that is no trained parameter, or a value that does not fit.
    """
    check_names(plan, values)
    for name in values:
        if name not in holders:
            raise UserError(f"'{name}' is not a trained parameter")
    return {name: fitting_value(array, holders[name].state) for name, array in values.items()}


def build_holders(
    plan: Plan,
    values: Mapping[str, Array],
    device: Device,
    *,
    in_place: bool,
    mapped: MappedTables | None = None,
    tables: Collection[str] = (),
) -> dict[str, Holder]:
    """Return each state's buffers, by `State.input`: two, or one where it is held in place.

    Those of `tables` are `mapped` from their files.
    """
    holders: dict[str, Holder] = {}
    for state in plan.states:
        element = element_type(state.dtype)
        if mapped is not None and state.input in tables:
            has_value = state.input in values or plan.initial.get(state.input) is not None
            value = _initial(state, plan, values, element) if has_value else None
            buffer = mapped.open(state, value, element, partial(require_finite, state=state))
            holders[state.input] = Holder(state, [buffer])
            continue
        initial = _initial(state, plan, values, element)
        stored = isinstance(initial, StoredArray)
        buffers = [Buffer(initial, element, device, partial(require_finite, state=state) if stored else None)]
        if state.update == "double" or not in_place:
            buffers.append(Buffer(np.zeros(state.shape, numpy_dtype(element)), element, device))
        holders[state.input] = Holder(state, buffers)
    return holders


def build_constants(plan: Plan, values: Mapping[str, Array], device: Device) -> dict[str, Buffer]:
    """Return the buffers of inputs that keep their value: constants, frozen tables, given batch inputs."""
    states = {state.input for state in plan.states}
    rates = {rate.input for rate in plan.step.learning_rates}
    constants: dict[str, Buffer] = {}
    for name, tensor in plan.frozen.items():
        constants[name] = Buffer(tensor.numpy(), int(tensor.dtype), device)
    for name in plan.source.inputs:
        if name in states or name in rates:
            continue
        element = plan.source.types[name].type.tensor_type.elem_type
        if name in values:
            array = values[name]
            if element == BFLOAT16 and array.dtype == np.uint16:
                array = _as_bfloat16(array)
            if array.dtype != numpy_dtype(element):
                message = f"the value of input '{name}' must be {dtype_name(element)}, got {array.dtype}"
                raise UserError(message)
            constants[name] = Buffer(array, element, device)
        elif name in plan.initial and name not in plan.step.batch:
            constants[name] = Buffer(plan.initial[name].numpy(), element, device)
        elif name in plan.step.constants:
            raise UserError(
                f"input '{name}' has no value",
                help="it is a constant of the graph: give it in parameters= (or --parameters FILE)",
            )
    return constants


def learning_rates(step: Step, lr: float | None, rest_lr: float | None) -> dict[str, float]:
    """Return the value of each learning rate by its input: the given one, else the model's.

    Rates of our own are told by their names: those of rules and of hidden matrices stay as they are. In a
    model of another maker the first one is that of the tables.

    Raises UserError for one that is no finite number of float32, or negative.
    """
    if lr is not None:
        lr = finite_number(lr, "lr", least=0.0, most=LARGEST_RATE)
    if rest_lr is not None:
        rest_lr = finite_number(rest_lr, "rest_lr", least=0.0, most=LARGEST_RATE)
    rates = {rate.input: rate.default for rate in step.learning_rates}
    ours = {"kfac/lr": lr, "kfac/rest_lr": rest_lr}
    for index, name in enumerate(rates):
        other = rest_lr if index > 0 or "rest" in name else lr
        given = ours.get(name) if name.startswith("kfac/") else other
        if given is not None:
            rates[name] = given
    return rates


def own_outputs(model: ir.Model, step: Step) -> list[str]:
    """Return the outputs of a drop-in graph (`dense`) that are the exporter's own, gradients among them."""
    if step.shape != "dense":
        return []
    ours = {state.output for state in metadata.read_list(model, "state", State)}
    ours |= {step.ok} if step.loss is None else {step.ok, step.loss}  # predictions are the exporter's
    return [value.name for value in model.graph.outputs if value.name and value.name not in ours]


def batch_inputs(
    plan: Plan, constants: Mapping[str, Buffer], vocabularies: Iterable[Vocabulary] = ()
) -> tuple[BatchInput, ...]:
    """Return the inputs that every step must be given, in the graph's order.

    Raises UserError for an input of strings that no vocabulary encodes: ONNX Runtime binds none.
    """
    keys = {item.input: item.keys for item in vocabularies}
    inputs: list[BatchInput] = []
    for name in plan.step.batch:
        if name in constants:
            continue
        kind = plan.source.types[name].type.tensor_type
        dims = None
        if kind.HasField("shape"):
            dims = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                for dim in kind.shape.dim
            )
        if kind.elem_type == onnx.TensorProto.STRING:
            raise UserError(
                f"the input '{name}' holds strings, which a step cannot take: ONNX Runtime binds none",
                help="give numbers: let a LabelEncoder be all that reads the strings, or export the graph "
                "from behind what does",
            )
        inputs.append(BatchInput(name, kind.elem_type, dims, keys.get(name, ())))
    return tuple(inputs)
