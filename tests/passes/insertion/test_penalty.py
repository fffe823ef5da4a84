"""Penalties on a table go past its block: W after a step is the block's step and −lr times their gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

import kfac_onnx as kx
from kfac_onnx.errors import UserError
from kfac_onnx.fisher.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RATE, WEIGHT, V, D = 0.05, 0.3, 9, 4
BATCH = {"ids": np.array([[0, 1, 1], [3, 0, 2]], np.int64), "labels": np.array([0, 1], np.int64)}
SEEN = [0, 1, 2, 3]
TABLE = np.random.default_rng(3).normal(size=(V, D)).astype(np.float32)
MATRIX = np.random.default_rng(4).normal(size=(D, 2)).astype(np.float32)
LOOKUP = "e = Gather(emb, ids)"
PENALTIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "squares": ("q = Mul(emb, emb) p = ReduceSum<keepdims: int = 0>(q)", lambda w: 2 * w),
    "sum of squares": ("p = ReduceSumSquare<keepdims: int = 0>(emb)", lambda w: 2 * w),
    "power": ("q = Pow(emb, two) p = ReduceSum<keepdims: int = 0>(q)", lambda w: 2 * w),
    "mean of squares": ("q = Mul(emb, emb) p = ReduceMean<keepdims: int = 0>(q)", lambda w: 2 * w / w.size),
    "sizes": ("q = Abs(emb) p = ReduceSum<keepdims: int = 0>(q)", np.sign),
    "norm": ("p = ReduceL2<keepdims: int = 0>(emb)", lambda w: w / np.linalg.norm(w)),
    "orthogonality": (
        "t = Transpose(emb) g = MatMul(t, emb) p = ReduceSumSquare<keepdims: int = 0>(g)",
        lambda w: 4 * w @ (w.T @ w),
    ),
    "mean row": (
        "r = ReduceMean<keepdims: int = 0>(emb, zero) p = ReduceSumSquare<keepdims: int = 0>(r)",
        lambda w: np.broadcast_to(2 * w.mean(0) / len(w), w.shape),
    ),
}
ROW_DECAY = ("squares", "power", "mean of squares")


def graph(
    penalty: str | None, lookup: str = LOOKUP, table: np.ndarray = TABLE, head: str = "z = MatMul(m, W)"
) -> ir.Model:
    """Return the training graph of a classifier over the mean of three rows, with λ times a penalty."""
    more = f"{penalty} l = Mul(p, weight) loss = Add(ce, l)" if penalty else "loss = Identity(ce)"
    model = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    model (int64[N, 3] ids, int64[N] labels) => (float loss) {{
        {lookup} m = ReduceMean<keepdims: int = 0>(e, one) {head}
        ce = SoftmaxCrossEntropyLoss(z, labels) {more}
    }}""")
    arrays = {"emb": table, "W": MATRIX, "one": np.array([1]), "zero": np.array([0])}
    scalars = {"two": np.float32(2), "weight": np.float32(WEIGHT)}
    for name, array in (arrays | {key: np.asarray(value) for key, value in scalars.items()}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return kx.differentiate(model, loss_output="loss", train=("emb", "W") if "W" in head else ("emb",))


def stepped(model: ir.Model, folder: Path, steps: int = 1, **options: Any) -> np.ndarray:
    """Return the table after some steps, as it is stored, in float64."""
    path = folder / "step.onnx"
    kx.save(kx.transform(model, lr=RATE, rest="sgd", rest_lr=0.0, **options), path)
    with kx.TrainingSession(path) as session:
        for _ in range(steps):
            session.step(BATCH)
        return np.asarray(session.parameters["emb"], np.float64)


def assert_moved(actual: np.ndarray, expected: np.ndarray) -> None:
    # float32 entries of size 1 to 10 after a handful of roundings
    np.testing.assert_allclose(actual, expected, atol=4e-6)
    assert not np.allclose(TABLE + 1.01 * (actual - TABLE), expected, atol=4e-6)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"r1.7"}))
@pytest.mark.parametrize("name", PENALTIES)
def test_the_gradient_of_a_penalty_is_added_to_the_blocks_step(
    name: str, preset: str, tmp_path: Path
) -> None:
    text, gradient = PENALTIES[name]
    block = stepped(graph(None), tmp_path, preset=preset)
    penalized = stepped(graph(text), tmp_path, preset=preset)
    assert_moved(penalized, block - RATE * WEIGHT * gradient(TABLE.astype(np.float64)))


def test_rows_never_looked_up_shrink_as_fast_as_asked(tmp_path: Path) -> None:
    after = stepped(graph(PENALTIES["squares"][0]), tmp_path, steps=20)
    share = (1 - 2 * RATE * WEIGHT) ** 20
    np.testing.assert_allclose(after[4:], TABLE[4:].astype(np.float64) * share, rtol=3e-6)
    assert not np.allclose(after[4:], TABLE[4:] * share * 1.01, rtol=3e-6)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"r1.7"}))
@pytest.mark.parametrize("name", ROW_DECAY)
def test_decay_of_looked_up_rows_counts_each_once(name: str, preset: str, tmp_path: Path) -> None:
    text, gradient = PENALTIES[name]
    block = stepped(graph(None), tmp_path, preset=preset)
    penalized = stepped(graph(text), tmp_path, preset=preset, penalty="rows")
    expected = block.copy()
    expected[SEEN] -= RATE * WEIGHT * gradient(TABLE.astype(np.float64))[SEEN]
    np.testing.assert_allclose(penalized, expected, atol=4e-6)
    assert not np.allclose(block, expected, atol=4e-6)
    np.testing.assert_array_equal(penalized[4:], TABLE[4:])


