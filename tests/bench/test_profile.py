"""Profiles of ONNX Runtime are read: nodes belong to operators, bodies of loops are not counted twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfac_onnx.bench.profile import GRAPH, PLUMBING, operator_of, read_events

RECORDED = Path(__file__).parents[1] / "data" / "bench" / "profile.json"


@pytest.mark.parametrize(
    ("node", "operator"),
    [
        ("_inlfunc_OutputFactorUpdate_token_1_n7/MatmulTransposeFusion/", "OutputFactorUpdate"),
        ("_inlfunc_FactorInverseRoot_n12", "FactorInverseRoot"),
        ("_inlfunc_Adam_n24", "Adam"),
        ("kfac/insert-embedding-kfac/item/A.before", PLUMBING),
        ("gradient/pq/Mul_2", GRAPH),
        ("Gather_0", GRAPH),
        ("", GRAPH),
    ],
)
def test_nodes_belong_to_operators(node: str, operator: str) -> None:
    assert operator_of(node) == operator


def kernel(name: str, start: int, duration: int) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration}


def run_of(start: int, duration: int) -> dict[str, object]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": duration}


def test_times_are_medians_of_runs() -> None:
    events = []
    for start, slow in ((0, 1), (1_000, 1), (2_000, 10)):
        events += [
            kernel("Gather_0", start + 10, 20 * slow),
            kernel("_inlfunc_ApplyRows_n4", start + 300, 40),
            kernel("_inlfunc_ApplyRows_n5", start + 350, 50),
            run_of(start, 500),
        ]
    runs, found = read_events(events)
    assert runs == [0.5, 0.5, 0.5]
    assert found == {GRAPH: (pytest.approx(0.02), 1), "ApplyRows": (pytest.approx(0.09), 2)}


def test_a_loop_holds_its_body() -> None:
    events = [
        kernel("_inlfunc_FactorInverseRoot_n5", 110, 30),
        kernel("_inlfunc_FactorInverseRoot_n12", 100, 200),  # the Loop, written after its body
        kernel("Add_1", 310, 7),
        run_of(90, 400),
    ]
    _, found = read_events(events)
    assert found == {"FactorInverseRoot": (pytest.approx(0.2), 1), GRAPH: (pytest.approx(0.007), 1)}


def test_a_recorded_profile() -> None:
    runs, found = read_events(json.loads(RECORDED.read_text()))
    assert len(runs) == 3
    assert found["ApplyRows"][1] == 7
    total = sum(each for each, _ in found.values())
    assert 0 < total < sorted(runs)[1]  # nodes take less than the run
