"""Gradients given as rows and their ids: found by name or named by the user, scattered, and given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kfac_onnx import metadata
from kfac_onnx.api import scan, transform
from kfac_onnx.errors import UserError
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

RNG = np.random.default_rng(3)
TOLERANCE = 1e-6  # sums of a few float32 terms
IDS = np.array([[3, 0], [3, 4]])


def graph(
    values: str = "W_grad_values",
    indices: str = "W_grad_indices",
    table: str = "float[5, 3] W",
    rows: str = "float[n, 3]",
    ids: str = "int64",
    more: str = "",
) -> str:
    """Return a graph whose loss is sum(W[ids] * x), with dL/dW as rows x and their ids."""
    width = "3" if ", 3]" in table else ""
    kind = "float[2, 2, 3]" if width else "float[2, 2]"
    target = "{-1, 3}" if width else "{-1}"
    number = {"int64": 7, "int32": 6}[ids]
    return f"""<ir_version: 10, opset_import: ["" : 18]>
    g ({table}, int64[2, 2] ids, {kind} x) => (float loss, {rows} "{values}", {ids}[n] "{indices}"{more})
    <int64[1] flat = {{-1}}, int64[{2 if width else 1}] target = {target}> {{
        h = Gather<axis = 0>(W, ids)
        hx = Mul(h, x)
        loss = ReduceSum<keepdims = 0>(hx)
        "{values}" = Reshape(x, target)
        flat_ids = Reshape(ids, flat)
        "{indices}" = Cast<to = {number}>(flat_ids)
    }}"""


def pairs(model: ir.Model) -> list[metadata.RowGradient]:
    return metadata.read_list(model, "row_gradients", metadata.RowGradient)


def expected(x: np.ndarray, rows: int = 5) -> np.ndarray:
    result = np.zeros((rows, *x.shape[2:]))
    np.add.at(result, IDS, x)
    return result


NAMES = [
    ("W_grad_values", "W_grad_indices"),
    ("W_values", "W_indices"),
    ("W_grad.values", "W_grad.indices"),
    ("W_grad:values", "W_grad:indices"),
    ("W/rows", "W/ids"),
]


@pytest.mark.parametrize(("values", "indices"), NAMES)
@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_a_pair_is_found_by_its_names(
    values: str,
    indices: str,
    kind: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model = read_training_graph(build(graph(values, indices, ids=kind)))
    (pair,) = pairs(model)
    assert pair == metadata.RowGradient("W", values, indices, "W_grad")
    (parameter,) = metadata.read_list(model, "parameters", metadata.Parameter)
    assert (parameter.name, parameter.shape, parameter.gradient) == ("W", (5, 3), "W_grad")
    x = RNG.standard_normal((2, 2, 3)).astype(np.float32)
    results = run(model, {"W": np.ones((5, 3), np.float32), "ids": IDS, "x": x})
    check(results["W_grad"], expected(x), TOLERANCE)


def test_a_table_of_numbers(
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    """A bias for every id, float[5]: its pair is float[n] and int[n], also where it is given back."""
    text = graph(table="float[5] W", rows="float[n]")
    model = read_training_graph(build(text))
    x = RNG.standard_normal((2, 2)).astype(np.float32)
    feed = {"W": np.ones(5, np.float32), "ids": IDS, "x": x}
    check(run(model, feed)["W_grad"], expected(x), TOLERANCE)
    results = run_dropped_in(transform(build(text), shape="dense", preset="r1.7"), feed)
    assert results["W_grad_values"].shape == (4,)
    np.testing.assert_array_equal(results["W_grad_indices"], IDS.reshape(-1))


SLICES = graph("W_grad", "Identity_1:0", more=", int32[2] shape")
SLICES = SLICES.replace("flat_ids =", "wide = Shape(W) shape = Cast<to = 6>(wide) flat_ids =")


@pytest.mark.parametrize(("rows", "V"), [("float[n, 3]", 5), ("float[4, 3]", 5), ("float[4, 3]", 4)])
def test_indexed_slices_as_they_are(rows: str, V: int, build: Callable[[str], ir.Model]) -> None:
    """Rows under the gradient's name, unnamed ids, and the shape: also where there are as many rows as V."""
    text = SLICES.replace("float[n, 3]", rows).replace("float[5, 3] W", f"float[{V}, 3] W")
    model = read_training_graph(build(text))
    assert pairs(model) == [metadata.RowGradient("W", "W_grad", "Identity_1:0", "W_grad_2")]
    assert [site.parameter for site in scan(build(text)).sites] == ["W"]
    names = [str(value.name) for value in transform(build(text), shape="dense").graph.outputs]
    assert names[:4] == ["loss", "W_grad", "Identity_1:0", "shape"]


