"""The blocks of layers: fully connected and convolutional, both factors full.

    F = c · A ⊗ G        A = E[h hᵀ] over inputs, G = E[g gᵀ] over gradients of the products
    multiply_matpower(V, e) = c^e · (A + λ_A·I)^e · V · (G + λ_G·I)^e       of V [n, m], inputs by outputs
    update(): momentum of A^(−1/2)·V·G^(−1/2)/√N, or of A^(−1)·V·G^(−1)/c, of the gradient V

A bias is the last row of V, and then h ends in a one. A kernel [m, channels, k...] has n = channels·∏k, its
h are patches, N = batch·L rows at L places, and with the original c = L and λ/L stands for λ. Several uses
are stacked. With −1/2 the scale of the loss cancels: g are gradients of whatever loss the graph has, and N is
the number of rows. Source: Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671), sections 3 and 6.3;
Grosse & Martens 2016 (https://arxiv.org/abs/1602.01407), section 3.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from kfac_onnx.fisher.blocks import FisherBlock
from kfac_onnx.fisher.damping import Pi, Relative
from kfac_onnx.fisher.errors import FisherIndexError, FisherTypeError, FisherValueError
from kfac_onnx.fisher.lookups import row_count
from kfac_onnx.fisher.output_factor import FullyConnectedKroneckerFactor
from kfac_onnx.fisher.roots import step_root
from kfac_onnx.fisher.row_scales import RowUpdate
from kfac_onnx.fisher.sampling import GradientRows, Sample
from kfac_onnx.fisher.settings import Average
from kfac_onnx.fisher.symbols import SparseRows
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import FLOAT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.fisher.blocks import Collection
    from kfac_onnx.fisher.damping import Damping
    from kfac_onnx.fisher.place import Place
    from kfac_onnx.graph.emit import Emitter

__all__ = ["ConvKFACBasicFB", "FullyConnectedKFACBasicFB", "LayerFB", "LayerSettings", "Window"]

_SAMPLE: Final = 1024
"""Rows that a factor takes in at least; from 8 a column on a second moment gains nothing from more."""


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """How a layer is preconditioned in a training step."""

    exponent: float = -0.5
    """Power of both factors, −1/2 or −1."""
    damping: Damping = field(default_factory=lambda: Relative(0.01))
    average: Average = field(default_factory=lambda: Average(decay=0.95))
    momentum: float = 0.9
    """Weight kept from the old momentum of the direction."""
    refresh_every: int = 10
    """Steps between two refreshes of the powers, besides steps 1, 2, 4 and 8."""
    scale: ir.Value | None = None
    """c² for exponent −1, where c divides a mean loss: G wants gradients of a loss summed over examples."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a convolution reads its inputs; `pads` are ONNX's, begins then ends, or `auto_pad` says them."""

    kernel: tuple[int, ...]
    """[out channels, in channels, k...]."""
    strides: tuple[int, ...]
    pads: tuple[int, ...] | None = None
    dilations: tuple[int, ...] | None = None
    auto_pad: str = "NOTSET"


