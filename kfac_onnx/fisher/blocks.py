"""Fisher blocks: the Kronecker-factored block of an embedding.

    F = c · diag(A) ⊗ G  over the [V, D] parameter, row-major
    multiply_matpower(x, e): y_n = c^e · (A[i_n] + λ_A)^e · (x_n (G + λ_G I)^e)
    update(): y = scale( Grad · (G + λ_G I)^e ), with the powers and the row scale of a preset

A, λ_A and λ_G are live; the powers of G are those of the last inverse update, except e = 1.
Source: Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671); Grosse & Martens 2016
(https://arxiv.org/abs/1602.01407) for several uses; docs/mathematics.md.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import onnx_ir as ir

from kfac_onnx.fisher.damping import Pi
from kfac_onnx.fisher.errors import FisherIndexError, FisherValueError
from kfac_onnx.fisher.input_factor import EmbeddingInputKroneckerFactor
from kfac_onnx.fisher.lookups import step_lookups
from kfac_onnx.fisher.output_factor import FullyConnectedKroneckerFactor
from kfac_onnx.fisher.roots import step_root
from kfac_onnx.fisher.row_scales import Counts, InputPower, TableGradient
from kfac_onnx.fisher.sampling import GradientRows, Sample
from kfac_onnx.fisher.symbols import SparseRows
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import FLOAT, INT64

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from kfac_onnx.fisher.damping import Damping
    from kfac_onnx.fisher.lookups import Lookups
    from kfac_onnx.fisher.place import Place
    from kfac_onnx.fisher.presets import Preset
    from kfac_onnx.fisher.projections import Positions
    from kfac_onnx.fisher.row_scales import RowUpdate
    from kfac_onnx.fisher.settings import FactorSettings

__all__ = ["EmbeddingKFACFB", "EmbeddingKFACMultiIndepFB", "FisherBlock", "KroneckerProductFB"]

F = TypeVar("F")


class Collection(Protocol):
    """What a block needs of its layer collection."""

    @property
    def settings(self) -> FactorSettings:
        """The factors' switches."""
        ...

    @property
    def preset(self) -> Preset | None:
        """The settings of a training step; None for blocks alone."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether a training step adds rows to the tables itself."""
        ...

    def place(self, block: FisherBlock) -> Place:
        """Return where a block's nodes and states go."""
        ...

    def make_or_get_factor(self, cls: type[F], args: tuple[Hashable, ...], **options: Any) -> F:
        """Return the factor `cls(*args)`, one object for equal arguments."""
        ...


class FisherBlock(abc.ABC):
    """One parameter's block of the Fisher matrix, registered one minibatch (tower) at a time."""

    def __init__(self, layer_collection: Collection) -> None:
        self._layer_collection = layer_collection

    @property
    @abc.abstractmethod
    def num_registered_minibatches(self) -> int:
        """How many minibatches (towers) were registered."""

    @property
    @abc.abstractmethod
    def parameter_shape(self) -> tuple[int, int]:
        """[V, D] of the parameter; known once the factors are."""

    @abc.abstractmethod
    def tensors_to_compute_grads(self) -> list[ir.Value | tuple[ir.Value, ...]]:
        """Return the registered outputs, in order; gradients are delivered as [source][tower]."""

    @abc.abstractmethod
    def instantiate_factors(
        self,
        grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]],
        damping: float | ir.Value | None = None,
    ) -> None:
        """Make the factors from gradients [source][tower] and a damping λ ≥ 0, number or scalar tensor.

        In a training step they take in the batch, and None stands for the preset's damping.
        """

    @abc.abstractmethod
    def update(self, dense: ir.Value | None = None, rate: ir.Value | None = None) -> RowUpdate:
        """Emit what the parameter gets in a training step: its preconditioned gradient.

        `dense` float32[V, D] is the whole gradient, where it is more than the rows of the lookups. Given the
        learning rate, the update may be what is added to the parameter: −lr is in it then.
        """

    @abc.abstractmethod
    def multiply_matpower(self, vector: ir.Value | SparseRows, exponent: float) -> ir.Value | SparseRows:
        """Return the damped block to a power, times a vector [V, D] or rows of one."""

    @abc.abstractmethod
    def full_fisher_block(self) -> ir.Value:
        """Return the undamped block as a matrix, for tests."""

    def multiply(self, vector: ir.Value | SparseRows) -> ir.Value | SparseRows:
        """Return the damped block times a vector."""
        return self.multiply_matpower(vector, 1.0)

    def multiply_inverse(self, vector: ir.Value | SparseRows) -> ir.Value | SparseRows:
        """Return the damped block's inverse times a vector."""
        return self.multiply_matpower(vector, -1.0)


