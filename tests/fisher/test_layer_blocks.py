"""Blocks of layers alone, held against the original's formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.fisher import FisherSession, FisherTypeError, LayerCollection, SparseRows, Window, placeholder
from kfac_onnx.reference import LayerBlockReference, patches

DAMPING, DECAY = 0.3, 0.95
F32 = ir.DataType.FLOAT
rng = np.random.default_rng(11)
WINDOW = Window(kernel=(4, 3, 3, 2), strides=(2, 1), pads=(1, 0, 1, 1))


def normal(*shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def ones(rows: Any) -> Any:
    return np.column_stack([rows, np.ones(len(rows))])


def close(result: Any, want: Any) -> None:
    """Assert equality to 1e-5 of the largest entry, which a factor of 1.01 fails."""
    limit = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(result, want, rtol=0, atol=limit)
    assert np.abs(1.01 * np.asarray(want) - want).max() > limit


def layer(
    towers: int, sources: int, *, has_bias: bool
) -> tuple[LayerCollection, Any, list[list[ir.Value]], list[ir.Value]]:
    """Return a registered layer [5, 4], the gradients it takes, and its inputs."""
    collection = LayerCollection()
    weight, bias = placeholder("W", F32, [5, 4]), placeholder("b", F32, [4])
    inputs = [placeholder(f"h{tower}", F32, [f"N{tower}", 5]) for tower in range(towers)]
    gradients = [
        [placeholder(f"g{source}{tower}", F32, [f"N{tower}", 4]) for tower in range(towers)]
        for source in range(sources)
    ]
    block = None
    for tower, value in enumerate(inputs):
        params = (weight, bias) if has_bias else weight
        products = placeholder(f"z{tower}", F32, [f"N{tower}", 4])
        block = collection.register_fully_connected(params, value, products, reuse=tower > 0)
    return collection, block, gradients, inputs


@pytest.mark.parametrize(
    ("towers", "sources", "has_bias"), [(1, 1, False), (1, 1, True), (3, 1, True), (2, 2, False)]
)
def test_a_layer_equals_the_original(towers: int, sources: int, has_bias: bool) -> None:
    """No bias, a bias, several uses of shared weights (towers), several sources of gradients."""
    collection, block, gradients, inputs = layer(towers, sources, has_bias=has_bias)
    block.instantiate_factors(gradients, DAMPING)
    reference, session = LayerBlockReference(5 + has_bias, 4), FisherSession(collection)
    vector = normal(5 + has_bias, 4)
    for step in range(3):
        sizes = [3 + tower + step for tower in range(towers)]
        feeds = {str(value.name): normal(size, 5) for value, size in zip(inputs, sizes, strict=True)}
        for source in gradients:
            feeds |= {str(value.name): normal(size, 4) for value, size in zip(source, sizes, strict=True)}
        session.covariance_update(feeds)
        rows = [ones(feeds[str(value.name)]) if has_bias else feeds[str(value.name)] for value in inputs]
        reference.covariance_update(
            rows, [[feeds[str(value.name)] for value in source] for source in gradients], DECAY
        )
        close(session.multiply_inverse(block, vector), reference.multiply_inverse(vector))  # stale
        session.inverse_update()
        reference.inverse_update(DAMPING)
        close(session.multiply_inverse(block, vector), reference.multiply_inverse(vector))
        close(session.multiply(block, vector), reference.multiply(vector, DAMPING))
    close(session.full_fisher_block(block), reference.full_fisher_block())


def test_layers_with_one_input_share_a_factor() -> None:
    collection = LayerCollection()
    h = placeholder("h", F32, ["N", 5])
    blocks, references = [], []
    for name, size in (("q", 4), ("k", 3)):
        g = placeholder(f"g_{name}", F32, ["N", size])
        block = collection.register_fully_connected(placeholder(name, F32, [5, size]), h, g)
        block.instantiate_factors([[g]], DAMPING)
        blocks.append(block)
        references.append(LayerBlockReference(5, size))
    assert blocks[0].input_factor is blocks[1].input_factor
    assert len(collection.get_factors()) == 3
    session = FisherSession(collection)
    feeds = {"h": normal(7, 5), "g_q": normal(7, 4), "g_k": normal(7, 3)}
    session.covariance_update(feeds)
    session.inverse_update()
    for block, reference, name in zip(blocks, references, "qk", strict=True):
        reference.covariance_update([feeds["h"]], [[feeds[f"g_{name}"]]], DECAY)
        reference.inverse_update(DAMPING)
        vector = normal(*block.parameter_shape)
        close(session.multiply_inverse(block, vector), reference.multiply_inverse(vector))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_convolution_equals_the_original(has_bias: bool) -> None:
    collection = LayerCollection()
    kernel, bias = placeholder("K", F32, [4, 3, 3, 2]), placeholder("b", F32, [4])
    x, z = placeholder("x", F32, ["B", 3, 6, 5]), placeholder("z", F32, ["B", 4, 3, 5])
    g = placeholder("g", F32, ["B", 4, 3, 5])
    block = collection.register_conv2d((kernel, bias) if has_bias else kernel, WINDOW, x, z)
    block.instantiate_factors([[g]], DAMPING)
    size = 18 + has_bias
    session, reference = FisherSession(collection), LayerBlockReference(size, 4, places=15)
    feeds = {"x": normal(2, 3, 6, 5), "g": normal(2, 4, 3, 5)}
    session.covariance_update(feeds)
    session.inverse_update()
    rows = patches(feeds["x"], (3, 2), (2, 1), (1, 0, 1, 1))
    slopes = feeds["g"].transpose(0, 2, 3, 1).reshape(-1, 4)
    reference.covariance_update([ones(rows) if has_bias else rows], [[slopes]], DECAY)
    reference.inverse_update(DAMPING)
    vector = normal(size, 4)
    close(session.multiply_inverse(block, vector), reference.multiply_inverse(vector))
    close(session.multiply(block, vector), reference.multiply(vector, DAMPING))
    close(session.full_fisher_block(block), reference.full_fisher_block())


def test_a_power_is_that_of_both_factors() -> None:
    collection, block, gradients, _ = layer(1, 1, has_bias=False)
    block.instantiate_factors(gradients, DAMPING)
    block.register_matpower(-0.5)
    session = FisherSession(collection)
    session.covariance_update({"h0": normal(9, 5), "g00": normal(9, 4)})
    session.inverse_update()
    vector = normal(5, 4)
    half = session.multiply_matpower(block, vector, -0.5)
    close(session.multiply_matpower(block, half, -0.5), session.multiply_inverse(block, vector))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("factors", "the block has no factors yet"),
        ("sources", "the gradients have no source"),
        ("towers", "a source has gradients of 2 towers, but 1 are registered"),
        ("damping", "damping must be at least 0, not -1"),
        ("shape", "the vector has shape [3, 3], but the block is over [5, 4]"),
        ("approximation", "unknown approximation 'diagonal' of a layer"),
    ],
)
def test_refusals(wrong: str, message: str) -> None:
    with pytest.raises((UserError, IndexError)) as caught:
        misuse(wrong)
    assert getattr(caught.value, "message", str(caught.value)) == message


def misuse(wrong: str) -> None:
    collection, block, gradients, inputs = layer(1, 1, has_bias=False)
    match wrong:
        case "factors":
            block.multiply_inverse(placeholder("v", F32, [5, 4]))
        case "sources":
            block.instantiate_factors([], DAMPING)
        case "towers":
            block.instantiate_factors([gradients[0] * 2], DAMPING)
        case "damping":
            block.instantiate_factors(gradients, -1.0)
        case "approximation":
            other = placeholder("U", F32, [5, 4])
            collection.register_fully_connected(other, inputs[0], inputs[0], "diagonal")
        case _:
            block.instantiate_factors(gradients, DAMPING)
            block.multiply_inverse(placeholder("v", F32, [3, 3]))


def test_rows_are_no_gradient_of_a_layer() -> None:
    _, block, gradients, _ = layer(1, 1, has_bias=False)
    block.instantiate_factors(gradients, DAMPING)
    rows = SparseRows(placeholder("i", ir.DataType.INT64, ["n"]), placeholder("v", F32, ["n", 4]), (5, 4))
    with pytest.raises(FisherTypeError, match="the gradient of a layer is dense"):
        block.multiply_inverse(rows)
