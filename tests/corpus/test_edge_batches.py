"""Batches at the edges: one example, one id for all, no lookup at all, and what a skipped step leaves."""

from __future__ import annotations

import numpy as np
import pytest
from corpus_cases import Case, MarkedGraph, StepReference
from preset_names import ALL

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession

PRESETS = ALL
TOLERANCE = 4e-6  # a few units in the last place of float32, relative to the largest weight
ROOT = 5e-4  # of the largest movement: the float32 root of a rank-deficient factor, 2·eps·(1 + D/ρ) = 4e-4


class Pair:
    """A session and its reference on one graph."""

    def __init__(self, name: str, preset: str, rest: str = "adam") -> None:
        self.case = Case(name)
        self.graph = MarkedGraph(self.case)
        self.weights = self.graph.initial(self.case)
        self.reference = StepReference(self.graph, self.weights, preset, 0.01, rest, 1e-3)
        model = transform(self.case.path, preset=preset, lr=0.01, rest=rest, rest_lr=1e-3)
        self.session = TrainingSession(model, parameters=self.weights, threads=2)

    def batch(self, **changes: np.ndarray) -> dict[str, np.ndarray]:
        feed = {**self.case.feed(), **changes}
        return {item.name: feed[item.name] for item in self.session.batch_inputs}

    def step(self, batch: dict[str, np.ndarray]) -> None:
        session = self.session
        start = {key: np.asarray(session.parameters[key], np.float64) for key in session.parameters}
        self.reference.weights = dict(start)
        self.reference.step(self.graph.run(self.reference.feed(batch)))
        assert session.step(batch)["skipped"] is False
        for key, want in self.reference.weights.items():
            moved = np.abs(want - start[key]).max()
            limit = TOLERANCE * np.abs(want).max() + ROOT * moved
            np.testing.assert_allclose(session.parameters[key], want, rtol=0, atol=limit, err_msg=key)


@pytest.mark.parametrize("preset", PRESETS)
def test_batch_of_one(preset: str) -> None:
    pair = Pair("torchjoint_in__nplm", preset)
    for ids in ([[3, 3, 7, 99]], [[0, 1, 2, 3]], [[5, 5, 5, 5]]):
        pair.step(pair.batch(ids=np.asarray(ids), labels=np.asarray([4])))


@pytest.mark.parametrize("preset", PRESETS)
def test_one_id_for_every_lookup(preset: str) -> None:
    pair = Pair("ortart_legcore__nplm", preset)
    for label in (1, 2, 3):
        pair.step(pair.batch(ids=np.full((64, 4), 42), labels=np.full(64, label)))


@pytest.mark.parametrize("preset", PRESETS)
def test_batch_without_a_lookup_leaves_the_table_and_its_factors(preset: str) -> None:
    """Every id is the padding row: the other parameters move, the table's own counters stay."""
    pair = Pair("torchjoint_in__nplm_pad0", preset)
    pair.step(pair.batch())
    before = {key: np.array(value) for key, value in pair.session.states.items()}
    pair.step(pair.batch(ids=np.zeros((6, 4), np.int64)))
    after = pair.session.states
    table = [
        key
        for key in before
        if key.startswith("kfac/m.emb.weight/") and not key.endswith(("root", "slot"))  # slot is scratch
    ]
    assert table
    for key in (*table, "m.emb.weight"):
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)
    assert np.abs(after["m.fc.weight"] - before["m.fc.weight"]).max() > 1e-4
    assert after["kfac/t"] == before["kfac/t"] + 1
    pair.step(pair.batch())


@pytest.mark.parametrize("preset", PRESETS)
def test_skipped_step_changes_nothing(preset: str) -> None:
    pair = Pair("ortart_legcore__twotower", preset)
    pair.step(pair.batch())
    before = {key: np.array(value) for key, value in pair.session.states.items()}
    broken = pair.batch()
    (name,) = [key for key, value in broken.items() if value.dtype == np.float32]
    broken[name] = np.where(np.arange(len(broken[name])) == 2, np.nan, broken[name]).astype(np.float32)
    assert pair.session.step(broken)["skipped"] is True
    after = pair.session.states
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    pair.step(pair.batch())


def test_counts_are_renormalized_without_changing_the_numbers() -> None:
    """With decay 0.5 the running scale of A passes 2⁻²⁰ at step 21: the counts take it in."""
    case = Case("torchjoint_in__nplm")
    graph = MarkedGraph(case)
    weights = graph.initial(case)
    model = transform(case.path, preset="half", lr=0.01, rest="sgd", rest_lr=1e-3, decay_a=0.5)
    reference = StepReference(graph, weights, "half", 0.01, "sgd", 1e-3)
    for table in reference.tables.values():
        table.settings = type(table.settings)(**{**vars(table.settings), "input_decay": 0.5})
    scales = []
    with TrainingSession(model, parameters=weights, threads=2) as session:
        for t in range(45):
            feed = case.feed("in" if t % 2 == 0 else "in2")
            batch = {item.name: feed[item.name] for item in session.batch_inputs}
            reference.weights = {
                key: np.asarray(session.parameters[key], np.float64) for key in session.parameters
            }
            reference.step(graph.run(reference.feed(batch)))
            session.step(batch)
            for key, want in reference.weights.items():
                got = session.parameters[key]
                np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
            scales.append(float(session.states["kfac/m.emb.weight/A.scale"]))
    assert scales[19] == 2.0**-20
    assert scales[20] == 1.0
    assert scales[41] == 1.0
