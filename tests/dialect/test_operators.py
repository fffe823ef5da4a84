"""Every operator, on onnxruntime, against its float64 twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx import dialect
from kfac_onnx.reference.operators import TWINS

Runner = Callable[..., list[Any]]
RNG = np.random.default_rng(7)

V, D = 9, 4
IDS = np.array([3, 1, 3, 8, 3])
ROWS = RNG.normal(size=(5, D))
NONE = np.zeros((0, D))
NO_IDS = np.zeros(0, np.int64)
SLOTS = np.array([7, 0, 2, 9, 1, 1, 4, 4, 6], np.int32)
PLACES = np.array([4, 1, 4, 3, 4])
G = ROWS.T @ ROWS / 5
TABLE = RNG.normal(size=(V, D))
STACK = RNG.normal(size=(2, 3, D))
COUNTS = RNG.uniform(0, 3, size=V)

# float32 arithmetic on a few numbers of order one: 20 roundings of 6e-8.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    label: str
    name: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"


def decay_case(label: str, state: tuple[Any, ...], lookups: float, **changed: Any) -> Case:
    attributes = {"decay": 0.99, "debias": 1, "normalize": 0} | changed
    return Case(label, "InputFactorDecay", (*state, lookups), attributes)


CASES = [
    decay_case("first", (1.0, 0.0, 0), 5.0),
    decay_case("later", (0.8, 7.0, 12), 5.0),
    decay_case("share", (0.8, 7.0, 12), 5.0, normalize=1),
    decay_case("biased", (0.8, 7.0, 12), 5.0, debias=0),
    decay_case("no-lookup", (0.8, 7.0, 12), 0.0),
    decay_case("no-lookup-ever", (1.0, 0.0, 0), 0.0),
    decay_case("frozen", (0.8, 7.0, 12), 5.0, decay=1.0, debias=0),
    Case("repeated", "InputFactorUpdate", (COUNTS, IDS, [0.5, 1.0, 0.25, 1.0, 2.0])),
    Case("none", "InputFactorUpdate", (COUNTS, NO_IDS, [])),
    Case("repeated", "InputFactorAverage", (COUNTS, IDS, [1, 0, 1, 1, 1], 5.0), {"decay": 0.3}),
    Case("replace", "InputFactorAverage", (COUNTS, IDS, [1, 0, 1, 1, 1], 5.0), {"decay": 0.0}),
    Case("none", "InputFactorAverage", (COUNTS, NO_IDS, [], 0.0), {"decay": 0.3}),
    Case("first", "OutputFactorUpdate", (np.zeros((D, D)), 0, ROWS, 5.0, 1.0), {"decay": 0.95}),
    Case("later", "OutputFactorUpdate", (G, 7, ROWS, 3.0, 4.0), {"decay": 0.95}),
    Case("one", "OutputFactorUpdate", (G, 7, ROWS[:1], 1.0, 1.0), {"decay": 0.0}),
    Case("none", "OutputFactorUpdate", (G, 7, NONE, 0.0, 1.0), {"decay": 0.95}),
    Case("zero", "OutputFactorUpdate", (G, 3, 0 * ROWS, 5.0, 1.0), {"decay": 0.95}),
    Case("first", "FactorDebias", (G, 1), {"decay": 0.95}),
    Case("later", "FactorDebias", (G, 7), {"decay": 0.95}),
    Case("never", "FactorDebias", (G, 0), {"decay": 0.95}),
    Case("usual", "SampleRows", (100, 7, 3)),
    Case("all", "SampleRows", (5, 8, 12345)),
    Case("long", "SampleRows", (100_000, 300, 10**7)),
    Case("none", "SampleRows", (100, 0, 3)),
    Case("no-rows", "SampleRows", (0, 7, 3)),
    Case("now", "TakeNow", ([5], True)),
    Case("not-now", "TakeNow", ([5], False)),
    Case("usual", "FactorTrace", (G,), {}),
    Case("usual", "DampingRelative", (6.0,), {"rho": 0.01, "size": V}),
    Case("floor", "DampingRelative", (0.0,), {"rho": 1.0, "size": V}),
    Case("usual", "DampingPi", (6.0, G), {"damping": 1e-3, "vocab_size": V, "pi": 1}),
    Case("off", "DampingPi", (6.0, G), {"damping": 0.5, "vocab_size": V, "pi": 0}),
    Case("guarded", "DampingPi", (6.0, 0 * G), {"damping": 0.5, "vocab_size": V, "pi": 2}),
    Case("guard-unused", "DampingPi", (6.0, G), {"damping": 0.5, "vocab_size": V, "pi": 2}),
    Case("no-trace", "DampingPi", (6.0, 0 * G), {"damping": 0.5, "vocab_size": V, "pi": 1}),
    Case("nothing", "DampingPi", (0.0, 0 * G), {"damping": 0.5, "vocab_size": V, "pi": 1}),
    Case("usual", "FactorInverse", (G, 0.1, np.eye(D))),
    Case("no-trace", "FactorInverse", (0 * G, 0.1, 3 * np.eye(D))),
    Case("usual", "FactorInverseRoot", (G, 0.1, np.eye(D)), {"iterations": 20}),
    Case("no-trace", "FactorInverseRoot", (0 * G, 0.1, 3 * np.eye(D)), {"iterations": 20}),
    Case("half", "PreconditionRows", (ROWS, COUNTS[IDS], 0.1, G, 1.0), {"exponent": -0.5}),
    Case("step", "PreconditionRows", (ROWS, COUNTS[IDS], 0.1, G, -0.03), {"exponent": -0.5}),
    Case("inverse", "PreconditionRows", (ROWS, COUNTS[IDS], 0.1, G, 1.0), {"exponent": -1.0}),
    Case("unseen", "PreconditionRows", (ROWS, 0 * COUNTS[IDS], 0.0, G, 1.0), {"exponent": -1.0}),
    Case("none", "PreconditionRows", (NONE, [], 0.1, G, 1.0), {"exponent": -0.5}),
    Case("half", "PreconditionDense", (TABLE, COUNTS, 0.7, 0.1, G), {"exponent": -0.5}),
    Case("repeated", "MergeRows", (IDS, ROWS)),
    Case("one", "MergeRows", (IDS[:1], ROWS[:1])),
    Case("none", "MergeRows", (NO_IDS, NONE)),
    Case("repeated", "MergeLookups", (SLOTS, IDS, ROWS)),
    Case("one", "MergeLookups", (SLOTS, IDS[:1], ROWS[:1])),
    Case("none", "MergeLookups", (SLOTS, NO_IDS, NONE)),
    Case("start", "RowAdagradStep", (ROWS, PLACES, np.zeros(5), 1.0), {"epsilon": 1e-10}),
    Case("later", "RowAdagradStep", (ROWS, PLACES, np.arange(5.0), -0.03), {"epsilon": 0.1}),
    Case("zero", "RowAdagradStep", (0 * ROWS, PLACES, np.zeros(5), 1.0), {"epsilon": 1e-10}),
    Case("none", "RowAdagradStep", (NONE, NO_IDS, [], 1.0), {"epsilon": 1e-10}),
    Case("usual", "RowWindowStep", (ROWS, PLACES, np.arange(5.0), 0.3, -0.03)),
    Case("zero", "RowWindowStep", (0 * ROWS, PLACES, np.zeros(5), 0.3, 1.0)),
    Case("none", "RowWindowStep", (NONE, NO_IDS, [], 0.3, 1.0)),
    Case("start", "RowElementAdagradStep", (ROWS, PLACES, 0 * ROWS), {"epsilon": 1e-10}),
    Case("later", "RowElementAdagradStep", (ROWS, PLACES, ROWS**2), {"epsilon": 0.1}),
    Case("start", "RowAdagrad", (ROWS, np.zeros(5)), {"epsilon": 1e-10}),
    Case("later", "RowAdagrad", (ROWS, np.arange(5.0)), {"epsilon": 0.1}),
    Case("zero", "RowAdagrad", (0 * ROWS, np.zeros(5)), {"epsilon": 1e-10}),
    Case("none", "RowAdagrad", (NONE, []), {"epsilon": 1e-10}),
    Case("start", "RowElementAdagrad", (ROWS, 0 * ROWS), {"epsilon": 1e-10}),
    Case("later", "RowElementAdagrad", (ROWS, ROWS**2), {"epsilon": 0.1}),
    Case("first", "WindowDecay", (1.0, 0, 5.0), {"power": 0.8, "least": 0.01}),
    Case("second", "WindowDecay", (1.0, 1, 5.0), {"power": 0.8, "least": 0.01}),
    Case("later", "WindowDecay", (0.02, 40, 5.0), {"power": 0.8, "least": 0.01}),
    Case("widest", "WindowDecay", (0.02, 400, 5.0), {"power": 0.8, "least": 0.01}),
    Case("no-lookup", "WindowDecay", (0.02, 40, 0.0), {"power": 0.8, "least": 0.01}),
    Case("usual", "RowWindow", (ROWS, np.arange(5.0), 0.3)),
    Case("zero", "RowWindow", (ROWS * [[1], [0], [1], [0], [1]], np.zeros(5), 0.3)),
    Case("none", "RowWindow", (NONE, [], 0.3)),
    Case("repeated", "AddRows", (TABLE, IDS, ROWS)),
    Case("none", "AddRows", (TABLE, NO_IDS, NONE)),
    Case("repeated", "ApplyRows", (TABLE, IDS, ROWS, 0.1)),
    Case("none", "ApplyRows", (TABLE, NO_IDS, NONE, 0.1)),
    Case("repeated", "ApplyColumns", (TABLE.T, IDS, ROWS, 0.1)),
    Case("none", "ApplyColumns", (TABLE.T, NO_IDS, NONE, 0.1)),
    Case("repeated", "ApplyFlat", (TABLE.reshape(-1), IDS, ROWS, 0.1)),
    Case("none", "ApplyFlat", (TABLE.reshape(-1), NO_IDS, NONE, 0.1)),
    Case("rows", "WriteRows", (TABLE, IDS, ROWS[[0, 1, 0, 3, 0]])),
    Case("scalars", "WriteRows", (COUNTS, IDS, [5.0, 2.0, 5.0, 1.0, 5.0])),
    Case("integers", "WriteRows", (np.arange(V), IDS, np.array([5, 2, 5, 1, 5]))),
    Case("none", "WriteRows", (TABLE, NO_IDS, NONE)),
    Case("repeated", "ScatterRows", (IDS, ROWS), {"vocab_size": V}),
    Case("none", "ScatterRows", (NO_IDS, NONE), {"vocab_size": V}),
    Case("finite", "AllFinite", (ROWS,)),
    Case("infinite", "AllFinite", (ROWS * [[1], [1], [np.inf], [1], [1]],)),
    Case("too-large", "AllFinite", (np.array([[2e38, -2e38]]),)),
    Case("unknown", "AllFinite", (ROWS * [[1], [1], [np.nan], [1], [1]],)),
    Case("none", "AllFinite", (NONE,)),
    Case("stack", "MuonDirection", (STACK, STACK[::-1]), {"mu": 0.95}),
    Case("zero", "MuonDirection", (0 * STACK, 0 * STACK), {"mu": 0.95}),
    Case("stack", "OrthogonalizeStep", (STACK / 9,)),
    Case(
        "first",
        "OutputRowScale",
        (TABLE[::-1], 0 * TABLE, 0 * COUNTS, 1),
        {"beta": 0.9, "power": 0.8},
    ),
    Case(
        "later",
        "OutputRowScale",
        (TABLE[::-1], TABLE**2, COUNTS, 40),
        {"beta": 0.9, "power": 0.8},
    ),
    Case(
        "nothing",
        "OutputRowScale",
        (0 * TABLE, 0 * TABLE, 0 * COUNTS, 1),
        {"beta": 0.9, "power": 0.8},
    ),
    Case("first", "LayerMomentum", (TABLE[::-1], 0 * TABLE, 1), {"beta": 0.9}),
    Case("later", "LayerMomentum", (TABLE[::-1], TABLE, 40), {"beta": 0.9}),
    Case("matrix", "DecayWeights", (TABLE, 0.1), {"decay": 0.25}),
    Case("matrix", "Sgd", (TABLE, TABLE[::-1], 0.1)),
    Case("matrix", "Momentum", (TABLE, TABLE[::-1], TABLE**2, 0.1), {"mu": 0.9}),
    Case(
        "first",
        "Adam",
        (TABLE, TABLE[::-1], 0 * TABLE, 0 * TABLE, 1, 0.1),
        {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    ),
    Case(
        "later",
        "Adam",
        (TABLE, TABLE[::-1], TABLE, TABLE**2, 9, 0.1),
        {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-3},
    ),
    Case("vector", "Adagrad", (COUNTS, COUNTS[::-1], COUNTS, 0.1), {"epsilon": 1e-10}),
]


def as_twin(x: Any) -> Any:
    array = np.asarray(x)
    return array if array.dtype.kind == "i" and array.size else array.astype(np.float64)


def expected_of(case: Case) -> list[Any]:
    ports = dialect.OPERATORS[case.name].inputs
    inputs = [
        np.asarray(x, np.int64) if port.dtype == "i64" else as_twin(x)
        for port, x in zip(ports, case.inputs, strict=True)
    ]
    # Attributes are stored as float32; the twin gets the same numbers.
    exact = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in case.attributes.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        return [np.asarray(x) for x in TWINS[case.name](*inputs, **exact)]


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    if found.shape != expected.shape:
        return False
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return False
    limit = tolerance * np.abs(expected[finite]).max(initial=0.0)
    return bool((np.abs(found[finite] - expected[finite]) <= limit).all())


def compared(case: Case, found: list[Any]) -> list[tuple[Any, Any]]:
    if case.name == "MergeLookups":  # in which order, and whether rows of zeros lie between, is the host's
        _, ids, place, merged = found
        _, expected_ids, _, expected = expected_of(case)
        assert np.abs(np.delete(merged, place, axis=0)).max(initial=0.0) == 0
        distinct, first = np.unique(ids, return_index=True)
        assert np.array_equal(distinct, np.sort(expected_ids))
        assert all(len(set(place[ids == number])) == 1 for number in distinct)
        return [(merged[place[first]], expected[np.argsort(expected_ids)])]
    pairs = list(zip(found, expected_of(case), strict=True))
    # A residual has no exact counterpart: its own test bounds it.
    return pairs[:1] if case.name.startswith("FactorInverse") else pairs


SCATTERING = {"InputFactorUpdate", "MergeLookups", "MergeRows", "AddRows", "ApplyRows", "ScatterRows"}
ON_DEVICES = {"ApplyColumns", "ApplyFlat", "InputFactorAverage", "SampleRows", "TakeNow"}
VARIANTS = [(case, "safe") for case in CASES]
VARIANTS += [(case, "sequential") for case in CASES if case.name in SCATTERING]
VARIANTS += [
    (case, variant)
    for variant in ("atomic", "ordered")
    for case in CASES
    if case.name in SCATTERING | ON_DEVICES and str(case) != "TakeNow-not-now"  # always all rows there
]


def test_the_operators_with_several_bodies() -> None:
    def several(*variants: dialect.Variant) -> set[str]:
        bodies = {name: operator.bodies for name, operator in dialect.OPERATORS.items()}
        return {name for name, body in bodies.items() if len({body[variant] for variant in variants}) > 1}

    assert several("safe", "sequential") | several("safe", "atomic") - ON_DEVICES == SCATTERING
    assert several("safe", "atomic", "ordered") == SCATTERING | ON_DEVICES


@pytest.mark.parametrize(("case", "variant"), VARIANTS, ids=str)
def test_operator_equals_its_twin(case: Case, variant: str, run_operator: Runner) -> None:
    found = run_operator(case.name, case.inputs, case.attributes, variant=variant)
    pairs = compared(case, found)
    assert all(close(x, y) for x, y in pairs), pairs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_result_scaled_by_one_percent_fails(case: Case, run_operator: Runner) -> None:
    found = run_operator(case.name, case.inputs, case.attributes)
    for x, y in compared(case, found):
        visible = y[np.isfinite(y)]
        if visible.size and np.abs(visible).max() > 0:
            assert not close(x, y * 1.01)


def test_every_operator_has_a_twin_and_a_case() -> None:
    assert set(TWINS) == set(dialect.OPERATORS) == {case.name for case in CASES}


HOSTED = [
    "InputFactorDecay-later",
    "FactorInverse-usual",
    "FactorInverseRoot-usual",
    "DampingPi-usual",
    "MergeRows-repeated",
]
HOSTED += [
    "OutputFactorUpdate-later",
    "ApplyFlat-repeated",
    "WindowDecay-later",
    "Adam-later",
    "ScatterRows-repeated",
]


@pytest.mark.parametrize("in_branch", [False, True], ids=["plain", "in-branch"])
@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23, 24])
def test_bodies_run_in_hosts_of_opset_18_to_24(opset: int, in_branch: bool, run_operator: Runner) -> None:
    for case in CASES:
        if str(case) in HOSTED:
            found = run_operator(case.name, case.inputs, case.attributes, opset=opset, in_branch=in_branch)
            assert all(close(x, y) for x, y in compared(case, found)), str(case)


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_models_pass_the_onnx_checker(opset: int, make_model: Callable[..., ir.Model], typed: Any) -> None:
    for name in dialect.OPERATORS:
        case = next(case for case in CASES if case.name == name)
        inputs = typed(name, case.inputs)
        model = make_model(name, inputs, case.attributes, variant="safe", opset=opset, in_branch=False)
        for i, (output, x) in enumerate(zip(model.graph.outputs, expected_of(case), strict=True)):
            output.shape = ir.Shape([f"o{i}{axis}" for axis in range(x.ndim)])
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_flags_and_writes_take_other_element_types(dtype: str, run_operator: Runner) -> None:
    kind = np.dtype(dtype)
    table, rows = np.zeros((V, D), kind), np.ones((2, D), kind)
    written = run_operator("WriteRows", (table, [2, 5], rows))[0]
    assert written.dtype == kind
    assert written.astype(np.float32).sum(axis=1).tolist() == [0, 0, D, 0, 0, D, 0, 0, 0]
    assert run_operator("AllFinite", (rows,))[0] == 0
    rows[1, 1] = np.inf
    assert np.isnan(run_operator("AllFinite", (rows,))[0])


@pytest.mark.parametrize("case", [case for case in CASES if str(case) not in HOSTED], ids=str)
def test_bodies_run_inside_a_branch(case: Case, run_operator: Runner) -> None:
    found = run_operator(case.name, case.inputs, case.attributes, opset=21, in_branch=True)
    assert all(close(x, y) for x, y in compared(case, found))


def test_safe_scatters_are_right_with_four_threads(run_operator: Runner) -> None:
    rng = np.random.default_rng(3)
    ids, rows = rng.integers(0, 10, 20_000), rng.normal(size=(20_000, 8))
    counts = np.bincount(ids, minlength=10)
    added = run_operator("InputFactorUpdate", (np.zeros(10), ids, np.ones(20_000)), threads=4)[0]
    assert np.array_equal(added, counts)
    for name, inputs, attributes in (
        ("AddRows", (np.zeros((10, 8)), ids, rows), {}),
        ("ApplyRows", (np.zeros((10, 8)), ids, rows, -1.0), {}),
        ("ScatterRows", (ids, rows), {"vocab_size": 10}),
    ):
        found = run_operator(name, inputs, attributes, threads=4)[0]
        sums = TWINS["MergeRows"](ids, rows)[1]
        # 2000 float32 additions of order one: error grows like their root, 50 · 6e-8 · |sum|
        np.testing.assert_allclose(found, sums, atol=1e-3)
        assert np.array_equal(found, run_operator(name, inputs, attributes, threads=4)[0])


def test_two_towers_of_the_same_rows_leave_a_symmetric_factor(run_operator: Runner) -> None:
    rows = np.random.default_rng(5).normal(size=(333, 37))
    found = run_operator("OutputFactorUpdate", (np.zeros((37, 37)), 0, rows, 333.0, 1.0), {"decay": 0.95})
    assert np.array_equal(found[0], found[0].T)
