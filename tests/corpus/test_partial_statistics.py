"""G from a sample of rows (`g-rows`) and in some steps only (`g-every`), on graphs of every kind.

The reference takes the same rows in the same steps, so steps agree to rounding; a session, a plain host and a
session that was stopped and resumed agree with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import StepReference, initial_state, marked
from corpus_steps import compare, rest_of
from plain_host import Host
from preset_names import ALL, COUNTING, INVARIANT

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.metadata import State, Step
from kfac_onnx.reports.inspect import inspect
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = "torchjoint_in__nplm"
PADDED = ("torchjoint_in__nplm_pad0", "ortart_leg14loss__nplm_pad0", "torchjoint_in__dlrm_offsets_mean")
TIED = "ortart_legloss__gpt_tied"
TWICE = "ortart_legcore__siamese"
FEW: dict[str, Any] = {"g_rows": 6}
RARE: dict[str, Any] = {"g_every": 3}
BOTH: dict[str, Any] = {"g_rows": 6, "g_every": 3}


@pytest.mark.parametrize("options", [FEW, RARE, BOTH], ids=str)
@pytest.mark.parametrize("preset", ALL)
def test_twenty_steps_equal_the_reference(preset: str, options: dict[str, Any]) -> None:
    compare(PLAIN, preset, threads=2, steps=20, **options)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", [*PADDED, TWICE])
def test_masks_bags_and_several_uses(name: str, threads: int) -> None:
    """Rows that padding drops are never taken: a sample is of the rows that count."""
    compare(name, "half", threads=threads, steps=12, rest=rest_of(name), **BOTH)


@pytest.mark.parametrize("preset", COUNTING)
def test_independent_uses(preset: str) -> None:
    compare(TWICE, preset, threads=2, steps=12, rest="sgd", uses="multi-indep", **BOTH)


@pytest.mark.parametrize("tied", ["lookup", "both"])
@pytest.mark.parametrize("preset", ["half", "adaptive"])
def test_tied_tables(preset: str, tied: str) -> None:
    compare(TIED, preset, threads=2, steps=12, rest="sgd", tied=tied, **BOTH)


def test_more_rows_than_there_are_is_all_of_them() -> None:
    """Not to tolerance: bit by bit, since the rows are taken in order."""
    case, graph = marked(PLAIN)
    weights, found = graph.initial(case), []
    for options in ({}, {"g_rows": 10_000, "g_every": 1}):
        with TrainingSession(transform(case.path, **options), parameters=weights, threads=1) as session:
            for which in ("in", "in2", "in"):
                session.step({item.name: case.feed(which)[item.name] for item in session.batch_inputs})
            found.append({key: np.array(value) for key, value in session.states.items()})
    for key in found[0]:
        np.testing.assert_array_equal(found[0][key], found[1][key], err_msg=key)


def test_g_is_bounded_by_default_and_where_padding_drops_rows_it_takes_them_all() -> None:
    def statistics(name: str, **options: Any) -> set[str]:
        return {site.statistics for site in inspect(transform(marked(name)[0].path, **options)).sites}

    bounded = {"lookups; G from at most 1024 rows"}  # max(1024, 8·D) of few columns
    assert statistics(PLAIN) == statistics(PLAIN, g_rows=None, g_every=1) == bounded
    assert statistics(PLAIN, g_rows=6) == {"lookups; G from at most 6 rows"}
    assert statistics(PADDED[0]) == {"lookups"}


@pytest.mark.parametrize("options", [FEW, {"g_every": 10}], ids=str)
def test_the_options_make_a_difference(options: dict[str, Any]) -> None:
    """The reference without the option is far off."""
    case, graph = marked(PLAIN)
    weights = graph.initial(case)
    reference = StepReference(graph, weights, "half", 0.01, "sgd", 1e-3)
    model = transform(case.path, preset="half", rest="sgd", **options)
    with TrainingSession(model, parameters=weights) as session:
        for t in range(4):  # at step 3 the second leaves a batch out, at step 4 the root sees it
            feed = case.feed("in2" if t % 2 else "in")
            reference.step(graph.run(reference.feed(feed)))
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
        (site,) = graph.sites
        want, got = reference.weights[site.parameter], session.parameters[site.parameter]
        moved = np.abs(want - weights[site.parameter]).max()
        assert np.abs(got - want).max() > 0.01 * moved


def test_g_is_updated_on_schedule_alone() -> None:
    """Steps 1, 2, 4, 8 and the multiples of 5; counts of A in every step."""
    case, graph = marked(PLAIN)
    seen, rows = [], []
    model = transform(case.path, preset="half", g_every=5)
    with TrainingSession(model, parameters=graph.initial(case)) as session:
        for _ in range(16):
            before = np.array(session.states["kfac/m.emb.weight/G"])
            session.step({item.name: case.feed()[item.name] for item in session.batch_inputs})
            seen.append(int(session.states["kfac/m.emb.weight/G.count"]))
            rows.append(int(session.states["kfac/m.emb.weight/A.count"]))
            unchanged = np.array_equal(before, session.states["kfac/m.emb.weight/G"])
            assert unchanged == (seen[-1] == (seen[-2] if len(seen) > 1 else 0))
    assert seen == [1, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6, 6, 6, 6, 7, 7]
    assert rows == list(range(1, 17))


def test_a_skipped_step_is_not_counted() -> None:
    """The step after it is the same step, with the same rows."""
    case, graph = marked("torchjoint_in__dlrm_offsets_mean")
    model = transform(case.path, **BOTH)
    runs = []
    for skipped in (set[int](), {2, 5}):
        with TrainingSession(model, parameters=graph.initial(case), threads=1) as session:
            names = [item.name for item in session.batch_inputs]
            for t in range(8):
                feed = case.feed("in2" if t % 2 else "in")
                batch = {name: feed[name] for name in names}
                if t in skipped:
                    broken = {
                        key: array * np.nan if array.dtype.kind == "f" else array
                        for key, array in batch.items()
                    }
                    assert session.step({k: np.asarray(v, batch[k].dtype) for k, v in broken.items()})[
                        "skipped"
                    ]
                assert not session.step(batch)["skipped"]
            runs.append({key: np.array(value) for key, value in session.states.items()})
    for key in runs[0]:
        np.testing.assert_array_equal(runs[0][key], runs[1][key], err_msg=key)


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_run_takes_the_same_rows(stop: int, tmp_path: Path) -> None:
    case, graph = marked(PLAIN)
    model = transform(case.path, g_rows=6, g_every=3)
    feeds = [case.feed("in2" if t % 2 else "in") for t in range(14)]

    def run(session: TrainingSession, first: int, last: int) -> dict[str, np.ndarray]:
        for feed in feeds[first:last]:
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
        return {key: np.array(value) for key, value in session.states.items()}

    with TrainingSession(model, parameters=graph.initial(case), threads=1) as session:
        whole = run(session, 0, 14)
    with TrainingSession(model, parameters=graph.initial(case), threads=1) as session:
        run(session, 0, stop)
        session.save(tmp_path / "run.ckpt")
    with TrainingSession.resume(tmp_path / "run.ckpt", threads=1) as session:
        resumed = run(session, stop, 14)
    for key in whole:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)


def test_a_plain_host_gets_the_same_numbers() -> None:
    case, graph = marked(PADDED[0])
    weights = graph.initial(case)
    model = transform(case.path, rest="sgd", **BOTH)
    states = metadata.read_list(model, "state", State)
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert (step.settings.g_rows, step.settings.g_every) == (6, 3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    held = {state.input: initial_state(state, weights) for state in states}
    with TrainingSession(model, parameters=weights, threads=2) as session:
        for t in range(10):
            feed = case.feed("in2" if t % 2 else "in")
            batch = {key: feed[key] for key in step.batch}
            session.step(batch)
            news = host.run([state.output for state in states], {**batch, **held})
            held = {state.input: new for state, new in zip(states, news, strict=True)}
        for key, value in session.parameters.items():  # ten steps of float32, on other numbers of threads
            np.testing.assert_allclose(held[key], value, rtol=0, atol=2e-6 * np.abs(value).max())


def test_the_dense_shape() -> None:
    case, graph = marked(PADDED[0])
    weights = graph.initial(case)
    reference = StepReference(graph, weights, "half", 1.0, "sgd", 0.0, **BOTH)
    host = Host(transform(case.path, preset="half", shape="dense", **BOTH), weights)
    gradient = next(item.gradient for item in graph.parameters if item.name == graph.sites[0].parameter)
    for t in range(9):
        batch = case.feed("in2" if t % 2 else "in") | graph.fed_back(case)
        reference.weights = {key: np.asarray(value, np.float64) for key, value in weights.items()}
        reference.step(graph.run(reference.feed(batch)))
        found = host.run({**batch, **weights})[str(gradient)]
        name = graph.sites[0].parameter
        want = weights[name] - reference.weights[name]
        np.testing.assert_allclose(found, want, rtol=0, atol=5e-5 * np.abs(want).max())
        weights[name] = (weights[name] - 0.01 * found).astype(np.float32)


@pytest.mark.parametrize("preset", COUNTING)
@pytest.mark.parametrize("name", [PLAIN, *PADDED[:2]])
def test_the_expectation_of_g_is_the_full_statistic(name: str, preset: str) -> None:
    """At fixed weights, with decay 0, G is the batch's own: its mean over steps tends to the one of all rows."""
    case, graph = marked(name)
    fixed = {"preset": preset, "lr": 0.0, "rest": "sgd", "rest_lr": 0.0, "decay_g": 0.0}
    state, turns, found = f"kfac/{graph.sites[0].parameter}/G", 300, []
    for options, steps in (({}, 1), ({"g_rows": 7}, turns)):
        model = transform(case.path, **fixed, **options)
        total: Any = 0.0
        with TrainingSession(model, parameters=graph.initial(case), threads=1) as session:
            for _ in range(steps):
                session.step({item.name: case.feed()[item.name] for item in session.batch_inputs})
                total = total + np.asarray(session.states[state], np.float64) / steps
        found.append(total)
    # Some twenty rows, each taken about 300·7/20 times, once more or less: a percent of each row's part.
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=0.02 * np.abs(found[0]).max())
    assert not np.allclose(1.05 * found[1], found[0], rtol=0, atol=0.02 * np.abs(found[0]).max())