@pytest.mark.parametrize("more", ["", ", int32[3] shape"])
def test_integers_after_a_gradient_are_not_its_ids(more: str, build: Callable[[str], ir.Model]) -> None:
    """As many rows as the table has: a gradient like the parameter."""
    text = graph("W_grad", "labels", table="float[4, 3] W", more=more).replace("float[n, 3]", "float[4, 3]")
    text = text.replace("flat_ids =", "s = Shape(x) shape = Cast<to = 6>(s) flat_ids =")
    model = read_training_graph(build(text))
    assert pairs(model) == []
    (parameter,) = metadata.read_list(model, "parameters", metadata.Parameter)
    assert parameter.gradient == "W_grad"


@pytest.mark.parametrize("values", ["delta", "delta:0", "a:b:0"])
def test_a_pair_that_the_user_names(values: str, build: Callable[[str], ir.Model]) -> None:
    model = read_training_graph(build(graph(values, "where:0")), gradients={"W": f"{values}:where:0"})
    (pair,) = pairs(model)
    assert (pair.values, pair.indices) == (values, "where:0")
    report = scan(build(graph(values, "where:0")), gradients={"W": f"{values}:where:0"})
    assert [site.parameter for site in report.sites] == ["W"]
    assert report.sites[0].uses[0].output_gradient == "x"


def test_an_unknown_pair_is_an_error(build: Callable[[str], ir.Model]) -> None:
    with pytest.raises(UserError, match="no value 'delta:nowhere', given as the gradient of 'W'"):
        read_training_graph(build(graph("delta", "where")), gradients={"W": "delta:nowhere"})


def test_ids_that_are_no_integers_are_an_error(build: Callable[[str], ir.Model]) -> None:
    with pytest.raises(UserError, match="not rows of numbers with integer ids"):
        read_training_graph(build(graph("delta", "where")), gradients={"W": "where:delta"})


def test_rows_of_another_width_are_an_error(build: Callable[[str], ir.Model]) -> None:
    text = graph().replace("float[5, 3] W", "float[5, 2] W").replace("Gather", "ReduceMean")
    text = text.replace("h = ReduceMean<axis = 0>(W, ids)", "h = ReduceMean(W)")
    with pytest.raises(UserError, match=r"rows of 'W_grad_values' have shape \[3\], .* 'W' have \[2\]"):
        read_training_graph(build(text))


def test_a_tensor_is_preferred_to_its_pair(build: Callable[[str], ir.Model]) -> None:
    """A graph that gives both keeps the pair as outputs of its own."""
    text = graph(more=", float[5, 3] W_grad").replace(
        "flat_ids =",
        """z = Sub(W, W) W_size = Shape(W)
        flat_ids =""",
    )
    text = text.replace(
        "    }",
        """    i = Unsqueeze(flat_ids, flat)
        W_grad = ScatterND<reduction = "add">(z, i, W_grad_values)
    }""",
    )
    model = read_training_graph(build(text))
    assert pairs(model) == []
    assert [value.name for value in model.graph.outputs] == [
        "loss",
        "W_grad_values",
        "W_grad_indices",
        "W_grad",
    ]


