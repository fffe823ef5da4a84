"""The collection of registered parameters, their blocks and their factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import onnx_ir as ir

from kfac_onnx.fisher.blocks import EmbeddingKFACFB, EmbeddingKFACMultiIndepFB, FisherBlock
from kfac_onnx.fisher.errors import FisherKeyError, FisherTypeError, FisherValueError
from kfac_onnx.fisher.layer_blocks import ConvKFACBasicFB, FullyConnectedKFACBasicFB
from kfac_onnx.fisher.output_rows import OutputRowFB
from kfac_onnx.fisher.place import Place
from kfac_onnx.fisher.settings import FactorSettings
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.step.draft import Draft

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from kfac_onnx.fisher.layer_blocks import LayerSettings, Window
    from kfac_onnx.fisher.output_rows import OutputRowSettings
    from kfac_onnx.fisher.presets import Preset

__all__ = ["AUTO_REUSE", "LayerCollection", "Reuse"]

AUTO_REUSE: Final = "auto"
"""Add a minibatch where the parameter is registered, otherwise register it."""

Reuse = bool | Literal["auto"]

F = TypeVar("F")
B = TypeVar("B", bound=FisherBlock)

LayerKey = ir.Value | tuple[ir.Value, ...]


class LayerCollection:
    """Registered parameters with their blocks; factors are shared between equal requests.

    Parameters, ids and outputs are symbolic tensors (`ir.Value`). Alone (a `FisherSession` runs it) its
    blocks are updated when asked, with `settings` as the factors' switches. In a training step, which is
    `draft`, they do what `preset` says; `in_place` says whether it adds rows to the tables itself.
    """

    def __init__(
        self,
        settings: FactorSettings | None = None,
        *,
        preset: Preset | None = None,
        draft: Draft | None = None,
        in_place: bool = True,
    ) -> None:
        if (preset is None) != (draft is None):
            raise FisherValueError("a training step needs both a preset and a draft of the step")
        self.settings = FactorSettings() if settings is None else settings
        self.preset = preset
        self.in_place = in_place
        self.draft = _alone() if draft is None else draft
        self._blocks: dict[LayerKey, FisherBlock] = {}
        self._factors: dict[tuple[type[Any], tuple[Hashable, ...]], Any] = {}
        self._linked: dict[frozenset[ir.Value], str | None] = {}
        self._default_embedding = "kron"
        self._default_embedding_multi = "kron_indep"

    @property
    def registered_variables(self) -> list[ir.Value]:
        """The parameters that have a block, in the order of registration."""
        return [param for key in self._blocks for param in _members(key)]

    @property
    def linked_parameters(self) -> dict[frozenset[ir.Value], str | None]:
        """The groups of parameters that are approximated together, with their approximation."""
        return dict(self._linked)

    @property
    def default_embedding_approximation(self) -> str:
        """The approximation of an embedding for which none is named."""
        return self._default_embedding

    def set_default_embedding_approximation(self, value: str) -> None:
        """Set the approximation of embeddings for which none is named; only "kron" exists."""
        self._default_embedding = _known_approximation(value, ("kron",))

    @property
    def default_embedding_multi_approximation(self) -> str:
        """The approximation of an embedding with several uses for which none is named."""
        return self._default_embedding_multi

    def set_default_embedding_multi_approximation(self, value: str) -> None:
        """Set the approximation of embeddings with several uses; only "kron_indep" exists."""
        self._default_embedding_multi = _known_approximation(value, ("kron_indep",))

    def register_embedding(
        self,
        params: ir.Value,
        inputs: ir.Value,
        outputs: ir.Value,
        approx: str | None = None,
        reuse: Reuse = False,
    ) -> EmbeddingKFACFB:
        """Register a minibatch of an embedding: table [V, D], ids [B] or [B, K], outputs [B, D]."""
        vocab_size = _vocab_size(params)
        self._approximation(params, approx, self._default_embedding, ("kron",))
        block = self.register_block(params, EmbeddingKFACFB(self, vocab_size), reuse=reuse)
        block.register_additional_minibatch(inputs, outputs)
        return block

    def register_embedding_multi(
        self,
        params: ir.Value,
        inputs: ir.Value | Sequence[ir.Value],
        outputs: ir.Value | Sequence[ir.Value],
        num_uses: int | None = None,
        approx: str | None = None,
        reuse: Reuse = False,
    ) -> EmbeddingKFACMultiIndepFB:
        """Register a minibatch of an embedding that each example uses several times.

        `inputs` and `outputs` are lists over uses, or tensors that fold the uses into the first dimension
        (then `num_uses` is needed, unless the other one is a list).
        """
        vocab_size = _vocab_size(params)
        self._approximation(params, approx, self._default_embedding_multi, ("kron_indep",))
        block = self.register_block(
            params, EmbeddingKFACMultiIndepFB(self, vocab_size, num_uses), reuse=reuse
        )
        block.register_additional_minibatch(inputs, outputs)
        return block

    def register_softmax_output(
        self,
        params: ir.Value | tuple[ir.Value, ir.Value],
        inputs: ir.Value,
        outputs: ir.Value,
        *,
        num_classes: int,
        settings: OutputRowSettings | None = None,
        reuse: Reuse = False,
    ) -> OutputRowFB:
        """Register a minibatch of an output table W [C, n], or of W and its bias.

        `inputs` [N, n] are what W multiplies, with a column of ones at the end where there is a bias;
        `outputs` [N, C] the products.
        """
        block = self.register_block(params, OutputRowFB(self, num_classes, settings), reuse=reuse)
        block.register_additional_minibatch(inputs, outputs)
        return block

    def register_fully_connected(
        self,
        params: ir.Value | tuple[ir.Value, ir.Value],
        inputs: ir.Value,
        outputs: ir.Value,
        approx: str | None = None,
        reuse: Reuse = False,
        *,
        settings: LayerSettings | None = None,
    ) -> FullyConnectedKFACBasicFB:
        """Register a minibatch of a layer W [n, m], or of W and its bias [m].

        `inputs` [N, n] are what W multiplies, `outputs` [N, m] the products. Vectors of the block are
        float[n, m], with the bias as last row. `settings` are those of a training step.
        """
        _known_approximation("kron" if approx is None else approx, ("kron",), "a layer")
        has_bias = isinstance(params, tuple)
        block = self.register_block(params, FullyConnectedKFACBasicFB(self, has_bias, settings), reuse=reuse)
        block.register_additional_minibatch(inputs, outputs)
        return block

    def register_conv2d(
        self,
        params: ir.Value | tuple[ir.Value, ir.Value],
        window: Window,
        inputs: ir.Value,
        outputs: ir.Value,
        approx: str | None = None,
        reuse: Reuse = False,
        *,
        settings: LayerSettings | None = None,
    ) -> ConvKFACBasicFB:
        """Register a minibatch of a kernel [m, channels, kh, kw], or of a kernel and its bias [m].

        Tensors are laid out as ONNX has them: `inputs` [B, channels, h, w], `outputs` [B, m, h', w']. Vectors
        of the block are float[channels·kh·kw, m], with the bias as last row; `window` stands for the
        original's strides and padding.
        """
        _known_approximation("kron" if approx is None else approx, ("kron",), "a convolution")
        has_bias = isinstance(params, tuple)
        block = self.register_block(params, ConvKFACBasicFB(self, window, has_bias, settings), reuse=reuse)
        block.register_additional_minibatch(inputs, outputs)
        return block

    def register_block(self, layer_key: LayerKey, fisher_block: B, reuse: Reuse = False) -> B:
        """Register a block under its parameter (or tuple of them) and return the block in force.

        reuse False: the parameter must be new. True: it must be known. AUTO_REUSE: either.
        """
        if reuse not in (True, False, AUTO_REUSE):
            raise FisherValueError(f"reuse must be True, False or '{AUTO_REUSE}', not {reuse!r}")
        name = _quoted(layer_key)
        known = self._blocks.get(layer_key)
        if known is None:
            if reuse is True:
                raise FisherKeyError(f"parameter {name} is not registered, so it cannot be reused")
            self._check_new(layer_key)
            self._blocks[layer_key] = fisher_block
            return fisher_block
        if reuse is False:
            raise FisherValueError(
                f"parameter {name} is already registered", help="pass reuse=True to add a minibatch to it"
            )
        if not isinstance(known, type(fisher_block)) or type(known) is not type(fisher_block):
            found, asked = type(known).__name__, type(fisher_block).__name__
            raise FisherValueError(f"parameter {name} is registered as {found}, not as {asked}")
        return known

    def _check_new(self, layer_key: LayerKey) -> None:
        members = set(_members(layer_key))
        for key in self._blocks:
            if members & set(_members(key)):
                raise FisherValueError(f"parameter {_quoted(layer_key)} is already part of {_quoted(key)}")
        for group in self._linked:
            if members & group and group != frozenset(members):
                raise FisherValueError(
                    f"parameter {_quoted(layer_key)} is linked with others as {_quoted(tuple(group))}"
                )

    def place(self, block: FisherBlock) -> Place:
        """Return where a block's nodes and states go: in a step, under its parameter's name."""
        for key, registered in self._blocks.items():
            if registered is block and self.preset is not None:
                # A bias goes with its matrix, and its states carry the name of that.
                name = str(_members(key)[0].name)
                return Place(self.draft, f"kfac/{name}", name)
        return Place(self.draft, "kfac/block", None)

    def make_or_get_factor(
        self, cls: type[F], args: tuple[Hashable, ...], *, place: Place | None = None, **options: Any
    ) -> F:
        """Return the factor `cls(*args)`, one object for equal arguments; tensors are equal by identity.

        A factor at a `place` is one for that place: its states carry the names of its parameter.
        """
        key = (cls, args if place is None else (*args, place.prefix))
        try:
            factor = self._factors.get(key)
        except TypeError as error:
            raise FisherTypeError(f"the arguments of a {cls.__name__} must be hashable: {error}") from error
        if factor is None:
            make: Any = cls
            alone = Place(self.draft, f"kfac/{len(self._factors)}/{cls.__name__}", None)
            factor = make(*args, place=place or alone, settings=self.settings, **options)
            self._factors[key] = factor
        return factor

    def define_linked_parameters(
        self, params: ir.Value | Iterable[ir.Value], approximation: str | None = None
    ) -> None:
        """Say that parameters are approximated together, and how; used where `approx` is not named."""
        group = frozenset((params,) if isinstance(params, ir.Value) else params)
        for other in self._linked:
            if group & other and group != other:
                raise FisherValueError("a parameter is already linked in another group")
        if group & set(self.registered_variables):
            raise FisherValueError(
                "a parameter of the group is already registered", help="link before registering"
            )
        self._linked[group] = approximation

    def get_use_count_map(self) -> dict[LayerKey, int]:
        """Return how often each registered parameter is used: minibatches times uses per example."""
        counts: dict[LayerKey, int] = {}
        for key, block in self._blocks.items():
            uses = block.num_uses if isinstance(block, EmbeddingKFACFB) else 1
            counts[key] = block.num_registered_minibatches * uses
        return counts

    def check_registration(self, variables: Sequence[ir.Value], loss: ir.Value | None = None) -> None:
        """Raise unless every variable is registered as often as the loss (or the whole graph) uses it."""
        registered = set(self.registered_variables)
        missing = [_quoted(variable) for variable in variables if variable not in registered]
        if missing:
            raise FisherValueError(f"not every parameter is registered: {', '.join(missing)}")
        extra = sorted(_quoted(variable) for variable in registered - set(variables))
        if extra:
            names = ", ".join(extra)
            raise FisherValueError(f"parameters are registered that are not trained: {names}")
        nodes = None if loss is None else _ancestors(loss)
        for key, count in self.get_use_count_map().items():
            for param in _members(key):
                uses = sum(nodes is None or use.node in nodes for use in param.uses())
                if uses != count:
                    raise FisherValueError(
                        f"parameter {_quoted(param)} is registered {count} times but used {uses} times"
                    )

    def get_blocks(self) -> list[FisherBlock]:
        """Return all blocks, in the order of registration."""
        return list(self._blocks.values())

    def get_factors(self) -> list[Any]:
        """Return all factors, in the order of their making."""
        return list(self._factors.values())

    def get_states(self) -> list[ir.Value]:
        """Return all state of all factors."""
        return [state for factor in self._factors.values() for state in factor.states]

    def _approximation(
        self, params: ir.Value, approx: str | None, default: str, known: tuple[str, ...]
    ) -> None:
        if approx is None:
            linked = self._linked.get(frozenset((params,)))
            approx = default if linked is None else linked
        _known_approximation(approx, known)


def _alone() -> Draft:
    """Return the draft of blocks alone: an empty model, whose nodes a session takes pieces of."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="kfac_blocks")
    model = ir.Model(graph, ir_version=9)
    return Draft(model, Emitter(model, "block"), {})


def _known_approximation(value: str, known: tuple[str, ...], kind: str = "an embedding") -> str:
    if value not in known:
        raise FisherValueError(f"unknown approximation '{value}' of {kind}", help=f"use {' or '.join(known)}")
    return value


def _vocab_size(params: object) -> int:
    if not isinstance(params, ir.Value):
        raise FisherValueError("an embedding is one table; a tuple of parameters (a bias) has no such block")
    size = params.shape[0] if params.shape is not None and params.shape.rank() == 2 else None
    if not isinstance(size, int):
        raise FisherValueError(f"the table {_quoted(params)} must have a known shape [vocab, dim]")
    return size


def _members(key: LayerKey) -> tuple[ir.Value, ...]:
    return (key,) if isinstance(key, ir.Value) else key


def _quoted(key: LayerKey) -> str:
    return ", ".join(sorted(f"'{param.name}'" for param in _members(key)))


def _ancestors(value: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    pending: list[ir.Value] = [value]
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            pending.extend(source for source in node.inputs if source is not None)
    return found