def test_a_table_stored_as_columns_is_penalized_alike(tmp_path: Path) -> None:
    lookup = "turned = Transpose(emb) e = Gather(turned, ids)"
    block = stepped(graph(None, lookup, TABLE.T.copy()), tmp_path)
    penalized = stepped(graph(PENALTIES["squares"][0], lookup, TABLE.T.copy()), tmp_path)
    np.testing.assert_allclose(penalized, block - RATE * WEIGHT * 2 * TABLE.T, atol=4e-6)
    rows = stepped(graph(PENALTIES["squares"][0], lookup, TABLE.T.copy()), tmp_path, penalty="rows")
    np.testing.assert_allclose(rows[:, SEEN], penalized[:, SEEN], atol=4e-6)
    np.testing.assert_array_equal(rows[:, 4:], TABLE.T[:, 4:])


TIED = "turned = Transpose(emb) z = MatMul(m, turned)"


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"r1.7"}))
def test_a_tied_table_keeps_its_projection_in_the_block(preset: str, tmp_path: Path) -> None:
    text = PENALTIES["squares"][0]
    (site,) = kx.scan(graph(text, head=TIED)).sites
    assert [use.op for use in site.dense_uses] == ["MatMul"]
    assert [use.op for use in site.penalties] == ["ReduceSum"]
    block = stepped(graph(None, head=TIED), tmp_path, preset=preset)
    penalized = stepped(graph(text, head=TIED), tmp_path, preset=preset)
    # the projection's part is what is left of the gradient without the penalty's: twice rounded
    np.testing.assert_allclose(penalized, block - RATE * WEIGHT * 2 * TABLE, atol=1e-5)
    assert not np.allclose(penalized, block, atol=1e-3)


def test_distances_to_all_rows_are_not_projections(tmp_path: Path) -> None:
    """Scores −Σ (m − w)² are no products with the table: their gradient stays out of the block."""
    head = (
        "u = Unsqueeze(m, one) d = Sub(u, emb) q = Mul(d, d) two_axis = Constant<value_ints: ints = [2]>() "
        "s = ReduceSum<keepdims: int = 0>(q, two_axis) z = Neg(s)"
    )
    (site,) = kx.scan(graph(None, head=head)).sites
    assert site.dense_uses == ()
    assert [use.op for use in site.penalties] == ["Sub"]


def with_decay(model: ir.Model) -> ir.Model:
    """Return a training graph whose gradient of the table has λ·W added outside of the loss."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        for index, name in enumerate(node.output):
            if name == "emb_grad":
                node.output[index] = "of_the_loss"
    proto.graph.node.extend(
        [
            helper.make_node("Mul", ["emb", "weight"], ["decay"]),
            helper.make_node("Add", ["of_the_loss", "decay"], ["emb_grad"]),
        ]
    )
    return ir.from_proto(proto)


def test_decay_added_to_the_gradient_is_a_penalty_too(tmp_path: Path) -> None:
    model = with_decay(graph(None))
    (site,) = kx.scan(model).sites
    assert [(use.op, use.output) for use in site.penalties] == [("Mul", "decay")]
    block = stepped(graph(None), tmp_path)
    assert_moved(stepped(model, tmp_path), block - RATE * WEIGHT * TABLE)


@pytest.mark.parametrize("method", ["sgd", "adagrad"])
def test_plain_optimizers_take_the_whole_gradient(method: str, tmp_path: Path) -> None:
    after = stepped(graph(PENALTIES["squares"][0]), tmp_path, preset=f"plain-{method}")
    assert np.all(after[4:] != TABLE[4:])
    if method == "sgd":
        np.testing.assert_allclose(after[4:], TABLE[4:] * (1 - RATE * WEIGHT * 2), atol=1e-6)


def test_what_was_done_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = graph(PENALTIES["squares"][0])
    with caplog.at_level("WARNING"):
        kx.transform(model)
        kx.transform(model, penalty="rows")
    assert [record.getMessage() for record in caplog.records] == [
        "the penalty of 'emb' (ReduceSum 'p') goes past the block: plain gradient descent on all 9 rows, which "
        "every step then reads and writes",
        "the penalty of 'emb' (ReduceSum 'p') goes past the block: plain gradient descent on looked-up rows",
    ]


def test_a_penalty_can_be_refused_and_other_penalties_have_no_row_form() -> None:
    with pytest.raises(UserError) as caught:
        kx.transform(graph(PENALTIES["squares"][0]), penalty="refuse")
    assert str(caught.value) == (
        "parameter 'emb' is used in a way that no block covers: ReduceSum 'p' is a penalty on the whole table, and "
        "penalty=refuse is set\n"
        "  path: emb -> p\n"
        "  in:   insert-embedding-kfac\n"
        "  help: set penalty=all, or leave it to --rest: allow-fallback=emb"
    )
    with pytest.raises(UserError) as caught:
        kx.transform(graph(PENALTIES["sizes"][0]), penalty="rows")
    assert str(caught.value) == (
        "penalty=rows needs a penalty whose gradient is a number times 'emb', such as a sum of squares; Abs 'q' is "
        "another\n"
        "  in:   insert-embedding-kfac\n"
        "  help: set penalty=all, which applies its gradient to all rows"
    )