def run_dropped_in(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the first step of a drop-in graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    states = {state.input: state for state in metadata.read_list(model, "state", metadata.State)}
    values = dict(feed)
    for name, state in states.items():
        dtype = np.dtype(state.dtype)
        if state.initial == "identity":
            values[name] = np.eye(state.shape[0], dtype=dtype)
        else:
            number = {"zeros": 0, "ones": 1}.get(str(state.initial), state.initial)
            values[name] = np.full(state.shape, number, dtype)
    names = [item.name for item in session.get_outputs()]
    wanted = {item.name: values[item.name] for item in session.get_inputs() if item.name in values}
    return dict(zip(names, session.run(names, wanted), strict=True))


@pytest.mark.parametrize("preset", ["half", "r1.7", "adagrad"])
@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_a_drop_in_graph_gives_the_pair_back(
    preset: str,
    kind: str,
    build: Callable[[str], ir.Model],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    """The preconditioned rows with their ids sum to what the same graph with a tensor gives."""
    text = graph(ids=kind)
    x = RNG.standard_normal((2, 2, 3)).astype(np.float32)
    feed = {"W": np.ones((5, 3), np.float32), "ids": IDS, "x": x}
    model = transform(build(text), preset=preset, shape="dense")
    names = [value.name for value in model.graph.outputs]
    assert names[:3] == ["loss", "W_grad_values", "W_grad_indices"]
    assert "W_grad" not in names
    results = run_dropped_in(model, feed)
    assert results["W_grad_indices"].dtype == np.dtype(kind)
    if preset != "adagrad":  # which squares, and so gives each id once
        np.testing.assert_array_equal(results["W_grad_indices"], IDS.reshape(-1))
    total = np.zeros((5, 3))
    np.add.at(total, results["W_grad_indices"], results["W_grad_values"])

    proto = ir.to_proto(read_training_graph(build(text)))
    while len(proto.graph.output) > 2:
        del proto.graph.output[1]
    del proto.metadata_props[:]
    assert [item.name for item in proto.graph.output] == ["loss", "W_grad"]
    tensor = run_dropped_in(transform(ir.from_proto(proto), preset=preset, shape="dense"), feed)
    check(total, tensor["W_grad"], TOLERANCE)


def test_a_training_step_hands_out_neither(build: Callable[[str], ir.Model]) -> None:
    model = transform(build(graph()), preset="half", parameters={"W": np.ones((5, 3), np.float32)})
    names = {str(value.name) for value in model.graph.outputs}
    assert not names & {"W_grad", "W_grad_values", "W_grad_indices"}


def test_a_refused_table_keeps_its_pair(build: Callable[[str], ir.Model]) -> None:
    """In a drop-in graph, what no block covers stays as the exporter gave it."""
    text = graph().replace(
        "loss =",
        """turned = Transpose<perm = [1, 0]>(W) scores = MatMul(hx, turned) all = ReduceSum<keepdims = 0>(scores)
        part =""",
    )
    text = text.replace('"W_grad_values" =', 'loss = Add(part, all) "W_grad_values" =')
    model = transform(build(text), shape="dense", allow_fallback=("W",))
    x = RNG.standard_normal((2, 2, 3)).astype(np.float32)
    results = run_dropped_in(model, {"W": np.ones((5, 3), np.float32), "ids": IDS, "x": x})
    assert list(results)[:3] == ["loss", "W_grad_values", "W_grad_indices"]
    np.testing.assert_array_equal(results["W_grad_values"], x.reshape(-1, 3))


def test_rows_of_several_lookups_stay_in_their_order(build: Callable[[str], ir.Model]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[5, 3] W, int64[2] a, int64[3] b, float[2, 3] x, float[3, 3] y)
    => (float loss, float[5, 3] W_values, int64[5] W_indices) {
        h2 = Gather<axis = 0>(W, b) h1 = Gather<axis = 0>(W, a)
        hx = Mul(h1, x) hy = Mul(h2, y) one = ReduceSum<keepdims = 0>(hx) two = ReduceSum<keepdims = 0>(hy)
        loss = Add(one, two)
        W_values = Concat<axis = 0>(x, y) W_indices = Concat<axis = 0>(a, b)
    }"""
    model = transform(build(text), preset="half", shape="dense")
    rows = RNG.standard_normal((5, 3)).astype(np.float32)
    ids = np.array([4, 0, 1, 4, 2])
    feed = {"W": np.ones((5, 3), np.float32), "a": ids[:2], "b": ids[2:], "x": rows[:2], "y": rows[2:]}
    results = run_dropped_in(model, feed)
    np.testing.assert_array_equal(results["W_indices"], ids)
    twice = run_dropped_in(model, {**feed, "x": rows[:2] * 0})  # the first rows are those of a
    assert not twice["W_values"][:2].any()
    assert twice["W_values"][2:].any()