@pytest.mark.parametrize("preset", INVARIANT)
def test_a_table_waits_while_its_sample_is_zero(preset: str) -> None:
    """The one row taken at step 1 has no gradient, since its label is ignored: G is 0, the update has no scale."""
    case, graph = marked("ortart_dynloss__nplm_ignore")
    weights = graph.initial(case)
    reference = StepReference(graph, weights, preset, 0.01, "sgd", 1e-3, g_rows=1)
    feed = {**case.feed(), "labels": case.feed()["labels"].copy()}
    feed["labels"][0] = -100
    (site,) = graph.sites
    model = transform(case.path, preset=preset, lr=0.01, rest="sgd", g_rows=1)
    with TrainingSession(model, parameters=weights, threads=1) as session:
        for moves in (False, True):
            before = session.parameters[site.parameter]
            reference.step(graph.run(reference.feed(feed)))
            assert not session.step({item.name: feed[item.name] for item in session.batch_inputs})["skipped"]
            after = session.parameters[site.parameter]
            assert np.array_equal(before, after) is not moves
            # float32, and a root of a matrix of rank one: as in the comparison of single steps
            limit = 4e-6 * np.abs(after).max() + 1e-4 * np.abs(after - before).max()
            assert np.abs(after - reference.weights[site.parameter]).max() <= limit


def test_the_first_batch_is_taken_off_schedule() -> None:
    """Nothing but padding up to step 10: G takes its first batch at step 11, not at the next multiple of 100."""
    case, graph = marked(PADDED[0])
    feed = case.feed()
    (site,) = graph.sites
    counts = []
    with TrainingSession(transform(case.path, g_every=100), parameters=graph.initial(case)) as session:
        names = [item.name for item in session.batch_inputs]
        for t in range(1, 14):
            ids = feed["ids"] if t in (11, 12) else np.full_like(feed["ids"], site.padding_idx)
            session.step({name: {**feed, "ids": ids}[name] for name in names})
            counts.append(int(session.states[f"kfac/{site.parameter}/G.count"]))
    assert counts == [0] * 10 + [1, 1, 1]
