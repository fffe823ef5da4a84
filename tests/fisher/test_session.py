"""Blocks run on onnxruntime by a session, against the float64 block."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.fisher import (
    EmbeddingKFACFB,
    FactorSettings,
    FisherSession,
    LayerCollection,
    SparseRows,
    placeholder,
)
from kfac_onnx.fisher.session import build_model, host_power
from kfac_onnx.reference import BlockReference, BlockSettings

V, D = 9, 4
RNG = np.random.default_rng(17)
DENSE = RNG.normal(size=(V, D))
PICKED = np.array([8, 0, 8, 3])
DAMPING = 0.05
# float32: sums of a few dozen terms and an inverse of condition below 100.
RTOL = 5e-6


def batch(seed: int, size: int = 12) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, V - 1, size), rng.normal(size=(size, D)).astype(np.float32)


def session_of(
    decay: float = 0.9, dtype: ir.DataType = ir.DataType.FLOAT, **changed: Any
) -> tuple[FisherSession, EmbeddingKFACFB]:
    collection = LayerCollection(FactorSettings(decay=decay, **changed))
    table = placeholder("table", ir.DataType.FLOAT, [V, D])
    ids = placeholder("ids", ir.DataType.INT64, ["B"])
    grads = placeholder("grads", dtype, ["B", D])
    block = collection.register_embedding(table, ids, grads)
    block.instantiate_factors([[grads]], DAMPING)
    return FisherSession(collection), block


def feeds(seed: int, size: int = 12) -> dict[str, Any]:
    ids, grads = batch(seed, size)
    return {"ids": ids, "grads": grads}


def close(found: Any, expected: Any, rtol: float = RTOL) -> bool:
    return bool(np.abs(found - expected).max() <= rtol * np.abs(expected).max())


def both(decay: float = 0.9, steps: int = 3) -> tuple[FisherSession, EmbeddingKFACFB, BlockReference]:
    session, block = session_of(decay)
    reference = BlockReference(V, D, BlockSettings())
    for seed in range(steps):
        session.covariance_update(feeds(seed))
        ids, grads = batch(seed)
        reference.covariance_update([[ids]], [[[grads]]], decay)
    session.inverse_update()
    reference.inverse_update(DAMPING)
    return session, block, reference


@pytest.mark.parametrize("indices", [None, PICKED], ids=["dense", "sparse"])
@pytest.mark.parametrize("operation", ["multiply", "multiply_inverse"])
def test_products_equal_the_reference(operation: str, indices: Any) -> None:
    session, block, reference = both()
    vector = DENSE if indices is None else (indices, DENSE[:4])
    found = getattr(session, operation)(block, vector)
    exponent = 1.0 if operation == "multiply" else -1.0
    values = DENSE if indices is None else DENSE[:4]
    expected = reference.multiply_matpower(values, indices, DAMPING, exponent)
    assert close(found, expected)
    assert not close(1.01 * found, expected)


def test_multiply_inverse_undoes_multiply() -> None:
    session, block, _ = both()
    assert close(session.multiply_inverse(block, session.multiply(block, DENSE)), DENSE)


def test_full_block_and_state() -> None:
    session, block, reference = both()
    assert close(session.full_fisher_block(block), reference.full_fisher_block())
    state = session.state
    assert [name.rsplit("/", 1)[1] for name in state] == [
        *("A", "A.scale", "A.total", "A.count"),
        *("G", "G.count", "root"),
    ]
    scale = next(x for name, x in state.items() if name.endswith("/A.scale"))
    A = next(x for name, x in state.items() if name.endswith("/A"))
    assert close(scale * A, reference.input_factor)


@pytest.mark.parametrize("exponent", [0.5, -0.5, 3.0, -0.3])
def test_powers_equal_the_reference(exponent: float) -> None:
    session, block = session_of()
    block.register_matpower(exponent)
    reference = BlockReference(V, D, BlockSettings(), exponents=[exponent])
    session.covariance_update(feeds(0))
    ids, grads = batch(0)
    reference.covariance_update([[ids]], [[[grads]]], 0.9)
    session.inverse_update()
    reference.inverse_update(DAMPING)
    found = session.multiply_matpower(block, DENSE, exponent)
    assert close(found, reference.multiply_matpower(DENSE, None, DAMPING, exponent))


def test_a_power_must_be_registered() -> None:
    session, block = session_of()
    with pytest.raises(KeyError) as caught:
        session.multiply_matpower(block, DENSE, 0.25)
    assert str(caught.value) == "the power 0.25 of the output factor was not registered with this damping"


def test_the_running_scale_is_folded_in_before_it_vanishes() -> None:
    """0.6^60 is 5e-14, below the smallest scale 2^-20; the factor must not notice."""
    session, block, reference = both(decay=0.6, steps=60)
    found = session.run([block.input_factor.get_cov_var()], {})[0]
    # 60 float32 averages
    assert close(found, reference.input_factor, 2e-5)
    scale = next(x for name, x in session.state.items() if name.endswith("/A.scale"))
    assert 2.0**-21 < float(scale) <= 1.0
    assert close(session.run([block.input_factor.total()], {})[0], reference.input_factor.sum())


@pytest.mark.parametrize("decay", [0.9, 0.2])
def test_an_empty_batch_changes_nothing(decay: float) -> None:
    for debias in (False, True):
        session, block = session_of(decay, zero_debias=debias)
        session.covariance_update(feeds(0))
        before = session.run([block.input_factor.get_cov_var(), block.output_factor.get_cov_var()], {})
        session.covariance_update(feeds(1, size=0))
        after = session.run([block.input_factor.get_cov_var(), block.output_factor.get_cov_var()], {})
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [ir.DataType.DOUBLE, ir.DataType.FLOAT16])
def test_gradients_of_other_types_make_float32_statistics(dtype: ir.DataType) -> None:
    plain, block = session_of()
    other, same = session_of(dtype=dtype)
    ids, grads = batch(0)
    rounded = grads.astype(dtype.numpy())
    plain.covariance_update({"ids": ids, "grads": rounded.astype(np.float32)})
    other.covariance_update({"ids": ids, "grads": rounded})
    found = other.run([same.output_factor.get_cov_var()], {})[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, plain.run([block.output_factor.get_cov_var()], {})[0])


def test_ids_computed_in_the_users_graph_are_followed_to_their_inputs() -> None:
    collection = LayerCollection(FactorSettings(decay=0.0))
    raw = placeholder("raw", ir.DataType.INT64, ["B"])
    ids = ir.node("Sub", [raw, raw]).outputs[0]
    ids.shape, ids.type = raw.shape, raw.type
    grads = placeholder("grads", ir.DataType.FLOAT, ["B", D])
    table = placeholder("table", ir.DataType.FLOAT, [V, D])
    block = collection.register_embedding(table, ids, grads)
    block.instantiate_factors([[grads]], DAMPING)
    session = FisherSession(collection)
    session.covariance_update({"raw": np.arange(3), "grads": np.ones((3, D), np.float32)})
    assert session.run([block.input_factor.get_cov_var()], {})[0].tolist() == [1.0] + [0.0] * (V - 1)


def test_symbolic_products_can_be_built_into_a_graph() -> None:
    _, block = session_of()
    rows = SparseRows(
        placeholder("i", ir.DataType.INT64, ["N"]), placeholder("x", ir.DataType.FLOAT, ["N", D]), (V, D)
    )
    result = block.multiply_inverse(rows)
    assert isinstance(result, SparseRows)
    assert result.indices is rows.indices
    model = build_model([result.values], set())
    kinds = [node.op_type for node in model.graph]
    assert {"DampingPi", "PreconditionRows"} <= set(kinds)
    names = {value.name for value in model.graph.inputs}
    assert {"i", "x"} <= names


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.ones((V, D + 1)), "the vector has shape [9, 5], but the block is over [9, 4]"),
        (np.ones((V + 1, D)), "the vector has shape [10, 4], but the block is over [9, 4]"),
        (np.ones(V), "the vector has shape [9], but the block is over [9, 4]"),
    ],
)
def test_vectors_of_a_wrong_shape(vector: Any, message: str) -> None:
    session, block = session_of()
    with pytest.raises(ValueError, match="the vector has shape") as caught:
        session.multiply(block, vector)
    assert str(caught.value) == message


def test_a_missing_feed_is_named() -> None:
    session, _ = session_of()
    with pytest.raises(UserError) as caught:
        session.covariance_update({"ids": np.arange(3)})
    assert str(caught.value) == "the tensor 'grads' is needed but was not fed"


def test_a_feed_that_does_not_fit_is_a_users_error_and_leaves_the_state() -> None:
    session, block = session_of()
    before = session.run([block.input_factor.get_cov_var()], {})[0]
    with pytest.raises(UserError, match=r"^onnxruntime could not run the block: "):
        session.covariance_update({"ids": np.arange(3), "grads": np.ones((3, D + 1), np.float32)})
    np.testing.assert_array_equal(session.run([block.input_factor.get_cov_var()], {})[0], before)


def test_the_same_run_twice_is_bit_equal_also_with_four_threads() -> None:
    def run(threads: int) -> Any:
        session, block = session_of()
        session = FisherSession(session._collection, threads=threads)
        for seed in range(3):
            session.covariance_update(feeds(seed, 3000))
        session.inverse_update()
        return session.multiply_inverse(block, DENSE)

    np.testing.assert_array_equal(run(1), run(1))
    np.testing.assert_array_equal(run(4), run(4))


def test_host_powers() -> None:
    M = np.diag([4.0, 9.0]).astype(np.float32)
    np.testing.assert_allclose(host_power(M, 0.0, -0.5), np.diag([1 / 2, 1 / 3]), rtol=1e-7)
    assert np.isnan(host_power(M * np.float32(np.nan), 0.0, -0.5)).all()