class KroneckerProductFB(FisherBlock):
    """A block that is the Kronecker product of a diagonal input factor and an output factor."""

    def __init__(self, layer_collection: Collection) -> None:
        super().__init__(layer_collection)
        self._input: EmbeddingInputKroneckerFactor | None = None
        self._output: FullyConnectedKroneckerFactor | None = None
        self._damping: Damping | None = None
        self._split: tuple[ir.Value | None, ir.Value] | None = None

    @property
    def place(self) -> Place:
        """Where the block's nodes and states go."""
        return self._layer_collection.place(self)

    @property
    def input_factor(self) -> EmbeddingInputKroneckerFactor:
        """The factor A; raises before `instantiate_factors`, and where a preset has no A."""
        if self._input is None:
            raise FisherValueError("the block has no factors yet", help="call instantiate_factors first")
        return self._input

    @property
    def output_factor(self) -> FullyConnectedKroneckerFactor:
        """The factor G; raises before `instantiate_factors`."""
        if self._output is None:
            raise FisherValueError("the block has no factors yet", help="call instantiate_factors first")
        return self._output

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """V of the parameter [V, D]."""

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """[V, D] of the parameter."""
        return (self.num_rows, self.output_factor.embedding_dim)

    @property
    def renorm_coeff(self) -> float:
        """The coefficient c of the block."""
        return 1.0

    @property
    def dampings(self) -> tuple[ir.Value, ir.Value]:
        """λ_A and λ_G, float32 scalars, live."""
        damping_a, damping_g = self._dampings()
        if damping_a is None:
            raise FisherValueError("the block has no input factor, and so no damping of it")
        return damping_a, damping_g

    def output_damping(self) -> ir.Value:
        """Return λ_G, float32 scalar, live."""
        return self._dampings()[1]

    def _dampings(self) -> tuple[ir.Value | None, ir.Value]:
        if self._damping is None:
            raise FisherValueError("the block has no damping yet", help="call instantiate_factors first")
        if self._split is None:
            total = None if self._input is None else self._input.total()
            factor, (V, D) = self.output_factor.get_cov_var(), self.parameter_shape
            self._split = self._damping.split(total, factor, V, D, self.place)
        return self._split

    def pi(self) -> ir.Value:
        """Return the ratio that splits the damping between the factors, float32 scalar, live."""
        factor, ratio = self.output_factor.get_cov_var(), Pi(1.0, self._layer_collection.settings.pi)
        return ratio.ratio(self.input_factor.total(), factor, self.num_rows, self.place)

    def states(self) -> tuple[ir.Value, ...]:
        """Return all state of the block."""
        return (*self.input_factor.states, *self.output_factor.states)

    def register_matpower(self, exponent: float) -> None:
        """Ask for a power of the block, before the inverse update it is read from; 1 and −1 always are."""
        self.output_factor.register_matpower(exponent, self.output_damping)

    def multiply_matpower(self, vector: ir.Value | SparseRows, exponent: float) -> ir.Value | SparseRows:
        """Return c^e (A+λ_A)^e x (G+λ_G I)^e; duplicates among sparse indices stay apart."""
        damping_a, _ = self.dampings
        matrix = self.output_factor.get_matpower(exponent, self.output_damping)
        place, factor = self.place, self.input_factor
        if isinstance(vector, SparseRows):
            self._check_shape(vector.dense_shape)
            rows = place.float32(vector.values, Phase.PRECONDITION)
            inputs = (rows, factor.rows(vector.indices), damping_a, matrix, place.number(1.0))
            (values,) = place.op(
                "PreconditionRows",
                inputs,
                [Out("update", FLOAT, rows.shape)],
                Phase.PRECONDITION,
                exponent=float(exponent),
            )
            return SparseRows(vector.indices, self._renormed(values, exponent), vector.dense_shape)
        if vector.shape is not None:
            self._check_shape(tuple(vector.shape))
        grad, reading = place.float32(vector, Phase.PRECONDITION), factor.reading
        (values,) = place.op(
            "PreconditionDense",
            (grad, place.float32(reading.stored, Phase.PRECONDITION), reading.gain, damping_a, matrix),
            [Out("update", FLOAT, list(self.parameter_shape))],
            Phase.PRECONDITION,
            exponent=float(exponent),
        )
        return self._renormed(values, exponent)

    def full_fisher_block(self) -> ir.Value:
        """Return c·kron(diag(A), G), float32[V·D, V·D], undamped and live."""
        block = self.output_factor.outer_with(self.input_factor.get_cov(), self.num_rows)
        return self._renormed(block, 1.0)

    def _renormed(self, values: ir.Value, exponent: float) -> ir.Value:
        if self.renorm_coeff == 1:
            return values
        scale = self.place.number(self.renorm_coeff**exponent)
        emit = self.place.emitter(Phase.PRECONDITION)
        return emit.node("Mul", [values, scale], dtype=FLOAT, shape=values.shape)

    def _check_shape(self, shape: Sequence[object]) -> None:
        expected = self.parameter_shape
        wrong = len(shape) != 2 or any(
            isinstance(size, int) and size != own for size, own in zip(shape, expected, strict=False)
        )
        if wrong:
            raise FisherValueError(
                f"the vector has shape {list(shape)}, but the block is over {list(expected)}"
            )


