"""A training graph's loss as a function of its parameters, and the gradients that the graph computes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.device.providers import require_providers
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.runtime.gradcheck.float_type import only_for, widened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.device.providers import Providers

__all__ = ["LossFunction", "add_linear_loss", "boundary_gradients", "graph_gradients", "open_loss"]

Array = np.ndarray[Any, np.dtype[Any]]
Arithmetic = Literal["float64", "float32"]
Runner = Callable[[onnx.ModelProto], Callable[[dict[str, Array]], Array]]
_PATIENCE: Final = 2.0
"""Seconds that one evaluation may take by the slow evaluator."""


@dataclass(frozen=True)
class LossFunction:
    """The loss as a function of one parameter at a time, the others at their values."""

    run: Callable[[dict[str, Array]], Array]
    feeds: dict[str, Array]
    arithmetic: Arithmetic

    def at(self, name: str, value: Array) -> float:
        """Return the loss with this value of one parameter."""
        return float(self.run({**self.feeds, name: value.astype(self.feeds[name].dtype)}))


def _open(proto: onnx.ModelProto, providers: Providers = ("CPUExecutionProvider",)) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    made = proto.SerializeToString()
    session = ort.InferenceSession(made, options, providers=list(providers), enable_fallback=0)  # pyright: ignore[reportCallIssue]  typed in part
    require_providers(session, providers)
    return session


def _bake(proto: onnx.ModelProto, values: Mapping[str, Array]) -> None:
    """Make values initializers, in place of the inputs and initializers of their names."""
    graph = proto.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in values]
    tensors = [tensor for tensor in graph.initializer if tensor.name not in values]
    for name, array in values.items():
        if not kinds[name]:
            raise UserError(f"the input '{name}' is not declared as a tensor, so it can have no value")
        dtype = ir.DataType(kinds[name]).numpy()
        tensors.append(ir.to_proto(ir.tensor(array.astype(dtype), name=name)))
    del graph.input[:], graph.initializer[:]
    graph.input.extend(inputs)
    graph.initializer.extend(tensors)


def graph_gradients(
    proto: onnx.ModelProto,
    loss: str,
    gradients: Mapping[str, str],
    values: Mapping[str, Array],
    feeds: Mapping[str, Array],
    providers: Providers,
) -> dict[str, Array]:
    """Return each parameter's gradient as the graph computes it on these providers, as float64.

    Raises UserError when the graph cannot be run or gives another loss each time.
    """
    names = list(gradients.values())
    graph = only_for(proto, dict.fromkeys([loss, *names]))
    _bake(graph, {name: value for name, value in values.items() if name in _named(graph)})
    outputs: list[str] = []
    for number, name in enumerate([loss, *names]):  # bfloat16 has no NumPy form in ONNX Runtime
        outputs.append(f"as_double_{number}")
        graph.graph.node.append(
            onnx.helper.make_node("Cast", [name], [outputs[-1]], to=onnx.TensorProto.DOUBLE)
        )
        graph.graph.output.append(
            onnx.helper.make_tensor_value_info(outputs[-1], onnx.TensorProto.DOUBLE, None)
        )
    used = _named(graph)
    given = {name: array for name, array in feeds.items() if name in used}
    try:
        session = _open(graph, providers)
        first, *found = session.run(outputs, given)
        (second,) = session.run(outputs[:1], given)
    except Exception as e:
        if not from_onnxruntime(e):
            raise
        raise UserError(f"the graph cannot be run on this batch: {first_line(e)}") from e
    if not np.isfinite(first).all():
        number = float(np.reshape(first, -1)[0])
        raise UserError(
            f"the loss is {number} on this batch, so its gradients cannot be checked",
            help="look for labels that are all ignored, a division by zero, the logarithm of zero, or an "
            "overflow; `train` skips such steps and counts them",
        )
    if not np.array_equal(first, second):
        raise UserError(
            "the graph's loss is random, so its gradients cannot be checked",
            help="export it without dropout",
        )
    return dict(zip(gradients, found, strict=True))


def boundary_gradients(
    proto: onnx.ModelProto,
    predictions: Mapping[str, str | None],
    values: Mapping[str, Array],
    feeds: Mapping[str, Array],
    rng: np.random.Generator,
) -> dict[str, Array]:
    """Return a random gradient for each prediction of a graph whose loss lies outside, by its input.

    Those that `feeds` holds are left out. Raises UserError when the predictions cannot be computed.
    """
    wanted = {name: fed for name, fed in predictions.items() if fed is not None and fed not in feeds}
    if not wanted:
        return {}
    graph = only_for(proto, list(wanted))
    _bake(graph, {name: value for name, value in values.items() if name in _named(graph)})
    used = _named(graph)
    try:
        made = _open(graph).run(list(wanted), {name: a for name, a in feeds.items() if name in used})
    except Exception as e:
        if not from_onnxruntime(e):
            raise
        raise UserError(f"the graph cannot be run on this batch: {first_line(e)}") from e
    kinds = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    return {
        fed: np.asarray(rng.standard_normal(value.shape)).astype(ir.DataType(kinds[fed]).numpy())
        for fed, value in zip(wanted.values(), made, strict=True)
    }


def add_linear_loss(proto: onnx.ModelProto, predictions: Mapping[str, str | None]) -> str:
    """Append the loss Σ prediction · gradient, gradients being inputs of the graph; return its name."""
    terms: list[str] = []
    for number, (name, fed) in enumerate((name, fed) for name, fed in predictions.items() if fed is not None):
        product, term = f"kfac/verify/product_{number}", f"kfac/verify/term_{number}"
        proto.graph.node.append(onnx.helper.make_node("Mul", [name, fed], [product]))
        proto.graph.node.append(onnx.helper.make_node("ReduceSum", [product], [term], keepdims=0))
        terms.append(term)
    loss = "kfac/verify/loss"
    proto.graph.node.append(onnx.helper.make_node("Sum", terms, [loss]))
    return loss


def _named(proto: onnx.ModelProto) -> set[str]:
    return {value.name for value in (*proto.graph.input, *proto.graph.initializer)}


def open_loss(
    proto: onnx.ModelProto,
    loss: str,
    names: Sequence[str],
    values: Mapping[str, Array],
    feeds: Mapping[str, Array],
) -> LossFunction:
    """Return the loss as a function; in float64 where ONNX Runtime can.

    Raises UserError when it runs neither way.
    """
    graph = only_for(proto, [loss])
    constants = {name: array for name, array in values.items() if name not in names and name in _named(graph)}
    _bake(graph, constants)
    tensors = [tensor for tensor in graph.graph.initializer if tensor.name not in names]
    known = {value.name for value in graph.graph.input}
    for tensor in graph.graph.initializer:
        if tensor.name in names and tensor.name not in known:
            graph.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(tensors)
    used = {value.name for value in graph.graph.input}
    trained = {name: values[name] for name in names if name in used}
    batch = {name: array for name, array in feeds.items() if name in used}
    last: Exception | None = None
    for arithmetic, dtype, runner in _WAYS:
        try:
            run = runner(widened(graph, dtype))
            ready = {name: _as(array, dtype) for name, array in {**trained, **batch}.items()}
            start = time.perf_counter()
            run(ready)
            if runner is _by_reference and time.perf_counter() - start > _PATIENCE:
                continue
        except Exception as e:  # neither evaluator's exceptions share a class of their own
            last = e
            continue
        return LossFunction(run, ready, arithmetic)
    reason = "" if last is None else f": {first_line(last)}"
    raise UserError(f"the graph's loss cannot be run on this batch{reason}") from last


def _by_runtime(proto: onnx.ModelProto) -> Callable[[dict[str, Array]], Array]:
    session = _open(proto)
    return lambda feeds: np.asarray(session.run(None, feeds)[0])


def _by_reference(proto: onnx.ModelProto) -> Callable[[dict[str, Array]], Array]:
    """Run by the ONNX project's own evaluator: slow, and has every standard operator in float64."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def erf(x: Array) -> Array:
        return np.vectorize(math.erf, otypes=[x.dtype])(x)

    class Erf(OpRun):  # its own rounds to float32
        """The error function in the type of its input."""

        def _run(self, x: Array) -> tuple[Array]:
            return (erf(x),)

    class Gelu(OpRun):  # its own calls that Erf
        """x Φ(x), or the approximation by tanh, in the type of its input."""

        def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
            if approximate == "tanh":
                return (x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
            return (x * 0.5 * (1 + erf(x / math.sqrt(2))),)

    class OneHot(OpRun):  # its own takes no depth of shape [1]
        """`values[1]` at the index along a new axis, `values[0]` elsewhere and for an index out of range."""

        def _run(self, indices: Array, depth: Array, values: Array, axis: int = -1) -> tuple[Array]:
            size = int(depth.reshape(-1)[0])
            place = np.expand_dims(np.where(indices < 0, indices + size, indices), axis)
            classes = np.arange(size).reshape(
                [-1 if dim == axis % place.ndim else 1 for dim in range(place.ndim)]
            )
            off, on = np.asarray(values[0]), np.asarray(values[1])
            return (np.asarray(np.where(np.equal(place, classes), on, off)),)

    evaluator: Any = ReferenceEvaluator(proto, new_ops=[Erf, Gelu, OneHot])

    def run(feeds: dict[str, Array]) -> Array:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of its own arithmetic; a wrong result shows in the check
            return np.asarray(evaluator.run(None, feeds)[0])

    return run


_WAYS: Final[tuple[tuple[Arithmetic, type[np.float64] | type[np.float32], Runner], ...]] = (
    ("float64", np.float64, _by_runtime),
    ("float64", np.float64, _by_reference),
    ("float32", np.float32, _by_runtime),
)
"""Ways to run the loss, the best first."""


def _as(array: Array, dtype: type[np.floating[Any]]) -> Array:
    """Return a float array in another float type, and anything else as it is."""
    whole = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
    return array if whole else array.astype(dtype)
