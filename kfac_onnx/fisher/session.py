"""Running blocks on onnxruntime: a session that holds the factors' state.

Whatever is asked for is copied with its ancestors into an ONNX model with the dialect's bodies, run, and
kept for the next time. The only arithmetic outside ONNX are powers that `eigh` makes (see `HostPower`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx import dialect
from kfac_onnx.device.providers import on_cuda, provider_list, require_providers
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.errors.arguments import thread_count
from kfac_onnx.fisher.symbols import SparseRows, Update, placeholder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime

    from kfac_onnx.device.providers import GivenProviders
    from kfac_onnx.dialect import Variant
    from kfac_onnx.fisher.blocks import FisherBlock
    from kfac_onnx.fisher.layer_collection import LayerCollection
    from kfac_onnx.fisher.symbols import Array, StoredPower
    from kfac_onnx.metadata import State

__all__ = ["FisherSession", "build_model", "host_power"]

OPSET: Final = 18
IR_VERSION: Final = 9


class FisherSession:
    """State and execution of all blocks of a collection whose factors are instantiated.

    `feeds` are arrays by the name of the symbolic tensor (ids, gradients, a damping tensor), `providers`
    the names of ONNX Runtime's execution providers.

    Raises UserError for a provider that the installed onnxruntime does not have.
    """

    def __init__(
        self,
        layer_collection: LayerCollection,
        *,
        threads: int | None = None,
        providers: GivenProviders = ("CPUExecutionProvider",),
    ) -> None:
        self._collection = layer_collection
        self._threads = thread_count(threads)
        self._providers = provider_list(providers)
        self._variant: Variant = "atomic" if on_cuda(self._providers) else "safe"
        self._sessions: dict[tuple[ir.Value, ...], tuple[onnxruntime.InferenceSession, list[str]]] = {}
        self._expressions: dict[tuple[object, ...], Any] = {}
        self._state: dict[str, Array] = {}
        self.paths: dict[str, str] = {}
        """How each stored power was made at the last inverse update, by the name of its state."""

    @property
    def state(self) -> dict[str, Array]:
        """A copy of every state tensor, by name."""
        return {name: self._read(name).copy() for name in self._state_names()}

    def covariance_update(self, feeds: Mapping[str, Array]) -> None:
        """Let every factor average in the batch that is fed."""
        updates = self._once(
            ("covariance",),
            lambda: [
                self._renormalized(factor.make_covariance_update_op())
                for factor in self._collection.get_factors()
            ],
        )
        self.apply(updates, feeds)

    def inverse_update(self, feeds: Mapping[str, Array] | None = None) -> None:
        """Recompute every stored inverse and power from the factors as they are now."""
        registered = len(self._collection.get_states())
        updates = self._once(
            ("inverse", registered),
            lambda: [
                update
                for factor in self._collection.get_factors()
                for update in factor.make_inverse_update_ops()
            ],
        )
        self.apply(updates, {} if feeds is None else feeds)

    def multiply(
        self,
        block: FisherBlock,
        vector: Array | tuple[Array, Array],
        feeds: Mapping[str, Array] | None = None,
    ) -> Array:
        """Return the damped block times a vector: dense float[V, D], or (indices[N], values[N, D])."""
        return self.multiply_matpower(block, vector, 1.0, feeds)

    def multiply_inverse(
        self,
        block: FisherBlock,
        vector: Array | tuple[Array, Array],
        feeds: Mapping[str, Array] | None = None,
    ) -> Array:
        """Return the damped block's inverse (G's of the last inverse update) times a vector."""
        return self.multiply_matpower(block, vector, -1.0, feeds)

    def multiply_matpower(
        self,
        block: FisherBlock,
        vector: Array | tuple[Array, Array],
        exponent: float,
        feeds: Mapping[str, Array] | None = None,
    ) -> Array:
        """Return the damped block to a power times a vector, float32 in the vector's form.

        Every exponent but 1 and −1 must be registered on the block before the inverse update it is
        read from.
        """
        given = dict({} if feeds is None else feeds)
        sparse = isinstance(vector, tuple)
        key = ("matpower", block, exponent, sparse, () if isinstance(vector, tuple) else vector.shape)
        if isinstance(vector, tuple):
            given["vector/indices"], given["vector/values"] = vector[0].astype(np.int64), _single(vector[1])
        else:
            given["vector"] = _single(vector)
        expression = self._once(key, lambda: _power_of(block, vector, exponent))
        return self.run([expression], given)[0]

    def full_fisher_block(self, block: FisherBlock, feeds: Mapping[str, Array] | None = None) -> Array:
        """Return the undamped block as a matrix float32[V·D, V·D], for tests."""
        expression = self._once(("block", block), block.full_fisher_block)
        return self.run([expression], {} if feeds is None else feeds)[0]

    def apply(self, updates: Sequence[Update], feeds: Mapping[str, Array]) -> None:
        """Run updates; all read the state before any of them writes."""
        assignments = [pair for update in updates for pair in update.assignments]
        powers = [power for update in updates for power in update.powers]
        fetches = [value for _, value in assignments]
        for power in powers:
            fetches += [power.factor, power.damping]
            fetches += [value for value in (power.candidate, power.residual) if value is not None]
        unique = list(dict.fromkeys(fetches))
        arrays = dict(zip(unique, self.run(unique, feeds), strict=True)) if unique else {}
        for state, value in assignments:
            self._state[str(state.name)] = arrays[value]
        for power in powers:
            name = str(power.state.name)
            self._state[name], self.paths[name] = _settle(power, arrays)

    def _renormalized(self, update: Update) -> Update:
        """Return an update after which a vector has taken in its running scale where that became small."""
        draft = self._collection.draft
        emit = draft.outer.derive()
        assignments: list[tuple[ir.Value, ir.Value]] = []
        for state, new in update.assignments:
            entry = draft.renormalizations.get(str(state.name))
            if entry is not None:
                now, factor = draft.value(entry.now), draft.value(entry.factor)
                wide = factor.dtype == ir.DataType.DOUBLE
                one = emit.constant(np.float64(1.0) if wide else np.float32(1.0), "one")
                scale = emit.node("Where", [now, factor, one], dtype=factor.dtype, shape=[])
                new = emit.node("Mul", [new, scale], dtype=new.dtype, shape=new.shape)
            assignments.append((state, new))
        return Update(tuple(assignments), update.powers)

    def run(self, fetches: Sequence[ir.Value], feeds: Mapping[str, Array]) -> list[Array]:
        """Return the values of symbolic tensors; raises UserError for a missing feed or a failing run."""
        key = tuple(fetches)
        if key not in self._sessions:
            self._sessions[key] = self._open(key, feeds)
        session, names = self._sessions[key]
        states = self._state_names()
        values: dict[str, Array] = {}
        for name in names:
            if name in feeds:
                values[name] = np.asarray(feeds[name])
            elif name in states:
                values[name] = self._read(name)
            else:
                raise UserError(f"the tensor '{name}' is needed but was not fed")
        try:
            return [np.asarray(value) for value in session.run(None, values)]
        except Exception as error:
            # onnxruntime raises its own classes for bad feeds and failing nodes alike.
            raise UserError(f"onnxruntime could not run the block: {first_line(error)}") from error

    def _open(
        self, fetches: tuple[ir.Value, ...], feeds: Mapping[str, Array]
    ) -> tuple[onnxruntime.InferenceSession, list[str]]:
        import onnxruntime

        model = build_model(fetches, set(feeds), self._variant)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        data = ir.serde.serialize_model(model).SerializeToString()
        session = onnxruntime.InferenceSession(
            data,
            options,
            providers=self._providers,
            enable_fallback=0,  # pyright: ignore[reportCallIssue]  typed in part
        )
        require_providers(session, self._providers)
        return session, [value.name for value in model.graph.inputs if value.name is not None]

    def _state_names(self) -> list[str]:
        return [str(state.name) for state in self._collection.get_states()]

    def _read(self, name: str) -> Array:
        if name not in self._state:
            state = next(state for state in self._collection.draft.states if state.input == name)
            self._state[name] = _initial(state)
        return self._state[name]

    def _once(self, key: tuple[object, ...], make: Any) -> Any:
        if key not in self._expressions:
            self._expressions[key] = make()
        return self._expressions[key]


def build_model(fetches: Sequence[ir.Value], fed: set[str], variant: Variant = "safe") -> ir.Model:
    """Return a model that computes symbolic tensors; what has no producer, or is fed by name, is an input."""
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []
    for fetch in fetches:
        _copy(fetch, fed, copies, inputs, constants, nodes)
    outputs: list[ir.Value] = []
    for index, fetch in enumerate(fetches):
        node = ir.node("Identity", [copies[fetch]])
        node.outputs[0].name = f"fetch/{index}"
        nodes.append(node)
        outputs.append(node.outputs[0])
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": OPSET}, name="kfac_block")
    for value in constants:
        graph.register_initializer(value)
    model = ir.Model(graph, ir_version=IR_VERSION)
    dialect.attach(model, variant)
    return model


def _copy(
    root: ir.Value,
    fed: set[str],
    copies: dict[ir.Value, ir.Value],
    inputs: list[ir.Value],
    constants: list[ir.Value],
    nodes: list[ir.Node],
) -> None:
    pending = [root]
    while pending:
        value = pending[-1]
        node = value.producer()
        if value in copies:
            pending.pop()
        elif node is None or (value.name is not None and value.name in fed):
            copies[value] = ir.Value(name=value.name, shape=value.shape, type=value.type)
            if value.const_value is None:
                inputs.append(copies[value])
            else:
                copies[value].const_value = value.const_value
                constants.append(copies[value])
        else:
            missing = [source for source in node.inputs if source is not None and source not in copies]
            if missing:
                pending.extend(missing)
                continue
            sources = [None if source is None else copies[source] for source in node.inputs]
            attributes = list(node.attributes.values())
            twin = ir.Node(node.domain, node.op_type, sources, attributes, num_outputs=len(node.outputs))
            nodes.append(twin)
            copies.update(zip(node.outputs, twin.outputs, strict=True))


def host_power(factor: Array, damping: float, exponent: float) -> Array:
    """Return Q (max(w, 0) + damping)^exponent Qᵀ by float64 `eigh`, as float32; NaN if not finite."""
    if not (np.isfinite(factor).all() and np.isfinite(damping)):
        return np.full_like(factor, np.nan, dtype=np.float32)
    w, Q = np.linalg.eigh(factor.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return ((Q * (np.maximum(w, 0.0) + damping) ** exponent) @ Q.T).astype(np.float32)


def _initial(state: State) -> Array:
    """Return what a state starts from."""
    match state.initial:
        case "identity":
            return np.eye(*state.shape, dtype=state.dtype)
        case "zeros" | "ones":
            return np.full(state.shape, float(state.initial == "ones"), state.dtype)
        case number:
            return np.full(state.shape, number, state.dtype)


def _settle(power: StoredPower, arrays: Mapping[ir.Value, Array]) -> tuple[Array, str]:
    residual = 0.0 if power.residual is None else float(arrays[power.residual])
    if power.candidate is not None and residual <= power.tolerance:
        return arrays[power.candidate], power.path
    return host_power(arrays[power.factor], float(arrays[power.damping]), power.exponent), "host-eigh"


def _power_of(block: FisherBlock, vector: Array | tuple[Array, Array], exponent: float) -> ir.Value:
    if not isinstance(vector, tuple):
        dense = placeholder("vector", ir.DataType.FLOAT, vector.shape)
        result = block.multiply_matpower(dense, exponent)
    else:
        indices = placeholder("vector/indices", ir.DataType.INT64, ["N"])
        values = placeholder("vector/values", ir.DataType.FLOAT, ["N", vector[1].shape[1]])
        result = block.multiply_matpower(SparseRows(indices, values, block.parameter_shape), exponent)
    return result.values if isinstance(result, SparseRows) else result


def _single(array: Array) -> Array:
    return np.asarray(array, dtype=np.float32)