class EmbeddingKFACFB(KroneckerProductFB):
    """The block of an embedding [vocab_size, D] that is looked up once per example.

    A minibatch is ids integer [B] or [B, K] and outputs float[B, D], the looked-up (and summed) rows. In a
    training step there is one, of all lookups: ids int64[N], inside the table, and rows float32[N, D].
    """

    def __init__(self, layer_collection: Collection, vocab_size: int) -> None:
        super().__init__(layer_collection)
        self.vocab_size = vocab_size
        self._inputs: list[tuple[ir.Value, ...]] = []
        self._outputs: list[tuple[ir.Value, ...]] = []
        self._keep: ir.Value | None = None
        self._positions: list[Positions] = []
        self._scale: ir.Value | None = None
        self._lookups: Lookups | None = None
        self._rows: ir.Value | None = None
        self._sample = Sample()

    @property
    def num_rows(self) -> int:
        """V of the parameter [V, D]."""
        return self.vocab_size

    @property
    def num_registered_minibatches(self) -> int:
        """How many minibatches (towers) were registered."""
        return len(self._inputs)

    @property
    def num_uses(self) -> int:
        """How often each example looks the table up."""
        return 1

    def register_additional_minibatch(self, inputs: ir.Value, outputs: ir.Value) -> None:
        """Append a tower's ids and outputs; towers that come after `instantiate_factors` are not read."""
        self._inputs.append((inputs,))
        self._outputs.append((outputs,))

    def register_step(
        self, *, keep: ir.Value | None, positions: Sequence[Positions], scale: ir.Value | None
    ) -> None:
        """Say what else the statistics of a training step depend on.

        `keep` float32[N] is 0 for a lookup that the graph drops; `positions` are further lookups, of the
        table's projections; `scale` (c², where c divides a mean loss) multiplies the second moment of rows.
        """
        self._keep, self._positions, self._scale = keep, list(positions), scale

    def tensors_to_compute_grads(self) -> list[ir.Value | tuple[ir.Value, ...]]:
        """Return the registered outputs, in order."""
        return [outputs[0] if len(outputs) == 1 else outputs for outputs in self._outputs]

    def instantiate_factors(
        self,
        grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]],
        damping: float | ir.Value | None = None,
    ) -> None:
        """Make the factors from gradients [source][tower] (of several uses: [source][tower][use])."""
        gradients = self._checked(grads_list)
        preset = self._layer_collection.preset
        if preset is not None:
            self._damping = preset.damping.for_uses(self.num_uses)
            self._take_in(preset, gradients[0][0][0])
            return
        if damping is None:
            raise FisherValueError("a block alone needs a damping", help="give a number of at least 0")
        if not isinstance(damping, ir.Value) and not damping >= 0:
            raise FisherValueError(f"damping must be at least 0, not {damping:g}")
        self._damping = Pi(damping, self._layer_collection.settings.pi).for_uses(self.num_uses)
        make = self._layer_collection.make_or_get_factor
        self._input = make(EmbeddingInputKroneckerFactor, (tuple(self._inputs), self.vocab_size))
        self._output = make(FullyConnectedKroneckerFactor, (gradients,))
        self._input.register_damped_inverse(self.output_damping)
        self._output.register_damped_inverse(self.output_damping)

    def _checked(
        self, grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]]
    ) -> tuple[tuple[tuple[ir.Value, ...], ...], ...]:
        """Return gradients as tuples; raises where they do not fit the registered minibatches."""
        if not self._inputs:
            raise FisherValueError(
                "the embedding has no registered minibatch", help="call register_additional_minibatch first"
            )
        if not grads_list:
            raise FisherIndexError("the gradients have no source")
        gradients = tuple(
            tuple((tower,) if isinstance(tower, ir.Value) else tuple(tower) for tower in source)
            for source in grads_list
        )
        for source in gradients:
            if len(source) != len(self._inputs):
                raise FisherValueError(
                    f"a source has gradients of {len(source)} towers, but {len(self._inputs)} are registered"
                )
        return gradients

    # --- in a training step -------------------------------------------------------------------------

    def _take_in(self, preset: Preset, rows: ir.Value) -> None:
        """Make the factors of a training step, and let them take in its lookups."""
        place, make = self.place, self._layer_collection.make_or_get_factor
        ((ids,),) = self._inputs
        self._rows = rows
        self._lookups = step_lookups(ids, self._keep, self._positions, place)
        if isinstance(preset.rows, Counts):
            arguments = (self._lookups, self.vocab_size, preset.rows.average)
            self._input = make(EmbeddingInputKroneckerFactor, arguments, place=place, share=preset.rows.share)
            self._input.take_in()
        masked = self._keep is not None or bool(self._positions)
        self._sample = preset.sample.bounded(_width(rows) or 0, masked=masked)
        batch = self._gradient_rows(rows, self._lookups, partial=self._sample.partial)
        self._output = make(
            FullyConnectedKroneckerFactor, (batch, preset.output), place=place, sample=self._sample
        )
        self._output.take_in()

    def _gradient_rows(self, rows: ir.Value, lookups: Lookups, *, partial: bool) -> GradientRows:
        """Return the rows that G takes: of lookups, and of projections."""
        place, emit = self.place, self.place.emitter(Phase.GRADIENTS)
        stacked, kept, along = rows, None, {"axis": 0}
        if self._positions:
            parts = [rows, *(projection.rows for projection in self._positions)]
            stacked = emit.node(
                "Concat", parts, attributes=along, name="rows", dtype=FLOAT, shape=[None, _width(rows)]
            )
        if partial and (self._keep is not None or self._positions):
            flags = [lookups.weighted(place.number(1.0), place)]
            for projection in self._positions:
                size = emit.node(
                    "Shape", [projection.rows], attributes={"end": 1}, name="size", dtype=INT64, shape=[1]
                )
                flags.append(
                    emit.node("Expand", [projection.number, size], name="kept", dtype=FLOAT, shape=[None])
                )
            kept = emit.node("Concat", flags, attributes=along, name="kept", dtype=FLOAT, shape=[None])
        return GradientRows(stacked, lookups.number, kept, self._scale)

    def update(self, dense: ir.Value | None = None, rate: ir.Value | None = None) -> RowUpdate:
        """Emit the preconditioned rows of the lookups, or the whole preconditioned gradient."""
        preset = self._layer_collection.preset
        if preset is None or self._lookups is None or self._rows is None:
            raise FisherValueError("a block alone has no step", help="give the collection a preset")
        place, output, dim = self.place, self.output_factor, self.output_factor.embedding_dim
        damping_a, damping_g = self._dampings()
        root = self._refreshed_root(preset, damping_g)
        if dense is not None or self._sample.partial:
            # Otherwise G takes all rows: where nothing must move there are none, or all are zero.
            active = output.is_active(self._lookups.number)
            root = place.emitter(Phase.PRECONDITION).node(
                "Where", [active, root, place.number(0.0)], name="active_root", dtype=FLOAT, shape=root.shape
            )
        power: InputPower | None = None
        exponent = preset.power("A")
        if self._input is not None and damping_a is not None and exponent is not None:
            power = InputPower(self._input, damping_a, exponent, self.renorm_coeff)
        gradient = TableGradient(
            self._lookups, self._rows, dense, self.vocab_size, dim, self._layer_collection.in_place
        )
        result = preset.rows.update(gradient, root, power, rate, place)
        place.flag(result.update)
        return result

    def _refreshed_root(self, preset: Preset, damping_g: ir.Value) -> ir.Value:
        exponent, output = preset.power("G"), self.output_factor
        if exponent is None or self._damping is None:
            raise AssertionError("every preset has a power of G and a damping")
        condition = self._damping.condition(output.embedding_dim)
        method = step_root(exponent, output.embedding_dim, condition)
        return output.refreshed(damping_g, method, preset.refresh_every)


