"""Each reason why a rule does not fit, on a node that misses just that."""

from __future__ import annotations

import pytest
from small_graphs import model_of

from kfac_onnx.passes.find_embeddings import facts_of, values_by_name
from kfac_onnx.tables.explaining import NO_LOOKUP, NO_SCATTER, OTHERWISE, why_no_lookup, why_no_scatter
from kfac_onnx.tables.lookups import READERS
from kfac_onnx.tables.scatters import SCATTERS

INPUTS = (
    "float[5, 3] W, float[2, 5, 3] W3, float[3, 5] x, int64[N] ids, int64[N, 2] pairs, int64[N, 3] spread, "
    "float[N, 3] rows, float[5, 3] base, int64 start"
)
CONSTANTS = (
    "int64 zero = {0}, int64[2] some = {0, 2}, int64[1] first = {0}, int64[1] two = {2}, int64[1] one = {1}, "
    "int64[1] last = {-1}, int64[2] size = {5, 3}, int64[2] both = {0, 1}, int64[2] ends = {2, 2}"
)


def reason(line: str, parameter: str = "W") -> str:
    """Return why the node of `y` is no lookup in W, or no scatter."""
    text = (
        f"g ({INPUTS}) => (float loss) <{CONSTANTS}> {{\n{line}\nloss = ReduceSum<keepdims: int = 0>(y)\n}}"
    )
    model = model_of(text, {parameter: None})
    values = values_by_name(model)
    facts = facts_of(model, values)
    node = values["y"].producer()
    if parameter in [value.name for value in node.inputs]:
        index = [value.name for value in node.inputs].index(parameter)
        assert node.op_type not in READERS or READERS[node.op_type](node, index, facts) is None
        return why_no_lookup(node, index, facts).partition(": ")[2]
    assert node.op_type not in SCATTERS or SCATTERS[node.op_type](node, (), facts) is None
    return why_no_scatter(node, facts).partition(": ")[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("y = Gather<axis: int = 1>(W, some)", "its ids are constant, and it takes columns"),
        ("y = GatherND<batch_dims: int = 1>(W, spread)", "it has batch dimensions"),
        (
            "y = GatherND(W, pairs)",
            "the last axis of its indices 'pairs' is not 1: it reads entries, not rows",
        ),
        (
            "y = GatherElements(W, spread)",
            "its indices 'spread' are not the same in every column of a row",
        ),
        ("y = MatMul(x, W)", "'x' is not a one-hot encoding of ids"),
        ("y = Gemm(x, rows, W)", "the table is not one of its two factors"),
        (
            "y = Slice(W, first, two, first)",
            "its rows are not added to activations, as those of a position table are",
        ),
    ],
)
def test_lookups(line: str, expected: str) -> None:
    assert reason(line) == expected


def test_lookups_in_what_is_no_table() -> None:
    assert reason("y = Gather(W3, ids)", "W3") == "'W3' has 3 dimensions, and a table has 2 or 1"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            'index = Unsqueeze(ids, last)\ny = ScatterND<reduction: string = "add">(base, index, rows)',
            "it adds to 'base', which is not zeros",
        ),
        (
            "index = Unsqueeze(ids, last)\nz = ConstantOfShape(size)\ny = ScatterND(z, index, rows)",
            "it does not add, and may name one place twice",
        ),
        (
            "z = ConstantOfShape(size)\nflat = ReduceSum<keepdims: int = 0>(rows, one)\n"
            'y = ScatterND<reduction: string = "add">(z, pairs, flat)',
            "the last axis of its indices 'pairs' is not 1: it scatters entries, not rows",
        ),
        (
            'z = ConstantOfShape(size)\ny = ScatterElements<reduction: string = "add">(z, spread, rows)',
            "its indices 'spread' are not the same in every column of a row",
        ),
        ("z = ConstantOfShape(size)\ny = ScatterElements(z, spread, rows)", "it does not add"),
        ("y = MatMul(x, base)", "none of its operands is a one-hot encoding of ids"),
        ("w = ReduceSum(base, first)\ny = Expand(w, size)", "it broadcasts"),
        ("y = Mul(base, base)", "neither factor is smaller than the table"),
    ],
)
def test_scatters(line: str, expected: str) -> None:
    assert reason(line) == expected


def test_every_rule_has_its_reasons() -> None:
    assert set(NO_LOOKUP) >= set(READERS)
    assert set(NO_SCATTER) >= set(SCATTERS)
    assert OTHERWISE.startswith("it is another form")
