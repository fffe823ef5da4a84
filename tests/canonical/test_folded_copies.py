from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.canonical.folded_copies import undo_repeated_vectors
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

W = np.arange(6, dtype=np.float32).reshape(3, 2)


def training_graph(
    build: Callable[[str], ir.Model], constants: dict[str, np.ndarray], body: str, *, inner: str = ""
) -> ir.Model:
    """Return a graph with parameters `w` [3,2] (0..5) and `v` [3,2], constants, and a body that uses them."""
    model = build(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[n,3] x, float[n,2] z) => (float loss, float[3,2] w_grad, float[3,2] v_grad) {{
            t = Transpose (x)
            w_grad = MatMul (t, z)
            v_grad = Neg (w_grad)
            {inner}
            {body}
            loss = ReduceSum <keepdims = 0> (y)
        }}""")
    for name, array in constants.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name:
                    node.replace_input_with(index, value)
    return model


def facts(model: ir.Model) -> tuple[list[str], dict[str, str]]:
    import json

    notes = [
        note for note in json.loads(model.metadata_props["kfac.notes"]) if "equals" in note or "copy" in note
    ]
    refused = {item.parameter: item.reason for item in metadata.read_list(model, "refused", metadata.Refusal)}
    return notes, refused


BODY = """a = MatMul (x, w)  b = MatMul (x, v)  c = MatMul (z, k)
    d = Add (a, b)  e = ReduceSum (c)  y = Add (d, e)"""


@pytest.mark.parametrize(("copy", "kind"), [(W.T, "transposed copy"), (W, "copy")])
def test_a_folded_copy_follows_the_parameter(
    copy: np.ndarray,
    kind: str,
    build: Callable[[str], ir.Model],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    body = BODY if kind != "copy" else BODY.replace("MatMul (z, k)", "MatMul (x, k)")
    model = training_graph(build, {"w": W, "v": W[::-1] * 2, "k": copy.copy()}, body)
    model = read_training_graph(model)
    assert facts(model) == ([f"'k' was a {kind} of 'w': now computed from it"], {})
    assert "k" not in model.graph.initializers
    assert "k" in {value.name for node in model.graph for value in node.outputs}
    # Train: w takes other values, and what was the copy must follow.
    new = np.full_like(W, 0.5) + W
    model.graph.initializers["w"].const_value = ir.tensor(new, name="w")
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((4, n)).astype(np.float32) for n in (3, 2))
    product = z @ new.T if kind != "copy" else x @ new
    expected = np.sum(x @ new + x @ (W[::-1] * 2) + product.sum(), dtype=np.float64)
    check(run(model, {"x": x, "z": z})["loss"], np.asarray(expected), 1e-5)  # float32 sums of 32 terms


def test_a_copy_in_a_constant_node_is_found_too(build: Callable[[str], ir.Model]) -> None:
    inner = "k = Constant <value = float[2,3] {0, 2, 4, 1, 3, 5}> ()"
    model = training_graph(build, {"w": W, "v": W + 7}, BODY, inner=inner)
    model = read_training_graph(model)
    assert facts(model) == (["'k' was a transposed copy of 'w': now computed from it"], {})
    assert "Constant" not in [node.op_type for node in model.graph]


def test_a_copy_of_two_equal_parameters_is_refused(build: Callable[[str], ir.Model]) -> None:
    model = read_training_graph(training_graph(build, {"w": W, "v": W, "k": W.T.copy()}, BODY))
    reason = "the constant 'k' is a folded copy of one of 'v' and 'w', which are equal"
    assert facts(model) == ([], {"w": reason, "v": reason})
    assert "k" in model.graph.initializers


@pytest.mark.parametrize(
    "entries", [{"kfac.frozen": '[{"name": "k", "reason": "frozen by the user"}]'}, {"kfac.unmerged": "true"}]
)
def test_what_is_frozen_on_purpose_keeps_its_value(
    entries: dict[str, str], build: Callable[[str], ir.Model]
) -> None:
    model = training_graph(build, {"w": W, "v": W + 7, "k": W.T.copy()}, BODY)
    model.metadata_props.update(entries)
    model = read_training_graph(model)
    assert facts(model) == ([], {})
    assert "k" in model.graph.initializers


def test_equal_parameters_and_other_constants_stay(build: Callable[[str], ir.Model]) -> None:
    model = read_training_graph(training_graph(build, {"w": W, "v": W, "k": W.T + 1}, BODY))
    assert facts(model) == ([], {})
    assert set(model.graph.initializers) == {"w", "v", "k"}


def test_a_constant_of_equal_entries_is_no_evidence(build: Callable[[str], ir.Model]) -> None:
    """Zeros that a gradient is scattered into equal every table that starts at zero."""
    zeros = np.zeros((3, 2), np.float32)
    body = BODY.replace("MatMul (z, k)", "ReduceSum (s)")
    inner = """i = Constant <value = int64[1,1] {1}> ()  u = Constant <value = float[1,2] {1, 2}> ()
        s = ScatterND <reduction = "add"> (k, i, u)"""
    model = read_training_graph(
        training_graph(build, {"w": zeros, "v": W, "k": zeros.copy()}, body, inner=inner)
    )
    assert facts(model) == ([], {})
    assert "k" in model.graph.initializers
    model = training_graph(build, {"w": zeros, "v": W, "k": zeros.T.copy()}, BODY)
    notes, refused = facts(read_training_graph(model))
    assert notes == ["'k' equals 'w', but all its entries are equal: kept"]
    assert not refused


def test_a_parameter_without_a_value_has_no_copies(build: Callable[[str], ir.Model]) -> None:
    model = training_graph(build, {"w": W, "v": W + 7, "k": W.T.copy()}, BODY)
    value = model.graph.initializers.pop("w")
    value.const_value = None
    model.graph.inputs.append(value)
    assert facts(read_training_graph(model)) == ([], {})


def test_rows_that_repeat_a_bias_follow_it(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    """What an exporter leaves of `bias + zeros · weights` at the first step of a recurrence."""
    arrays = {
        "b": np.array([1, 2], np.float32),
        "rows": np.array([[[1, 2], [1, 2], [1, 2]]], np.float32),
        "other": np.array([[1, 2], [1, 3]], np.float32),
        "flat": np.array([4, 4], np.float32),
        "flats": np.full((3, 2), 4, np.float32),
    }
    model = build("""<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[1,3,2] y) {
        a = Add (x, b) c = Add (a, rows) d = Add (c, flat) e = Add (d, flats) f = MatMul (e, other) y = Neg (f) }""")
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name:
                    node.replace_input_with(index, value)
    x = np.array([0.5, -1], np.float32)
    before = run(model, {"x": x})["y"]
    notes = undo_repeated_vectors(model, list(model.graph.initializers.values()))
    assert notes == ["'rows' held 'b' in every row: now computed from it"]
    assert set(model.graph.initializers) == {"b", "other", "flat", "flats"}
    np.testing.assert_array_equal(run(model, {"x": x})["y"], before)
    expand = next(node for node in model.graph if node.op_type == "Expand")
    assert expand.inputs[0] is model.graph.initializers["b"]
    assert expand.outputs[0].name == "rows"
    assert undo_repeated_vectors(model, list(model.graph.initializers.values())) == []