def _width(rows: ir.Value) -> int | None:
    size = None if rows.shape is None else rows.shape[1]
    return size if isinstance(size, int) else None


class EmbeddingKFACMultiIndepFB(EmbeddingKFACFB):
    """The block of an embedding that each example looks up `num_uses` times, taken as independent.

    All uses are stacked; λ/U stands for λ and c = U. A minibatch is a list over uses, or one tensor with
    the uses folded into the first dimension.
    """

    def __init__(self, layer_collection: Collection, vocab_size: int, num_uses: int | None = None) -> None:
        super().__init__(layer_collection, vocab_size)
        self._num_uses = num_uses

    @property
    def num_uses(self) -> int:
        """How often each example looks the table up."""
        if self._num_uses is None:
            raise FisherValueError("the number of uses is not known", help="give num_uses")
        return self._num_uses

    @property
    def renorm_coeff(self) -> float:
        """The coefficient c = U of the block."""
        return float(self.num_uses)

    def register_additional_minibatch(
        self, inputs: ir.Value | Sequence[ir.Value], outputs: ir.Value | Sequence[ir.Value]
    ) -> None:
        """Append a tower: lists over uses, or tensors that fold the uses into the first dimension."""
        uses = {len(part) for part in (inputs, outputs) if not isinstance(part, ir.Value)}
        if self._num_uses is not None:
            uses.add(self._num_uses)
        if len(uses) > 1:
            raise FisherValueError(f"the minibatch disagrees on the number of uses: {sorted(uses)}")
        if not uses:
            raise FisherValueError(
                "the number of uses is not known", help="give num_uses, or lists over uses"
            )
        self._num_uses = uses.pop()
        self._inputs.append((inputs,) if isinstance(inputs, ir.Value) else tuple(inputs))
        self._outputs.append((outputs,) if isinstance(outputs, ir.Value) else tuple(outputs))