class LayerFB(FisherBlock):
    """A block that is the Kronecker product of two full factors."""

    def __init__(
        self, layer_collection: Collection, has_bias: bool = False, settings: LayerSettings | None = None
    ) -> None:
        super().__init__(layer_collection)
        self.has_bias = has_bias
        self._settings = LayerSettings() if settings is None else settings
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._factors: tuple[FullyConnectedKroneckerFactor, FullyConnectedKroneckerFactor] | None = None
        self._dampings: tuple[ir.Value, ir.Value] | None = None
        self._number: ir.Value | None = None

    @property
    def place(self) -> Place:
        """Where the block's nodes and states go."""
        return self._layer_collection.place(self)

    @property
    def num_registered_minibatches(self) -> int:
        """How many minibatches (towers, or uses of shared weights) were registered."""
        return len(self._inputs)

    @property
    def input_factor(self) -> FullyConnectedKroneckerFactor:
        """The factor A; raises before `instantiate_factors`."""
        return self._both[0]

    @property
    def output_factor(self) -> FullyConnectedKroneckerFactor:
        """The factor G; raises before `instantiate_factors`."""
        return self._both[1]

    @property
    def _both(self) -> tuple[FullyConnectedKroneckerFactor, FullyConnectedKroneckerFactor]:
        if self._factors is None:
            raise FisherValueError("the block has no factors yet", help="call instantiate_factors first")
        return self._factors

    @property
    def dampings(self) -> tuple[ir.Value, ir.Value]:
        """λ_A and λ_G, float32 scalars, live."""
        if self._dampings is None:
            raise FisherValueError("the block has no damping yet", help="call instantiate_factors first")
        return self._dampings

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """[n, m] of the parameter, inputs (with the bias) by outputs."""
        return (self.input_factor.embedding_dim, self.output_factor.embedding_dim)

    @property
    @abstractmethod
    def renorm_coeff(self) -> float:
        """The coefficient c of the block."""

    @abstractmethod
    def _input_rows(self, inputs: ir.Value) -> ir.Value:
        """Return what the matrix multiplies as rows float[N, n], without the ones of a bias."""

    @abstractmethod
    def _gradient_rows(self, gradient: ir.Value) -> ir.Value:
        """Return gradients of the products as rows float[N, m]."""

    def register_additional_minibatch(self, inputs: ir.Value, outputs: ir.Value) -> None:
        """Append a tower, or another use of shared weights: its inputs and its products."""
        self._inputs.append(inputs)
        self._outputs.append(outputs)

    def tensors_to_compute_grads(self) -> list[ir.Value | tuple[ir.Value, ...]]:
        """Return the registered products, in order."""
        return [*self._outputs]

    def instantiate_factors(
        self,
        grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]],
        damping: float | ir.Value | None = None,
    ) -> None:
        """Make both factors from the registered inputs and gradients [source][tower]."""
        sources = self._checked(grads_list)
        rows = tuple(self._input_rows(inputs) for inputs in self._inputs)
        gradients = tuple(tuple(self._gradient_rows(tower) for tower in source) for source in sources)
        if self._layer_collection.preset is not None:
            self._take_in(rows, gradients[0])
            return
        if damping is None:
            raise FisherValueError("a block alone needs a damping", help="give a number of at least 0")
        if not hasattr(damping, "producer") and not cast("float", damping) >= 0:
            raise FisherValueError(f"damping must be at least 0, not {damping:g}")
        make = self._layer_collection.make_or_get_factor
        # Layers that read the same inputs share A: tensors are equal by identity.
        A = make(FullyConnectedKroneckerFactor, ((rows,), None, self.has_bias), letter="A")
        G = make(FullyConnectedKroneckerFactor, (gradients,))
        self._factors = (A, G)
        shared = Pi(damping, self._layer_collection.settings.pi).for_uses(int(self.renorm_coeff))
        self._split(shared)
        for factor, own in zip(self._both, self.dampings, strict=True):
            factor.register_damped_inverse(own)

    def _checked(self, grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]]) -> list[list[ir.Value]]:
        if not self._inputs:
            raise FisherValueError(
                "the layer has no registered minibatch", help="call register_additional_minibatch first"
            )
        if not grads_list:
            raise FisherIndexError("the gradients have no source")
        for source in grads_list:
            if len(source) != len(self._inputs):
                raise FisherValueError(
                    f"a source has gradients of {len(source)} towers, but {len(self._inputs)} are registered"
                )
        return [cast("list[ir.Value]", list(source)) for source in grads_list]

    def _split(self, damping: Damping) -> None:
        A, G = (factor.get_cov_var() for factor in self._both)
        n, m = self.parameter_shape
        place = self.place
        (trace,) = place.op("FactorTrace", [A], [Out("trace", FLOAT, [])])
        damping_a, damping_g = damping.split(trace, G, n, m, place)
        if damping_a is None:
            raise AssertionError("a trace of A gives a damping of A")
        self._dampings = (damping_a, damping_g)

    # --- in a training step -------------------------------------------------------------------------

    def _take_in(self, rows: Sequence[ir.Value], gradients: Sequence[ir.Value]) -> None:
        settings, place, make = self._settings, self.place, self._layer_collection.make_or_get_factor
        inputs = self._joined(rows, "h")
        if self.has_bias:
            inputs = with_ones(inputs, place)
        slopes = self._joined(gradients, "g")
        self._number = row_count([slopes], place)
        factors: list[FullyConnectedKroneckerFactor] = []
        for letter, moment, scale in (("A", inputs, None), ("G", slopes, settings.scale)):
            width = _width(moment)
            factor = make(
                FullyConnectedKroneckerFactor,
                (GradientRows(moment, row_count([moment], place), scale=scale), settings.average),
                place=place,
                sample=Sample(rows=max(_SAMPLE, 8 * width)),
                letter=letter,
                power=f"root_{letter}",
            )
            factor.take_in()
            factors.append(factor)
        A, G = factors
        self._factors = (A, G)
        uses = int(self.renorm_coeff) if settings.exponent == -1.0 else 1
        self._split(settings.damping.for_uses(uses))

    def _joined(self, parts: Sequence[ir.Value], name: str) -> ir.Value:
        place = self.place
        rows = [place.float32(part) for part in parts]
        if len(rows) == 1:
            return rows[0]
        emit, axis = place.emitter(Phase.GRADIENTS), {"axis": 0}
        return emit.node(
            "Concat", rows, attributes=axis, name=name, dtype=FLOAT, shape=[None, _width(rows[0])]
        )

    def update(self, dense: ir.Value | None = None, rate: ir.Value | None = None) -> RowUpdate:
        """Emit the direction float32[n, m] of the whole gradient `dense` float32[n, m]."""
        del rate  # the update is never added as it is
        if dense is None or self._number is None:
            raise FisherValueError("a layer is updated from its whole gradient, in a training step")
        place, settings, shape = self.place, self._settings, list(self.parameter_shape)
        powers: list[ir.Value] = []
        for factor, damping in zip(self._both, self.dampings, strict=True):
            size = factor.embedding_dim
            method = step_root(settings.exponent, size, settings.damping.condition(size))
            powers.append(factor.refreshed(damping, method, settings.refresh_every))
        emit = place.emitter(Phase.PRECONDITION)
        left, right = powers
        z = emit.node("MatMul", [left, dense], name="left", dtype=FLOAT, shape=shape)
        z = emit.node("MatMul", [z, right], name="direction", dtype=FLOAT, shape=shape)
        if settings.exponent == -0.5:
            divisor = emit.node("Sqrt", [self._number], name="root_of_rows", dtype=FLOAT, shape=[])
        else:
            divisor = place.number(self.renorm_coeff)
        z = emit.node("Div", [z, divisor], name="direction", dtype=FLOAT, shape=shape)
        name: Any = f"{place.prefix}/momentum"
        old = place.draft.state(name, FLOAT, shape, "zeros", "optimizer", parameter=place.parameter)
        update, momentum = place.op(
            "LayerMomentum",
            [z, old, place.draft.step_number()],
            [Out("update", FLOAT, shape), Out("momentum", FLOAT, shape)],
            Phase.PRECONDITION,
            beta=settings.momentum,
        )
        place.draft.keep(old, momentum, Phase.PRECONDITION)
        place.flag(update)
        return RowUpdate(None, update, unique=True)

    # --- alone --------------------------------------------------------------------------------------

    def register_matpower(self, exponent: float) -> None:
        """Ask for a power of the block, before the inverse update it is read from; 1 and −1 always are."""
        for factor, damping in zip(self._both, self.dampings, strict=True):
            factor.register_matpower(exponent, damping)

    def multiply_matpower(self, vector: ir.Value | SparseRows, exponent: float) -> ir.Value | SparseRows:
        """Return c^e·(A + λ_A·I)^e·V·(G + λ_G·I)^e, of V float32[n, m]."""
        if isinstance(vector, SparseRows):
            raise FisherTypeError("the gradient of a layer is dense, not rows and their indices")
        shape = self.parameter_shape
        if vector.shape is not None and tuple(vector.shape) != shape:
            raise FisherValueError(
                f"the vector has shape {list(vector.shape)}, but the block is over {list(shape)}"
            )
        A, G = self._both
        damping_a, damping_g = self.dampings
        emit = self.place.emitter(Phase.PRECONDITION)
        left, right = A.get_matpower(exponent, damping_a), G.get_matpower(exponent, damping_g)
        product = emit.node("MatMul", [left, vector], dtype=FLOAT, shape=shape)
        product = emit.node("MatMul", [product, right], dtype=FLOAT, shape=shape)
        scale = self.place.number(self.renorm_coeff**exponent)
        return emit.node("Mul", [product, scale], dtype=FLOAT, shape=shape)

    def full_fisher_block(self) -> ir.Value:
        """Return c·kron(A, G), float32[n·m, n·m], undamped and live."""
        block = self.output_factor.outer_with(self.input_factor.get_cov(), self.parameter_shape[0])
        scale = self.place.number(self.renorm_coeff)
        return self.place.emitter(Phase.GRADIENTS).node("Mul", [block, scale], dtype=FLOAT, shape=block.shape)


