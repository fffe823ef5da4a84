"""Registration: what is accepted, what is refused and with which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.fisher import (
    AUTO_REUSE,
    EmbeddingInputKroneckerFactor,
    EmbeddingKFACFB,
    EmbeddingKFACMultiIndepFB,
    FullyConnectedKroneckerFactor,
    LayerCollection,
    placeholder,
)

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64


def table(name: str = "emb.weight", vocab: int | str = 9) -> ir.Value:
    return placeholder(name, F32, [vocab, 4])


def ids(name: str = "ids", *shape: int | str) -> ir.Value:
    return placeholder(name, I64, shape or ["B"])


def rows(name: str = "rows") -> ir.Value:
    return placeholder(name, F32, ["B", 4])


def test_registering_makes_a_block_with_a_minibatch() -> None:
    collection, weight, out = LayerCollection(), table(), rows()
    block = collection.register_embedding(weight, ids(), out)
    assert isinstance(block, EmbeddingKFACFB)
    assert (block.vocab_size, block.num_registered_minibatches, block.num_uses) == (9, 1, 1)
    assert block.tensors_to_compute_grads() == [out]
    assert collection.get_blocks() == [block]
    assert collection.registered_variables == [weight]
    assert collection.get_use_count_map() == {weight: 1}


def test_reuse_adds_minibatches_in_order() -> None:
    collection, weight = LayerCollection(), table()
    outs = [rows(f"r{i}") for i in range(3)]
    block = collection.register_embedding(weight, ids(), outs[0], reuse=AUTO_REUSE)
    assert collection.register_embedding(weight, ids(), outs[1], reuse=True) is block
    assert collection.register_embedding(weight, ids(), outs[2], reuse=AUTO_REUSE) is block
    assert block.tensors_to_compute_grads() == outs
    assert collection.get_use_count_map() == {weight: 3}


def test_several_uses_are_lists_or_folded() -> None:
    collection, weight = LayerCollection(), table()
    uses = [ids("a"), ids("b")]
    block = collection.register_embedding_multi(weight, uses, [rows("x"), rows("y")])
    assert isinstance(block, EmbeddingKFACMultiIndepFB)
    assert (block.num_uses, block.renorm_coeff) == (2, 2.0)
    assert collection.get_use_count_map() == {weight: 2}
    folded = LayerCollection().register_embedding_multi(weight, ids(), rows(), num_uses=3)
    assert folded.num_uses == 3
    mixed = LayerCollection().register_embedding_multi(weight, uses, rows())
    assert mixed.num_uses == 2


Action = Callable[[LayerCollection, ir.Value], Any]

REFUSED: list[tuple[str, type[Exception], str, Action]] = [
    (
        "twice",
        ValueError,
        "parameter 'emb.weight' is already registered\n  help: pass reuse=True to add a minibatch to it",
        lambda c, w: [c.register_embedding(w, ids(), rows()) for _ in range(2)],
    ),
    (
        "reuse-unknown",
        KeyError,
        "parameter 'emb.weight' is not registered, so it cannot be reused",
        lambda c, w: c.register_embedding(w, ids(), rows(), reuse=True),
    ),
    (
        "reuse-other-class",
        ValueError,
        "parameter 'emb.weight' is registered as EmbeddingKFACFB, not as EmbeddingKFACMultiIndepFB",
        lambda c, w: [
            c.register_embedding(w, ids(), rows()),
            c.register_embedding_multi(w, [ids()], [rows()], reuse=True),
        ],
    ),
    (
        "reuse-word",
        ValueError,
        "reuse must be True, False or 'auto', not 'yes'",
        lambda c, w: c.register_embedding(w, ids(), rows(), reuse="yes"),  # type: ignore[arg-type]
    ),
    (
        "bias",
        ValueError,
        "an embedding is one table; a tuple of parameters (a bias) has no such block",
        lambda c, w: c.register_embedding((w,), ids(), rows()),  # type: ignore[arg-type]
    ),
    (
        "unknown-vocabulary",
        ValueError,
        "the table 'x' must have a known shape [vocab, dim]",
        lambda c, w: c.register_embedding(table("x", "V"), ids(), rows()),
    ),
    (
        "approximation",
        ValueError,
        "unknown approximation 'diagonal' of an embedding\n  help: use kron",
        lambda c, w: c.register_embedding(w, ids(), rows(), approx="diagonal"),
    ),
    (
        "default-approximation",
        ValueError,
        "unknown approximation 'full' of an embedding\n  help: use kron",
        lambda c, w: c.set_default_embedding_approximation("full"),
    ),
    (
        "linked-approximation",
        ValueError,
        "unknown approximation 'full' of an embedding\n  help: use kron",
        lambda c, w: [c.define_linked_parameters(w, "full"), c.register_embedding(w, ids(), rows())],
    ),
    (
        "part-of-a-group",
        ValueError,
        "parameter 'emb.weight' is linked with others as 'bias', 'emb.weight'",
        lambda c, w: [c.define_linked_parameters([w, table("bias")]), c.register_embedding(w, ids(), rows())],
    ),
    (
        "part-of-another-block",
        ValueError,
        "parameter 'emb.weight' is already part of 'bias', 'emb.weight'",
        lambda c, w: [
            c.register_block((w, table("bias")), EmbeddingKFACFB(c, 9)),
            c.register_embedding(w, ids(), rows()),
        ],
    ),
    (
        "linked-twice",
        ValueError,
        "a parameter is already linked in another group",
        lambda c, w: [c.define_linked_parameters(w), c.define_linked_parameters([w, table("bias")])],
    ),
    (
        "linked-late",
        ValueError,
        "a parameter of the group is already registered\n  help: link before registering",
        lambda c, w: [c.register_embedding(w, ids(), rows()), c.define_linked_parameters([w, table("bias")])],
    ),
    (
        "uses-unknown",
        ValueError,
        "the number of uses is not known\n  help: give num_uses, or lists over uses",
        lambda c, w: c.register_embedding_multi(w, ids(), rows()),
    ),
    (
        "uses-disagree",
        ValueError,
        "the minibatch disagrees on the number of uses: [1, 2]",
        lambda c, w: c.register_embedding_multi(w, [ids()], [rows(), rows()]),
    ),
    (
        "no-minibatch",
        ValueError,
        "the embedding has no registered minibatch\n  help: call register_additional_minibatch first",
        lambda c, w: EmbeddingKFACFB(c, 9).instantiate_factors([[rows()]], 0.1),
    ),
    (
        "no-source",
        IndexError,
        "the gradients have no source",
        lambda c, w: c.register_embedding(w, ids(), rows()).instantiate_factors([], 0.1),
    ),
    (
        "towers-disagree",
        ValueError,
        "a source has gradients of 2 towers, but 1 are registered",
        lambda c, w: c.register_embedding(w, ids(), rows()).instantiate_factors([[rows(), rows()]], 0.1),
    ),
    (
        "damping",
        ValueError,
        "damping must be at least 0, not -1",
        lambda c, w: c.register_embedding(w, ids(), rows()).instantiate_factors([[rows()]], -1.0),
    ),
    (
        "no-factors",
        ValueError,
        "the block has no damping yet\n  help: call instantiate_factors first",
        lambda c, w: c.register_embedding(w, ids(), rows()).multiply(table("v")),
    ),
    (
        "gradient-rank",
        ValueError,
        "gradients 'g' must have shape [batch, dim]",
        lambda c, w: c.register_embedding(w, ids(), rows()).instantiate_factors(
            [[placeholder("g", F32, ["B", 2, 4])]], 0.1
        ),
    ),
    (
        "gradient-type",
        TypeError,
        "gradients 'g' must be floating point, not INT64",
        lambda c, w: c.register_embedding(w, ids(), rows()).instantiate_factors([[ids("g", 5, 4)]], 0.1),
    ),
    (
        "not-hashable",
        TypeError,
        "the arguments of a EmbeddingInputKroneckerFactor must be hashable: unhashable type: 'list'",
        lambda c, w: c.make_or_get_factor(EmbeddingInputKroneckerFactor, ([ids()], 9)),  # type: ignore[arg-type]
    ),
]


@pytest.mark.parametrize(("kind", "message", "action"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals(kind: type[Exception], message: str, action: Action) -> None:
    with pytest.raises(kind) as caught:
        action(LayerCollection(), table())
    assert isinstance(caught.value, UserError)
    assert str(caught.value) == message


def test_ids_are_checked_when_the_covariance_update_is_built() -> None:
    for value, kind, message in (
        (ids("i", "B", 2, 2), ValueError, "ids 'i' must have rank 1 or 2, not 3"),
        (placeholder("i", I64, []), ValueError, "ids 'i' must have rank 1 or 2, not 0"),
        (ir.Value(name="i", type=ir.TensorType(I64)), ValueError, "ids 'i' must have a known rank, 1 or 2"),
        (placeholder("i", F32, ["B"]), TypeError, "ids 'i' must be integers, not FLOAT"),
    ):
        block = LayerCollection().register_embedding(table(), value, rows())
        block.instantiate_factors([[rows("g")]], 0.1)
        with pytest.raises(kind) as caught:
            block.input_factor.make_covariance_update_op(0.95)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"^the decay of an average must be between 0 and 1, not 1.5$"):
        block.output_factor.make_covariance_update_op(1.5)


def test_a_factor_has_one_decay() -> None:
    block = LayerCollection().register_embedding(table(), ids(), rows())
    block.instantiate_factors([[rows("g")]], 0.1)
    assert len(block.input_factor.make_covariance_update_op(0.95).assignments) == 4
    for factor in (block.input_factor, block.output_factor):
        with pytest.raises(ValueError, match="averages with decay") as caught:
            factor.make_covariance_update_op(0.9)
        assert str(caught.value) == (
            "the factor averages with decay 0.95, not 0.9\n"
            "  help: give the collection its decay: LayerCollection(FactorSettings(decay=...))"
        )


def test_factors_are_shared_between_equal_requests() -> None:
    collection, one, two = LayerCollection(), ids("a"), ids("a")
    first = collection.make_or_get_factor(EmbeddingInputKroneckerFactor, ((one,), 9))
    assert collection.make_or_get_factor(EmbeddingInputKroneckerFactor, ((one,), 9)) is first
    assert collection.make_or_get_factor(EmbeddingInputKroneckerFactor, ((two,), 9)) is not first
    assert collection.make_or_get_factor(FullyConnectedKroneckerFactor, ((rows(),),)) is not first
    assert len(collection.get_factors()) == 3
    names = [state.name for state in collection.get_states()]
    assert len(set(names)) == len(names) == 4 + 4 + 2


def test_linked_approximations_and_defaults_are_used() -> None:
    collection, weight = LayerCollection(), table()
    collection.define_linked_parameters(weight, "kron")
    collection.set_default_embedding_approximation("kron")
    collection.register_embedding(weight, ids(), rows())
    assert collection.linked_parameters == {frozenset((weight,)): "kron"}
    assert collection.default_embedding_approximation == "kron"
    assert collection.default_embedding_multi_approximation == "kron_indep"


def test_registration_is_checked_against_the_uses_in_the_graph() -> None:
    weight, index = table(), ids()
    one = ir.node("Gather", [weight, index])
    ir.node("Gather", [weight, index])
    collection = LayerCollection()
    collection.register_embedding(weight, index, one.outputs[0])
    collection.check_registration([weight], loss=ir.node("ReduceSum", one.outputs).outputs[0])
    with pytest.raises(ValueError, match=r"^parameter 'emb.weight' is registered 1 times but used 2 times$"):
        collection.check_registration([weight])
    with pytest.raises(ValueError, match=r"^not every parameter is registered: 'other'$"):
        collection.check_registration([weight, table("other")])
    with pytest.raises(ValueError, match=r"^parameters are registered that are not trained: 'emb.weight'$"):
        collection.check_registration([])
