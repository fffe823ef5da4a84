"""The float64 training step of one table, against formulas written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from preset_names import ALL, COUNTING, INVARIANT

from kfac_onnx.fisher.damping import Pi, Relative
from kfac_onnx.fisher.presets import PRESETS, Preset
from kfac_onnx.fisher.row_scales import Counts, RowScale, SquareSum, Window
from kfac_onnx.fisher.sampling import Sample
from kfac_onnx.fisher.settings import Average
from kfac_onnx.reference import SETTINGS, BlockReference, BlockSettings, TableReference
from kfac_onnx.reference.operators import sample_rows

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


@pytest.mark.parametrize("preset", INVARIANT)
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
    damping = Pi(settings.damping) if settings.damping_kind == "pi" else Relative(settings.damping)
    average = Average(decay=settings.input_decay, start=settings.start_input, debias=settings.debias)
    rows: dict[str, RowScale] = {
        "factor": Counts(average=average, share=settings.normalize_counts),
        "adagrad": SquareSum(epsilon=settings.epsilon),
        "window": Window(power=settings.window_power, least=settings.window_least),
    }
    counting = settings.row_scale == "factor"
    assert preset == Preset(
        name=name,
        powers=((("A", settings.input_exponent),) if counting else ()) + (("G", settings.exponent),),
        rows=rows[settings.row_scale],
        output=Average(decay=settings.output_decay, start=settings.start_output, debias=settings.debias),
        damping=damping,
        lr=preset.lr,
        refresh_every=settings.refresh_every,
        sample=Sample(rows=settings.g_rows, every=settings.g_every, per_column=settings.rows_per_column),
        per_example=settings.scale_gradients,
    )


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_independent_uses_are_the_originals_multi_use_block(uses: int) -> None:
    """r1.7 over U uses of B rows each: counts, dampings λ/U and the coefficient 1/U of the original's block."""
    settings = BlockSettings()
    block = BlockReference(V, D, settings, num_uses=uses)
    table = TableReference("r1.7", V, D, LR, num_uses=uses)
    W = start()
    for seed in range(3):
        ids, rows = zip(*(batch(10 * seed + use) for use in range(uses)), strict=True)
        block.covariance_update([list(ids)], [[list(rows)]], 0.95)
        if seed < 2:  # steps 1 and 2 refresh, step 3 does not
            block.inverse_update(1e-3)
        grad = merged(np.concatenate(ids), np.concatenate(rows))
        want = W - LR * block.multiply_matpower(grad, None, 1e-3, -1.0)
        W = table.step(W, np.concatenate(ids), np.concatenate(rows))
        np.testing.assert_allclose(W, want, atol=1e-10)


@pytest.mark.parametrize("preset", COUNTING)
def test_independent_uses_at_an_equal_damping_only_scale_the_update(preset: str) -> None:
    """c = U alone: with λ·U (ρ·√U) given, U uses move the table U^exponent as far."""
    ids, rows = batch(3)
    plain = TableReference(preset, V, D, LR)
    damping = plain.settings.damping * (4.0 if preset == "r1.7" else 2.0)
    four = TableReference(preset, V, D, LR, num_uses=4, damping=damping)
    one = plain.step(start(), ids, rows) - start()
    other = four.step(start(), ids, rows) - start()
    np.testing.assert_allclose(other, 4.0**plain.settings.exponent * one, atol=ATOL)


@pytest.mark.parametrize("preset", ALL)
def test_a_projection_of_one_hot_rows_is_a_lookup(preset: str) -> None:
    """x·W with one-hot x has the left vectors of a lookup, so its statistics and its update are the same."""
    lookup, product = TableReference(preset, V, D, LR), TableReference(preset, V, D, LR)
    W = start()
    for seed in range(3):
        ids, rows = batch(seed)
        want = lookup.step(W, ids, rows, scale=3.0)
        x = np.eye(V)[ids[2:]]
        W = product.step(W, ids[:2], rows[:2], scale=3.0, dense=x.T @ rows[2:], projections=[(x, rows[2:])])
        np.testing.assert_allclose(W, want, atol=ATOL)


@pytest.mark.parametrize("preset", COUNTING)
def test_a_factor_of_the_loss_changes_both_sides_as_it_changes_one(preset: str) -> None:
    """Half does not see it; r1.7 with gradients 10 times as large is r1.7 with c = 10, times 10."""
    ids, rows = batch(0)
    rng = np.random.default_rng(5)
    delta, h = rng.normal(size=(4, V)), rng.normal(size=(4, D))

    def moved(factor: float, scale: float) -> Any:
        table = TableReference(preset, V, D, LR)
        pair = (factor * delta, h)
        new = table.step(
            start(), ids, factor * rows, scale=scale, dense=factor * delta.T @ h, projections=[pair]
        )
        return new - start()

    if preset == "half":
        np.testing.assert_allclose(moved(10.0, 1.0), moved(1.0, 1.0), atol=1e-11)
    else:
        np.testing.assert_allclose(moved(10.0, 1.0), 10.0 * moved(1.0, 10.0), atol=1e-11)


