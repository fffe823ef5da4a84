"""The block of an output table: the embedding block's mirror image.

    F = A ⊗ I   over W [C, n], the bias as its last column; A = average of hᵀh/N over the N rows of inputs
    update(): momentum of g·(A + λ_A·I)^(−1/2), each row over the root of a window of its mean squares

For an input table the counts are diagonal and G is full; here A is full, and the scale of a class's row takes
the place of a diagonal G. The learning rate is near 1.6 times the matrix's tuned Adam rate. Sources: Martens
& Grosse 2015 (https://arxiv.org/abs/1503.05671), section 3; docs/mathematics.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.fisher.blocks import FisherBlock
from kfac_onnx.fisher.damping import Relative
from kfac_onnx.fisher.errors import FisherTypeError, FisherValueError
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
    from kfac_onnx.fisher.place import Place

__all__ = ["OutputRowFB", "OutputRowSettings"]

_SAMPLE: Final = 1024
"""Rows of h that A takes in at least; from 8·n on a second moment of n features gains nothing from more."""


@dataclass(frozen=True, kw_only=True)
class OutputRowSettings:
    """How an output table is preconditioned."""

    average: Average = field(default_factory=lambda: Average(decay=0.95))
    """How A is averaged."""
    damping: Relative = field(default_factory=lambda: Relative(0.01))
    momentum: float = 0.9
    """Weight kept from the old momentum of g·A^(−1/2)."""
    window: float = 0.8
    """Power p of the window 1 − t^(−p) over a row's mean squares."""
    refresh_every: int = 10
    """Steps between two refreshes of A's power, besides steps 1, 2, 4 and 8."""


class OutputRowFB(FisherBlock):
    """The block of an output table [num_classes, n]; a minibatch is its inputs float[N, n] and its products.

    `settings` are those of a training step.
    """

    def __init__(
        self, layer_collection: Collection, num_classes: int, settings: OutputRowSettings | None = None
    ) -> None:
        super().__init__(layer_collection)
        self.num_classes = num_classes
        self._settings = OutputRowSettings() if settings is None else settings
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._factor: FullyConnectedKroneckerFactor | None = None
        self._damping: ir.Value | None = None

    @property
    def place(self) -> Place:
        """Where the block's nodes and states go."""
        return self._layer_collection.place(self)

    @property
    def input_factor(self) -> FullyConnectedKroneckerFactor:
        """The factor A; raises before `instantiate_factors`."""
        if self._factor is None:
            raise FisherValueError("the block has no factor yet", help="call instantiate_factors first")
        return self._factor

    @property
    def num_registered_minibatches(self) -> int:
        """How many minibatches (towers) were registered."""
        return len(self._inputs)

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """[C, n] of the parameter, its bias among the columns."""
        return (self.num_classes, self.input_factor.embedding_dim)

    def register_additional_minibatch(self, inputs: ir.Value, outputs: ir.Value) -> None:
        """Append a tower's inputs float[N, n] (a column of ones where there is a bias) and its products."""
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
        """Make A of the registered inputs; gradients are not needed.

        None stands for the damping of the settings.
        """
        del grads_list
        if not self._inputs:
            raise FisherValueError(
                "the output table has no registered minibatch",
                help="call register_additional_minibatch first",
            )
        make, settings = self._layer_collection.make_or_get_factor, self._settings
        if self._layer_collection.preset is None:
            if damping is None:
                raise FisherValueError("a block alone needs a damping", help="give a number of at least 0")
            self._factor = make(FullyConnectedKroneckerFactor, ((tuple(self._inputs),),))
            self._damping = self._number(damping)
            self._factor.register_damped_inverse(self._damping)
            return
        place, (rows,) = self.place, self._inputs
        width = rows.shape[1] if rows.shape is not None else None
        if not isinstance(width, int):
            raise FisherValueError(f"'{rows.name}' must have a fixed number of features")
        batch = GradientRows(place.float32(rows), row_count([rows], place))
        sample = Sample(rows=max(_SAMPLE, 8 * width))
        factor = make(
            FullyConnectedKroneckerFactor, (batch, settings.average), place=place, sample=sample, letter="A"
        )
        factor.take_in()
        self._factor = factor
        _, self._damping = settings.damping.split(None, factor.get_cov_var(), 1, width, place)

    def update(self, dense: ir.Value | None = None, rate: ir.Value | None = None) -> RowUpdate:
        """Emit the direction of all rows, float32[C, n], of the whole gradient `dense` float32[C, n]."""
        del rate  # the update is never added as it is
        if dense is None or self._damping is None:
            raise FisherValueError("an output table is updated from its whole gradient, in a training step")
        place, settings, (C, n) = self.place, self._settings, self.parameter_shape
        method = step_root(-0.5, n, settings.damping.condition(n))
        root = self.input_factor.refreshed(self._damping, method, settings.refresh_every)
        emit = place.emitter(Phase.PRECONDITION)
        z = emit.node("MatMul", [dense, root], name="rotated", dtype=FLOAT, shape=[C, n])
        momentum = self._state("momentum", [C, n])
        window = self._state("window", [C])
        outs = [Out("update", FLOAT, [C, n]), Out("momentum", FLOAT, [C, n]), Out("window", FLOAT, [C])]
        update, new_momentum, new_window = place.op(
            "OutputRowScale",
            [z, momentum, window, place.draft.step_number()],
            outs,
            Phase.PRECONDITION,
            beta=settings.momentum,
            power=settings.window,
        )
        place.draft.keep(momentum, new_momentum, Phase.PRECONDITION)
        place.draft.keep(window, new_window, Phase.PRECONDITION)
        place.flag(new_window)
        place.flag(update)
        return RowUpdate(None, update, unique=True)

    def multiply_matpower(self, vector: ir.Value | SparseRows, exponent: float) -> ir.Value | SparseRows:
        """Return x·(A + λ_A·I)^exponent, of x float32[C, n]."""
        if isinstance(vector, SparseRows):
            raise FisherTypeError("the gradient of an output table is dense, not rows and their indices")
        matrix = self.input_factor.get_matpower(exponent, self._number(self._damping))
        emit = self.place.emitter(Phase.PRECONDITION)
        return emit.node("MatMul", [vector, matrix], dtype=FLOAT, shape=list(self.parameter_shape))

    def full_fisher_block(self) -> ir.Value:
        """Return kron(I, A), float32[C·n, C·n], undamped and live."""
        emit = self.place.emitter(Phase.GRADIENTS)
        eye = emit.constant(np.eye(self.num_classes, dtype=np.float32), "eye")
        return self.input_factor.outer_with(eye, self.num_classes)

    def _state(self, what: str, shape: list[int]) -> ir.Value:
        place = self.place
        name: Any = f"{place.prefix}/{what}"
        return place.draft.state(name, FLOAT, shape, "zeros", "optimizer", parameter=place.parameter)

    def _number(self, damping: float | ir.Value | None) -> ir.Value:
        if damping is None:
            raise FisherValueError("the block has no damping yet", help="call instantiate_factors first")
        return self.place.number(damping) if isinstance(damping, (int, float)) else damping
