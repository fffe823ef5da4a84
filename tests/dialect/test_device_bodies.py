"""The bodies for devices: sums of repeated rows without `Unique`, and the ordered ones without atomic adds.

onnxruntime's CPU runs them all; in one thread where they add by ScatterND.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfac_onnx import dialect
from kfac_onnx.reference.operators import TWINS

Runner = Callable[..., list[Any]]

BATCHES = {
    "one row": [4],
    "one id": [4] * 33,
    "two runs": [4, 0] * 16,
    "all different": list(range(9)),
    "descending": list(range(8, -1, -1)) * 3,
    "padding first": [0, 0, 0, 7, 0, 7, 3],
    "long run at the end": [1, 2, *[8] * 100],
}
WRITERS = ("AddRows", "ApplyRows", "ApplyColumns", "ApplyFlat", "InputFactorUpdate", "InputFactorAverage")
V, D = 9, 3


def inputs_of(name: str, ids: Any, rows: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's inputs on a table of ones and twos."""
    table = 1.0 + np.arange(V * D).reshape(V, D) % 2
    match name:
        case "AddRows":
            return (table, ids, rows), {}
        case "ApplyRows":
            return (table, ids, rows, 0.1), {}
        case "ApplyColumns":
            return (table.T, ids, rows, 0.1), {}
        case "ApplyFlat":
            return (table.reshape(-1), ids, rows, 0.1), {}
        case "InputFactorUpdate":
            return (table[:, 0], ids, rows[:, 0]), {}
        case "InputFactorAverage":
            return (table[:, 0], ids, np.abs(rows[:, 0]), float(len(ids))), {"decay": 0.3}
        case "ScatterRows":
            return (ids, rows), {"vocab_size": V}
        case _:
            return (ids, rows), {}


def rows_for(ids: Any, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(len(ids), D)).astype(np.float32)


@pytest.mark.parametrize("variant", ["atomic", "ordered"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [*WRITERS, "MergeRows", "ScatterRows"])
def test_repeated_rows_add_up(name: str, batch: str, variant: str, run_operator: Runner) -> None:
    ids = np.array(BATCHES[batch])
    inputs, attributes = inputs_of(name, ids, rows_for(ids))
    found = run_operator(name, inputs, attributes, variant=variant)
    safe = run_operator(name, inputs, attributes, variant="safe")
    for one, other, exact in zip(found, safe, TWINS[name](*inputs, **attributes), strict=True):
        # sums of up to 100 float32 numbers of order one: 100 roundings of 6e-8 of a sum below 30
        np.testing.assert_allclose(one, exact, rtol=1e-5, atol=3e-5)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=3e-5)
        assert one.dtype == other.dtype
        assert not np.allclose(one, np.asarray(exact) * 1.01, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("variant", ["atomic", "ordered"])
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1000, 4097])
@pytest.mark.parametrize("vocab", [1, 3, 100_000])
def test_merging_batches_of_all_sizes(size: int, vocab: int, variant: str, run_operator: Runner) -> None:
    rng = np.random.default_rng(size)
    ids, rows = rng.integers(0, vocab, size), rng.normal(size=(size, 2)).astype(np.float32)
    unique, sums = run_operator("MergeRows", (ids, rows), variant=variant)
    expected, exact = TWINS["MergeRows"](ids, rows)
    assert np.array_equal(unique, expected)
    # up to 4097 numbers of order one in one sum, which is of order 64
    np.testing.assert_allclose(sums, exact, rtol=1e-5, atol=5e-4)


def test_large_ids_do_not_collide(run_operator: Runner) -> None:
    ids = np.array([2**32 - 1, 5, 2**31, 5, 2**32 - 1])
    unique, sums = run_operator("MergeRows", (ids, np.ones((5, 1))), variant="ordered")
    assert unique.tolist() == [5, 2**31, 2**32 - 1]
    assert sums[:, 0].tolist() == [2.0, 1.0, 2.0]


@pytest.mark.parametrize("name", [*WRITERS, "ScatterRows"])
def test_an_id_and_the_same_one_counted_from_the_end_are_one_row(name: str, run_operator: Runner) -> None:
    ids = np.array([8, -1, 2, -7, 8])
    rows = rows_for(ids)
    inputs, attributes = inputs_of(name, ids, rows)
    found = run_operator(name, inputs, attributes, variant="ordered")[0]
    inputs, attributes = inputs_of(name, ids % V, rows)
    assert np.array_equal(found, run_operator(name, inputs, attributes, variant="ordered")[0])
    np.testing.assert_allclose(found, TWINS[name](*inputs, **attributes)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*WRITERS, "MergeRows", "ScatterRows"])
def test_ordered_bodies_add_nothing_atomically(name: str) -> None:
    """A scatter of the ordered bodies writes: none has a reduction."""
    for body in dialect.functions("ordered").values():
        for node in body:
            reduction = node.attributes.get("reduction")
            assert reduction is None or reduction.as_string() == "none", (body.name, node)
    atomic = dialect.functions("atomic", [name])[name]
    assert any("reduction" in node.attributes for node in atomic)  # else this test would see nothing


@pytest.mark.parametrize("name", [*WRITERS, "MergeRows", "ScatterRows"])
def test_ordered_bodies_give_the_same_bits_with_four_threads(name: str, run_operator: Runner) -> None:
    rng = np.random.default_rng(1)
    ids, rows = rng.integers(0, V, 20_000), rng.normal(size=(20_000, D)).astype(np.float32)
    inputs, attributes = inputs_of(name, ids, rows)
    one = run_operator(name, inputs, attributes, variant="ordered", threads=1)
    for _ in range(3):
        other = run_operator(name, inputs, attributes, variant="ordered", threads=4)
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_device_takes_all_rows_in_every_step(run_operator: Runner) -> None:
    for now in (True, False):
        assert run_operator("TakeNow", ([5], now), variant="atomic")[0].tolist() == [5]


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_device_bodies_run_in_hosts_of_other_opsets(opset: int, run_operator: Runner) -> None:
    ids = np.array(BATCHES["padding first"])
    for variant in ("atomic", "ordered"):
        for name in (*WRITERS, "MergeRows", "ScatterRows"):
            inputs, attributes = inputs_of(name, ids, rows_for(ids))
            found = run_operator(name, inputs, attributes, variant=variant, opset=opset, in_branch=True)
            exact = TWINS[name](*inputs, **attributes)
            for one, other in zip(found, exact, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
