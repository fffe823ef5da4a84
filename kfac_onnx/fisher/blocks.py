"""Fisher blocks: the Kronecker-factored block of an embedding.

    F = c · diag(A) ⊗ G  over the [V, D] parameter, row-major
    multiply_matpower(x, e): y_n = c^e · (A[i_n] + λ_A)^e · (x_n (G + λ_G I)^e)

A, λ_A and λ_G are live; the powers of G are those of the last inverse update, except e = 1.
Source: spec section 1; Martens & Grosse 2015; Grosse & Martens 2016 for several uses.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.fisher.damping import split_damping, trace_ratio
from kfac_onnx.fisher.errors import FisherIndexError, FisherValueError
from kfac_onnx.fisher.input_factor import EmbeddingInputKroneckerFactor
from kfac_onnx.fisher.output_factor import FullyConnectedKroneckerFactor
from kfac_onnx.graph.symbols import SparseRows, apply, call, constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.fisher.layer_collection import LayerCollection
    from kfac_onnx.graph.symbols import Variable

__all__ = ["EmbeddingKFACFB", "EmbeddingKFACMultiIndepFB", "FisherBlock", "KroneckerProductFB"]

_FLOAT = int(ir.DataType.FLOAT)


class FisherBlock(abc.ABC):
    """One parameter's block of the Fisher matrix, registered one minibatch (tower) at a time."""

    def __init__(self, layer_collection: LayerCollection) -> None:
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
        self, grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]], damping: float | ir.Value
    ) -> None:
        """Make the factors from gradients [source][tower] and a damping λ ≥ 0, number or scalar tensor."""

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

    def __init__(self, layer_collection: LayerCollection) -> None:
        super().__init__(layer_collection)
        self._input: EmbeddingInputKroneckerFactor | None = None
        self._output: FullyConnectedKroneckerFactor | None = None
        self._dampings: tuple[ir.Value, ir.Value] | None = None

    @property
    def input_factor(self) -> EmbeddingInputKroneckerFactor:
        """The factor A; raises before `instantiate_factors`."""
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
    def parameter_shape(self) -> tuple[int, int]:
        """[V, D] of the parameter."""
        return (self.input_factor.vocab_size, self.output_factor.embedding_dim)

    @property
    def renorm_coeff(self) -> float:
        """The coefficient c of the block."""
        return 1.0

    @property
    def dampings(self) -> tuple[ir.Value, ir.Value]:
        """λ_A and λ_G, float32 scalars, live."""
        if self._dampings is None:
            raise FisherValueError("the block has no damping yet", help="call instantiate_factors first")
        return self._dampings

    def pi(self) -> ir.Value:
        """Return the ratio that splits the damping between the factors, float32 scalar, live."""
        return trace_ratio(self.input_factor, self.output_factor, self._layer_collection.settings)

    def variables(self) -> tuple[Variable, ...]:
        """Return all state of the block."""
        return (*self.input_factor.variables, *self.output_factor.variables)

    def register_matpower(self, exponent: float) -> None:
        """Ask for a power of the block, before the inverse update it is read from; 1 and −1 always are."""
        self.output_factor.register_matpower(exponent, self.dampings[1])

    def multiply_matpower(self, vector: ir.Value | SparseRows, exponent: float) -> ir.Value | SparseRows:
        """Return c^e (A+λ_A)^e x (G+λ_G I)^e; duplicates among sparse indices stay apart."""
        damping_a, damping_g = self.dampings
        matrix = self.output_factor.get_matpower(exponent, damping_g)
        if isinstance(vector, SparseRows):
            self._check_shape(vector.dense_shape)
            a, rows = self.input_factor.rows(vector.indices), call("Cast", vector.values, to=_FLOAT)
            inputs = (rows, a, damping_a, matrix, constant(1.0))
            (values,) = apply("PreconditionRows", *inputs, exponent=float(exponent))
            return SparseRows(vector.indices, self._renormed(values, exponent), vector.dense_shape)
        if vector.shape is not None:
            self._check_shape(tuple(vector.shape))
        grad = call("Cast", vector, to=_FLOAT)
        factor = self.input_factor
        state = (grad, factor.stored, factor.gain, damping_a, matrix)
        (values,) = apply("PreconditionDense", *state, exponent=float(exponent))
        return self._renormed(values, exponent)

    def full_fisher_block(self) -> ir.Value:
        """Return c·kron(diag(A), G), float32[V·D, V·D], undamped and live."""
        factor = self.input_factor
        block = self.output_factor.outer_with(factor.get_cov(), factor.vocab_size)
        return block if self.renorm_coeff == 1 else call("Mul", block, constant(self.renorm_coeff))

    def _renormed(self, values: ir.Value, exponent: float) -> ir.Value:
        if self.renorm_coeff == 1:
            return values
        return call("Mul", values, constant(self.renorm_coeff**exponent))

    def _check_shape(self, shape: Sequence[object]) -> None:
        expected = self.parameter_shape
        wrong = len(shape) != 2 or any(
            isinstance(size, int) and size != known for size, known in zip(shape, expected, strict=False)
        )
        if wrong:
            raise FisherValueError(
                f"the vector has shape {list(shape)}, but the block is over {list(expected)}"
            )

    def _instantiate(
        self,
        inputs: tuple[tuple[ir.Value, ...], ...],
        gradients: tuple[tuple[tuple[ir.Value, ...], ...], ...],
        vocab_size: int,
        damping: float | ir.Value,
    ) -> None:
        collection = self._layer_collection
        self._input = collection.make_or_get_factor(EmbeddingInputKroneckerFactor, (inputs, vocab_size))
        self._output = collection.make_or_get_factor(FullyConnectedKroneckerFactor, (gradients,))
        uses = self.renorm_coeff
        self._dampings = split_damping(self._input, self._output, damping, uses, collection.settings)
        self._input.register_damped_inverse(self._dampings[0])
        self._output.register_damped_inverse(self._dampings[1])


