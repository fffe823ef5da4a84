"""The float64 training step of one table, against formulas written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.reference import SETTINGS, BlockReference, BlockSettings, TableReference

V, D = 7, 3
LR = 0.1
ATOL = 1e-12  # float64, a few hundred roundings of 1e-16 on numbers of order one


def batch(seed: int, size: int = 6) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, V - 1, size), rng.normal(size=(size, D))


def start() -> Any:
    return np.random.default_rng(99).normal(size=(V, D))


def root_of(M: Any, exponent: float) -> Any:
    w, Q = np.linalg.eigh(M)
    return (Q * w**exponent) @ Q.T


def merged(ids: Any, rows: Any) -> Any:
    grad = np.zeros((V, D))
    np.add.at(grad, ids, rows)
    return grad


def test_first_step_of_half_uses_the_batch_itself() -> None:
    ids, rows = batch(0)
    counts = np.bincount(ids, minlength=V)
    G = rows.T @ rows / 6
    scale = (counts + 0.01 * counts.mean()) ** -0.5
    P = root_of(G + 0.01 * np.trace(G) / D * np.eye(D), -0.5)
    expected = start() - LR * scale[:, None] * (merged(ids, rows) @ P)
    found = TableReference("half", V, D, LR).step(start(), ids, rows)
    np.testing.assert_allclose(found, expected, atol=ATOL)
    assert not np.allclose(start() + 1.01 * (found - start()), expected, atol=1e-4)


def test_half_averages_with_its_own_decays_and_refreshes_on_schedule() -> None:
    table, reference = start(), TableReference("half", V, D, LR)
    A, G, P = np.zeros(V), np.zeros((D, D)), np.eye(D)
    for t in range(1, 13):
        ids, rows = batch(t)
        A = 0.99 * A + 0.01 * np.bincount(ids, minlength=V)
        G = 0.95 * G + 0.05 * rows.T @ rows / 6
        a, g = A / (1 - 0.99**t), G / (1 - 0.95**t)
        if t in (1, 2, 4, 8, 10):
            P = root_of(g + 0.01 * np.trace(g) / D * np.eye(D), -0.5)
        scale = (a + 0.01 * a.mean()) ** -0.5
        expected = table - LR * scale[:, None] * (merged(ids, rows) @ P)
        table = reference.step(table, ids, rows)
        np.testing.assert_allclose(table, expected, atol=ATOL)


def test_half_does_not_see_the_scale_of_the_loss() -> None:
    tables = []
    for c in (1.0, 1e-3):
        reference, table = TableReference("half", V, D, LR), start()
        for t in range(3):
            ids, rows = batch(t)
            table = reference.step(table, ids, c * rows)
        tables.append(table)
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-10)


def test_r17_is_the_block_of_the_original() -> None:
    """Per-example gradients are c times those of the mean loss; the update takes the graph's own gradient."""
    c = 6.0
    reference, table = TableReference("r1.7", V, D, LR), start()
    block = BlockReference(V, D, BlockSettings())
    for t in range(1, 7):
        ids, rows = batch(t)
        block.covariance_update([[ids]], [[[c * rows]]], 0.95)
        if t in (1, 2, 4):
            block.inverse_update(1e-3)
        update = block.multiply_matpower(merged(ids, rows), None, 1e-3, -1.0)
        expected = table - LR * update
        table = reference.step(table, ids, rows, scale=c)
        # cond(G) is about 1e3: inverses by LU and by eigh differ by 1e3 · 1e-16, relatively
        np.testing.assert_allclose(table, expected, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("preset", ["adagrad", "adaptive"])
def test_row_scales_learn_from_turned_rows(preset: str) -> None:
    reference, table = TableReference(preset, V, D, LR), start()
    G, history = np.zeros((D, D)), np.zeros(V)
    for t in range(1, 5):
        ids, rows = batch(t)
        G = 0.95 * G + 0.05 * rows.T @ rows / 6
        g = G / (1 - 0.95**t)
        if t in (1, 2, 4):
            P = root_of(g + 0.01 * np.trace(g) / D * np.eye(D), -0.5)
        turned = merged(ids, rows) @ P
        b = 1 - t**-0.8
        squares = (turned**2).mean(axis=1)
        history = history + squares if preset == "adagrad" else b * history + (1 - b) * squares
        seen = np.unique(ids)
        expected = table.copy()
        floor = 1e-10 if preset == "adagrad" else 0.0
        expected[seen] -= LR * turned[seen] / (np.sqrt(history[seen]) + floor)[:, None]
        table = reference.step(table, ids, rows)
        np.testing.assert_allclose(table, expected, atol=ATOL)


@pytest.mark.parametrize("preset", list(SETTINGS))
def test_dropped_rows_count_for_nothing(preset: str) -> None:
    ids, rows = batch(1)
    keep = np.array([1, 0, 1, 1, 0, 1])
    poisoned = np.where(keep[:, None] != 0, rows, np.nan)
    whole, dropped = TableReference(preset, V, D, LR), TableReference(preset, V, D, LR)
    expected = whole.step(start(), ids[keep != 0], rows[keep != 0])
    np.testing.assert_array_equal(dropped.step(start(), ids, poisoned, keep), expected)
    assert dropped.lookups == 4


@pytest.mark.parametrize("preset", list(SETTINGS))
def test_a_step_that_is_not_finite_changes_nothing(preset: str) -> None:
    reference, clean = TableReference(preset, V, D, LR), TableReference(preset, V, D, LR)
    table = reference.step(start(), *batch(1))
    clean.step(start(), *batch(1))
    ids, rows = batch(2)
    rows[3, 1] = np.inf
    np.testing.assert_array_equal(reference.step(table, ids, rows), table)
    np.testing.assert_array_equal(reference.step(table, *batch(2), finite=False), table)
    assert (reference.t, reference.skipped) == (1, 2)
    np.testing.assert_array_equal(reference.step(table, *batch(3)), clean.step(table, *batch(3)))


@pytest.mark.parametrize("preset", list(SETTINGS))
def test_a_batch_without_a_lookup_is_a_step_without_an_update(preset: str) -> None:
    reference = TableReference(preset, V, D, LR)
    table = reference.step(start(), *batch(1))
    G, A = reference.output_factor, reference.input_factor
    np.testing.assert_array_equal(reference.step(table, np.zeros(0, np.int64), np.zeros((0, D))), table)
    assert reference.t == 2
    np.testing.assert_array_equal(reference.output_factor, G)
    np.testing.assert_array_equal(reference.input_factor, A)


@pytest.mark.parametrize("preset", ["half", "adagrad", "adaptive"])
def test_gradients_that_are_all_zero_keep_the_root_and_the_table(preset: str) -> None:
    reference = TableReference(preset, V, D, LR)
    ids, rows = batch(1)
    np.testing.assert_array_equal(reference.step(start(), ids, 0 * rows), start())
    np.testing.assert_array_equal(reference.root, np.eye(D))
    assert (reference.t, reference.skipped) == (1, 0)


def test_a_tied_table_adds_its_dense_gradient() -> None:
    ids, rows = batch(1)
    dense = np.random.default_rng(5).normal(size=(V, D))
    tied, plain = TableReference("half", V, D, LR), TableReference("half", V, D, LR)
    rows_only = plain.step(start(), ids, rows) - start()
    found = tied.step(start(), ids, rows, dense=dense) - start()
    np.testing.assert_array_equal(tied.output_factor, plain.output_factor)
    a, _ = tied.damping()
    extra = -LR * ((tied.a_hat() + a) ** -0.5)[:, None] * (dense @ tied.root)
    np.testing.assert_allclose(found, rows_only + extra, atol=ATOL)


def test_negative_ids_count_from_the_end_and_lr_may_change() -> None:
    ids, rows = batch(1)
    one, two = TableReference("half", V, D, LR), TableReference("half", V, D, 1.0)
    expected = one.step(start(), ids, rows)
    np.testing.assert_array_equal(two.step(start(), ids - V, rows, lr=LR), expected)


@pytest.mark.parametrize("name", list(PRESETS))
def test_settings_are_those_of_the_presets(name: str) -> None:
    preset, settings = PRESETS[name], SETTINGS[name]
    assert settings.row_scale == preset.row_scale
    assert settings.exponent == preset.exponent
    assert (settings.damping_kind, settings.damping) == (preset.damping.kind, preset.damping.value)
    assert preset.input_decay in (None, settings.input_decay)
    for field in ("output_decay", "debias", "normalize_counts", "scale_gradients", "start_input"):
        assert getattr(settings, field) == getattr(preset, field), field
    for field in ("refresh_every", "epsilon", "window_power"):
        assert getattr(settings, field) == getattr(preset, field), field
    assert settings.start_output == (1.0 if preset.start_output == "identity" else 0.0)