def test_statistics_of_both_sides_by_hand() -> None:
    ids, rows = batch(1)
    rng = np.random.default_rng(6)
    delta, h = rng.normal(size=(4, V)), rng.normal(size=(4, D))
    table = TableReference("half", V, D, LR)
    grad = merged(ids, rows) + delta.T @ h
    found = table.step(start(), ids, rows, dense=delta.T @ h, projections=[(delta, h), (0 * delta, h)])
    m = np.mean([row @ row for row in delta])
    A = np.bincount(ids, minlength=V) + sum(row**2 / m for row in delta)
    G = (sum(np.outer(g, g) for g in rows) + m * sum(np.outer(x, x) for x in h)) / 10
    P = root_of(G + 0.01 * np.trace(G) / D * np.eye(D), -0.5)
    expected = start() - LR * ((A + 0.01 * A.mean()) ** -0.5)[:, None] * (grad @ P)
    np.testing.assert_allclose(found, expected, atol=ATOL)
    assert table.lookups == 10


def test_a_sample_is_unbiased_and_takes_every_row_equally_often() -> None:
    """However the rows repeat: over the turns the mean over the sample tends to the mean over all rows."""
    rng = np.random.default_rng(4)
    for total, size in ((96, 12), (97, 12), (50, 49), (90, 3)):
        rows = rng.normal(size=(total, D)) * np.where(np.arange(total) % 8 == 0, 10.0, 1.0)[:, None]
        full = rows.T @ rows / total
        found, taken, turns = np.zeros((D, D)), np.zeros(total), 4000
        for turn in range(turns):
            (chosen,) = sample_rows(total, size, turn)
            assert len(chosen) == size
            assert (np.diff(chosen) >= 0).all()
            assert chosen[0] >= 0
            assert chosen[-1] < total
            np.add.at(taken, chosen, 1)
            found += rows[chosen].T @ rows[chosen] / size / turns
        # Evenly filling sequences err by about 1/turns; independent draws would by 1/sqrt(turns · size/total).
        np.testing.assert_allclose(found, full, atol=0.01 * np.abs(full).max())
        np.testing.assert_allclose(taken * total / (turns * size), 1.0, atol=0.1)


def test_a_sample_of_all_rows_is_all_of_them_in_order() -> None:
    for turn in (0, 1, 10**6):
        for size in (40, 41, 10**9):
            assert sample_rows(40, size, turn)[0].tolist() == list(range(40))
    assert sample_rows(0, 5, 1)[0].size == 0


def test_partial_statistics_by_hand() -> None:
    """G from 2 of 6 rows in steps 1, 2, 4, 5, 8, 10; A from all of them in each."""
    table, reference = start(), TableReference("half", V, D, LR, g_rows=2, g_every=5)
    A, G, count, P = np.zeros(V), np.zeros((D, D)), 0, np.eye(D)
    for t in range(1, 13):
        ids, rows = batch(t)
        A = 0.99 * A + 0.01 * np.bincount(ids, minlength=V)
        if t in (1, 2, 4, 5, 8, 10):
            some = rows[sample_rows(6, 2, count)[0]]
            G, count = 0.95 * G + 0.05 * some.T @ some / 2, count + 1
        a, g = A / (1 - 0.99**t), G / (1 - 0.95**count)
        if t in (1, 2, 4, 8, 10):
            P = root_of(g + 0.01 * np.trace(g) / D * np.eye(D), -0.5)
        scale = (a + 0.01 * a.mean()) ** -0.5
        expected = table - LR * scale[:, None] * (merged(ids, rows) @ P)
        table = reference.step(table, ids, rows)
        np.testing.assert_allclose(table, expected, atol=ATOL)


def test_a_table_without_lookups_on_schedule_takes_its_first_batch_at_once() -> None:
    reference = TableReference("half", V, D, LR, g_every=100)
    none = np.zeros(0, np.int64), np.zeros((0, D))
    counts = []
    for t in range(1, 14):
        reference.step(start(), *(batch(t) if t in (11, 12) else none))
        counts.append(reference.g_count)
    assert counts == [0] * 10 + [1, 1, 1]


def test_a_table_does_not_move_while_g_is_zero() -> None:
    """A sample may hold zero rows only; without a scale for its update the table waits."""
    ids, rows = np.arange(6), np.zeros((6, D))
    (chosen,) = sample_rows(6, 2, 0)
    rows[[row for row in range(6) if row not in chosen]] = 1.0
    for preset in ("half", "adagrad", "adaptive"):
        reference = TableReference(preset, V, D, LR, g_rows=2)
        np.testing.assert_array_equal(reference.step(start(), ids, rows), start())
        assert not reference.history.any()