class EmbeddingKFACFB(KroneckerProductFB):
    """The block of an embedding [vocab_size, D] that is looked up once per example.

    A minibatch is ids integer [B] or [B, K] and outputs float[B, D], the looked-up (and summed) rows.
    """

    def __init__(self, layer_collection: LayerCollection, vocab_size: int) -> None:
        super().__init__(layer_collection)
        self.vocab_size = vocab_size
        self._inputs: list[tuple[ir.Value, ...]] = []
        self._outputs: list[tuple[ir.Value, ...]] = []

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

    def tensors_to_compute_grads(self) -> list[ir.Value | tuple[ir.Value, ...]]:
        """Return the registered outputs, in order."""
        return [outputs[0] if len(outputs) == 1 else outputs for outputs in self._outputs]

    def instantiate_factors(
        self, grads_list: Sequence[Sequence[ir.Value | Sequence[ir.Value]]], damping: float | ir.Value
    ) -> None:
        """Make the factors from gradients [source][tower] (of several uses: [source][tower][use])."""
        if not self._inputs:
            raise FisherValueError(
                "the embedding has no registered minibatch", help="call register_additional_minibatch first"
            )
        if not grads_list:
            raise FisherIndexError("the gradients have no source")
        if not isinstance(damping, ir.Value) and not damping >= 0:
            raise FisherValueError(f"damping must be at least 0, not {damping:g}")
        gradients = tuple(
            tuple((tower,) if isinstance(tower, ir.Value) else tuple(tower) for tower in source)
            for source in grads_list
        )
        for source in gradients:
            if len(source) != len(self._inputs):
                raise FisherValueError(
                    f"a source has gradients of {len(source)} towers, but {len(self._inputs)} are registered"
                )
        self._instantiate(tuple(self._inputs), gradients, self.vocab_size, damping)


class EmbeddingKFACMultiIndepFB(EmbeddingKFACFB):
    """The block of an embedding that each example looks up `num_uses` times, taken as independent.

    All uses are stacked; λ/U stands for λ and c = U. A minibatch is a list over uses, or one tensor with
    the uses folded into the first dimension.
    """

    def __init__(
        self, layer_collection: LayerCollection, vocab_size: int, num_uses: int | None = None
    ) -> None:
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
