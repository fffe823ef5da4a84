"""The table of operators: what is in it, what is not, and that no other module lists kinds of operators."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx.defs
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

import kfac_onnx
from kfac_onnx.autodiff.backward import no_gradient
from kfac_onnx.autodiff.table import RULES as DERIVATIVES
from kfac_onnx.device.placement.predict import NOT_FOLDED
from kfac_onnx.graph import operators
from kfac_onnx.graph.operators import (
    COMPARISONS,
    ELEMENTWISE,
    NO_GRADIENT,
    ORDERED_VIEWS,
    RANDOM,
    TABLE,
    VIEWS,
    Keeps,
    Trait,
    having,
    keeping,
)

PACKAGE: Final = Path(kfac_onnx.__file__).parent
NO_ROW: Final = Path(__file__).with_name("no_row.txt")
OLDEST: Final = 13
MOST: Final = 2
"""Operators that another module may name together without a query: a pair is a case, not a kind."""
LISTS: Final = {
    "device/placement/predict.py": "a room below the table's; its list is held against the table here",
    "ranks/cut.py": "the few operators that updates are made of, most of them our own, by how they treat rows",
}
"""Module -> why it lists operators all the same."""

TO_MOVE: Final = {
    "autodiff/blocked.py",
    "autodiff/buffers.py",
    "autodiff/merged.py",
    "autodiff/scores.py",
    "canonical/encoded_strings.py",
    "canonical/fold_constants.py",
    "canonical/loops/__init__.py",
    "tables/roles.py",
}
"""Modules whose own lists are still to become queries of the table; none may be added."""


def newest() -> dict[str, onnx.defs.OpSchema]:
    """Return the newest form of each standard operator that has one since opset 13."""
    forms: dict[str, onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version >= forms.get(schema.name, schema).since_version:
            forms[schema.name] = schema
    return {name: schema for name, schema in forms.items() if not schema.deprecated}


def test_operators_without_a_row_are_listed() -> None:
    """A new ONNX version adds lines here: give each of its operators a row, or a line in the file."""
    listed = [line for line in NO_ROW.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    missing = set(newest()) - {row.name for row in TABLE}
    assert sorted(missing) == listed


def test_rows_are_operators_and_are_there_once() -> None:
    names = [(row.domain, row.name) for row in TABLE]
    assert len(set(names)) == len(names)
    assert {name for domain, name in names if domain == ""} <= set(newest())


def lists_of(tree: ast.Module) -> list[tuple[int, list[str]]]:
    """Return the line and the words of each set, tuple, list and alternative of strings in a module."""
    groups: list[tuple[int, list[str]]] = []
    for node in ast.walk(tree):
        items: list[ast.expr] = []
        if isinstance(node, ast.Set | ast.Tuple | ast.List):
            items = node.elts
        elif isinstance(node, ast.MatchOr):
            items = [each.value for each in node.patterns if isinstance(each, ast.MatchValue)]
        words = [
            each.value for each in items if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        if words and isinstance(node, ast.expr | ast.pattern):
            groups.append((node.lineno, words))
    return groups


def test_no_other_module_lists_operators() -> None:
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history()} | {row.name for row in TABLE}
    found = {
        str(path.relative_to(PACKAGE)): line
        for path in PACKAGE.rglob("*.py")
        if path != Path(operators.__file__)
        for line, words in lists_of(ast.parse(path.read_text(encoding="utf-8")))
        if sum(word in names for word in words) > MOST
    }
    assert {module: line for module, line in found.items() if module not in LISTS.keys() | TO_MOVE} == {}
    assert set(found) == set(LISTS) | TO_MOVE


def test_placement_knows_the_random_operators() -> None:
    assert RANDOM - {"Dropout"} == NOT_FOLDED


def test_a_list_of_operators_is_seen() -> None:
    text = 'if op in ("Add", "Sub", "Sum"): ...\nmatch op:\n    case "Add" | "Sub" | "Sum": ...\nx = {"a"}'
    assert [line for line, words in lists_of(ast.parse(text)) if len(words) > MOST] == [1, 3]


@pytest.mark.parametrize("name", sorted(NO_GRADIENT & {str(key) for key in DERIVATIVES}))
def test_an_operator_without_a_gradient_has_no_derivative(name: str) -> None:
    assert DERIVATIVES[name] is no_gradient


def test_every_rule_that_gives_no_gradient_is_of_such_an_operator() -> None:
    assert {key for key, rule in DERIVATIVES.items() if rule is no_gradient} <= NO_GRADIENT


def applied(op: str, *arrays: np.ndarray, **attributes: object) -> np.ndarray:
    names = [f"x{index}" for index in range(len(arrays))]
    node = helper.make_node(op, names, ["y"], **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    graph = helper.make_graph([node], "g", infos, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    return np.asarray(ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))[0])


SETTINGS: Final[dict[str, tuple[tuple[np.ndarray, ...], dict[str, object]]]] = {
    "Cast": ((), {"to": onnx.TensorProto.DOUBLE}),
    "CastLike": ((np.zeros(1, np.float64),), {}),
    "Reshape": ((np.array([3, 2]),), {}),
    "Unsqueeze": ((np.array([0]),), {}),
    "Squeeze": ((np.array([0]),), {}),
}


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_a_view_has_the_entries_of_its_first_input(name: str) -> None:
    more, attributes = SETTINGS.get(name, ((), {}))
    array = np.arange(6, dtype=np.float32).reshape((1, 2, 3) if name in ("Squeeze", "Flatten") else (2, 3))
    result = applied(name, array, *more, **attributes)
    entries = result.reshape(-1)
    assert sorted(entries.tolist()) == array.reshape(-1).tolist()
    assert (name in ORDERED_VIEWS) == (entries.tolist() == array.reshape(-1).tolist())
    assert (name in keeping(Keeps.PLACES)) == (result.shape == array.shape)


UNARY: Final = sorted(
    name
    for name in ELEMENTWISE
    if name in newest() and len(newest()[name].inputs) == 1 and newest()[name].since_version <= 21
    if not {"Cast", "Not"} & {name}
)


@pytest.mark.parametrize("name", [name for name in UNARY if name not in {"Max", "Min", "Mean", "Sum"}])
def test_a_function_of_one_number_is_as_the_table_says(name: str) -> None:
    x = np.array([-0.75, -0.5, -0.1, 0.1, 0.25, 0.75], np.float32)
    with np.errstate(all="ignore"):
        result = applied(name, x)
        alone = np.concatenate([applied(name, x[i : i + 1]) for i in range(x.size)])
    np.testing.assert_array_equal(result, alone)  # entry by entry: no other entry has a part in it
    assert (result.dtype == bool) == (name in having(Trait.BOOLEAN))
    if name in having(Trait.KEEPS_SIGN):
        np.testing.assert_array_equal(np.sign(result)[np.isfinite(result)], np.sign(x)[np.isfinite(result)])
    if name in having(Trait.UNSIGNED):
        assert np.all(result[np.isfinite(result)] >= 0)
    if name in having(Trait.LINEAR) and name not in having(Trait.BOOLEAN):
        np.testing.assert_allclose(applied(name, 2 * x), 2 * result, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(having(Trait.STEEP_AT_ZERO) - {"Pow"}))
def test_a_steep_function_has_no_bound_at_zero(name: str) -> None:
    x = np.array([1e-8, 2e-8], np.float64)
    y = applied(name, x)
    assert abs(y[1] - y[0]) / 1e-8 > 1e3


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_a_comparison_takes_two_operands(name: str) -> None:
    assert applied(name, np.zeros((2, 1), np.float32), np.zeros(3, np.float32)).shape == (2, 3)
