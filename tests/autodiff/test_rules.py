"""Every gradient rule against PyTorch's autograd (tests/data/autodiff/make.py), with static and symbolic shapes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from autodiff_cases import DATA, Case, tables
from autodiff_graphs import case_model, run_gradients

from kfac_onnx.autodiff import rules_quantize
from kfac_onnx.autodiff.backward import no_gradient
from kfac_onnx.autodiff.table import RULES

CASES = {f"{table}-{case.name}": (table, case) for table, cases in tables().items() for case in cases}
# Sums of up to a hundred float32 products; both sides round each once, at 6e-8 of the largest entry.
TOLERANCE = 1e-5


@functools.cache
def golden(table: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{table}.npz") as found:
        return dict(found)


def assert_close(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    if actual.dtype == bool or actual.size == 0:
        np.testing.assert_array_equal(actual, expected)
        return
    scale = max(float(np.max(np.abs(expected))), 1e-30)
    off = float(np.max(np.abs(actual.astype(np.float64) - expected))) / scale
    assert off <= tolerance, f"{name}: off by {off:.2e} of the largest entry\n{actual}\n{expected}"
    assert tolerance < 0.01, "the tolerance would let 1 % pass"


def compare(table: str, case: Case, *, symbolic: bool) -> None:
    prefix = f"{case.name}/"
    known = {
        key.removeprefix(prefix): value for key, value in golden(table).items() if key.startswith(prefix)
    }
    weights = {key[2:]: value for key, value in known.items() if key.startswith("w/")}
    model, gradients = case_model(case, symbolic=symbolic, weights=weights)
    feeds = {key[2:]: value for key, value in known.items() if key.startswith("x/")}
    feeds.update({f"w_{key}": value for key, value in weights.items()})
    results = run_gradients(model, feeds)
    tolerance = case.tolerance or TOLERANCE
    for name in case.outputs:
        assert_close(f"output {name}", results[name], known[f"z/{name}"], tolerance)
    assert set(gradients) == {key[2:] for key in known if key.startswith("g/")}
    for name, output in gradients.items():
        assert_close(f"gradient of {name}", results[output], known[f"g/{name}"], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd(name: str) -> None:
    table, case = CASES[name]
    compare(table, case, symbolic=False)


@pytest.mark.parametrize("name", [name for name, (_, case) in CASES.items() if case.symbolic])
def test_gradients_equal_autograd_where_shapes_are_known_at_run_time(name: str) -> None:
    table, case = CASES[name]
    compare(table, case, symbolic=True)


def test_every_rule_has_a_case() -> None:
    used: set[str | tuple[str, str]] = set()
    for _, case in CASES.values():
        model, _ = case_model(case, symbolic=False, differentiated=False)
        for graph in (model.graph, *model.graph.subgraphs()):
            used.update((node.domain, node.op_type) if node.domain else node.op_type for node in graph)
    ours = set(rules_quantize.RULES)  # a node that no file holds: test_straight_through has its cases
    assert {key for key, rule in RULES.items() if rule is not no_gradient} - ours <= used