class FullyConnectedKFACBasicFB(LayerFB):
    """The block of W [n, m], or of W and its bias; a minibatch is inputs [N, n] and products [N, m]."""

    @property
    def renorm_coeff(self) -> float:
        """The coefficient c = 1."""
        return 1.0

    def _input_rows(self, inputs: ir.Value) -> ir.Value:
        return inputs

    def _gradient_rows(self, gradient: ir.Value) -> ir.Value:
        return gradient


class ConvKFACBasicFB(LayerFB):
    """The block of a kernel; a minibatch is inputs [B, channels, l...] and products [B, m, l...]."""

    def __init__(
        self,
        layer_collection: Collection,
        window: Window,
        has_bias: bool = False,
        settings: LayerSettings | None = None,
    ) -> None:
        super().__init__(layer_collection, has_bias, settings)
        self.window = window
        self._patches: dict[ir.Value, ir.Value] = {}

    @property
    def renorm_coeff(self) -> float:
        """The coefficient c = L, the number of places that the kernel is applied at."""
        if self._settings.exponent != -1.0 and self._layer_collection.preset is not None:
            return 1.0
        places = [] if self._outputs[0].shape is None else list(self._outputs[0].shape)[2:]
        if not places or not all(isinstance(size, int) for size in places):
            raise FisherValueError(
                f"the convolution's result '{self._outputs[0].name}' must have fixed lengths",
                help="export the graph with images of one size, or use the exponent -0.5",
            )
        return float(math.prod(cast("list[int]", places)))

    def _input_rows(self, inputs: ir.Value) -> ir.Value:
        """Return each place's patch, float[B·L, channels·∏k], channels first as in the kernel."""
        if inputs in self._patches:
            return self._patches[inputs]
        window, place = self.window, self.place
        emit = place.emitter(Phase.GRADIENTS)
        _, channels, *kernel = window.kernel
        size, spatial = math.prod(kernel), len(kernel)
        # A kernel that is one at one of its places, and zero elsewhere, copies what lies there.
        copies = np.tile(
            np.eye(size, dtype=np.float32).reshape(size, 1, *kernel), (channels, *[1] * (1 + spatial))
        )
        attributes: dict[str, Any] = {
            "group": channels,
            "strides": list(window.strides),
            "dilations": list(window.dilations or [1] * spatial),
        }
        if window.auto_pad == "NOTSET":
            attributes["pads"] = list(window.pads or [0] * 2 * spatial)
        else:
            attributes["auto_pad"] = window.auto_pad
        value = emit.node(
            "Conv",
            [place.float32(inputs), emit.constant(copies, "places_of_kernel")],
            attributes=attributes,
            name="patches",
            dtype=FLOAT,
            shape=[None, channels * size, *[None] * spatial],
        )
        value = _channels_last(emit, value, channels * size, "h")
        self._patches[inputs] = value
        return value

    def _gradient_rows(self, gradient: ir.Value) -> ir.Value:
        emit = self.place.emitter(Phase.GRADIENTS)
        return _channels_last(emit, self.place.float32(gradient), self.window.kernel[0], "g")


def _channels_last(emit: Emitter, value: ir.Value, channels: int, name: str) -> ir.Value:
    """Return float32[B, channels, l...] as rows float32[B·∏l, channels]."""
    rank = len(value.shape or ())
    order = {"perm": [0, *range(2, rank), 1]}
    value = emit.node("Transpose", [value], attributes=order, name=name, dtype=FLOAT)
    rows = emit.constant(np.asarray([-1, channels], np.int64), "rows")
    return emit.node("Reshape", [value, rows], name=name, dtype=FLOAT, shape=[None, channels])


def with_ones(rows: ir.Value, place: Place) -> ir.Value:
    """Return rows float32[N, n] with a column of ones at the end."""
    emit = place.emitter(Phase.GRADIENTS)
    pads = emit.constant(np.asarray([0, 0, 0, 1], np.int64), "one_column")
    shape = [None, _width(rows) + 1]
    return emit.node("Pad", [rows, pads, place.number(1.0)], name="h_and_ones", dtype=FLOAT, shape=shape)


def _width(rows: ir.Value) -> int:
    size = None if rows.shape is None else rows.shape[1]
    if not isinstance(size, int):
        raise FisherValueError(f"'{rows.name}' must have a fixed number of features")
    return size
