"""Every lowering rule against the gradient that PyTorch's autograd gives (tests/data/lowering/make.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx.canonical.lowering import TABLE, lower_training_operators
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parents[2] / "data" / "lowering"
CASES = {entry["name"]: entry for entry in json.loads((FOLDER / "cases.json").read_text())}
# One rounding of a sum of up to 100 float32 terms is below 1e-6 of its largest; a recurrence over four steps
# a few times that; float16 rounds its inputs' products once, at 2⁻¹¹ of the entry.
TOLERANCE = {"float32": 3e-6, "float64": 1e-12, "float16": 1e-3, "int64": 0.0}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "cases.npz") as found:
        return dict(found)


def one_node(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Return a model of the case's one node, and its feed."""
    inputs: list[ir.Value | None] = []
    feeds: dict[str, np.ndarray] = {}
    constants: list[ir.Value] = []
    for index, given in enumerate(case["inputs"]):
        if not given:
            inputs.append(None)
            continue
        array = arrays[f"{case['name']}/x{index}"]
        value = ir.Value(
            name=f"x{index}",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        if index in case["constant"]:
            value.const_value = ir.tensor(array, name=value.name)
            constants.append(value)
        else:
            feeds[value.name or ""] = array
        inputs.append(value)
    node = ir.node(
        case["op"],
        inputs,
        attributes=case["attributes"],
        domain=case["domain"],
        num_outputs=len(case["outputs"]),
    )
    for index, output in enumerate(node.outputs):
        output.name = f"y{index}" if case["outputs"][index] else ""
        if output.name:
            expected = arrays[f"{case['name']}/y{index}"]
            output.type = ir.TensorType(ir.DataType.from_numpy(expected.dtype))
            known = expected.shape if case.get("shaped") else [None] * expected.ndim
            output.shape = ir.Shape(known)
    graph = ir.Graph(
        [value for value in inputs if value is not None and value not in constants],
        [output for output in node.outputs if output.name],
        nodes=[node],
        initializers=constants,
        opset_imports={case["domain"]: 1, "": 18},
        name="case",
    )
    return ir.Model(graph, ir_version=10), feeds


@pytest.mark.parametrize("name", CASES)
def test_rule_gives_the_gradient_of_autograd(
    name: str,
    arrays: dict[str, np.ndarray],
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    case = CASES[name]
    model, feeds = one_node(case, arrays)
    lower_training_operators(model)
    assert all(not node.domain and not node.op_type.endswith("Grad") for node in model.graph)
    assert not any(node.op_type == "ScatterND" for node in model.graph)
    origin = f"{case['domain']}::{case['op']}" if case["domain"] else case["op"]
    assert all(node.metadata_props["kfac.lowered"] == origin for node in model.graph)
    results = run(model, feeds)
    for index, given in enumerate(case["outputs"]):
        if given:
            expected = arrays[f"{name}/y{index}"]
            assert results[f"y{index}"].dtype == expected.dtype
            check(results[f"y{index}"], expected, TOLERANCE[str(expected.dtype)])


def test_every_rule_has_a_case() -> None:
    elsewhere = {key for key in TABLE if key[0] == "ai.onnx.preview.training"}  # test_optimizer_lowering
    assert {(case["domain"], case["op"]) for case in CASES.values()} == set(TABLE) - elsewhere


def test_every_missing_operator_is_listed_at_once(build: Callable[[str], ir.Model]) -> None:
    model = build("""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1, "acme" : 2]>
        g (float[4] x) => (float[4] z) {
            [one] a = com.microsoft.ResizeGrad (x)
            [two] b = acme.Twist (a)
            [three] c = Tanh (b)
            [four] z = com.microsoft.TanhGrad (c, b)
        }""")
    with pytest.raises(UserError) as caught:
        lower_training_operators(model, "m.onnx")
    assert str(caught.value) == (
        "the graph has 2 nodes that onnxruntime cannot run and no rule can lower\n"
        "  --> m.onnx\n"
        "  tried: com.microsoft::ResizeGrad 'a': no rule for com.microsoft::ResizeGrad\n"
        "  tried: acme::Twist 'b': no rule for acme::Twist\n"
        "  help: export the model without these operators"
    )


@pytest.mark.parametrize(
    ("case", "changed", "reason"),
    [
        ("lstm_grad", {"direction": "sideways"}, "direction 'sideways' is not known"),
        ("conv", {"auto_pad": "SAME_UPPER"}, "auto_pad SAME_UPPER is not supported"),
        ("max_pool", {"storage_order": 1}, "storage_order=1 is not supported"),
        (
            "average_pool_left_over",
            {"ceil_mode": 1},
            "ceil_mode=1 is not supported where the last window is cut",
        ),
        ("lstm", {"input_forget": 1}, "input_forget=1 is not supported"),
        ("lstm", {"layout": 1}, "layout=1 is not supported"),
        ("lstm", {"clip": 1.0}, "clip is not supported"),
        (
            "lstm",
            {"activations": ["Relu", "Tanh", "Tanh"]},
            "activations other than sigmoid, tanh, tanh are not supported",
        ),
        ("gather_nd_rows", {"batch_dims": 1}, "only batch_dims=0 is supported"),
        (
            "gather_columns_runtime_shape",
            {"axis": -2},
            "axis -2 counts from the end of a tensor of unknown rank",
        ),
        ("aten_embedding", {"operator": "sum"}, "the torch operator 'sum' is not known"),
    ],
)
def test_a_rule_says_what_it_does_not_cover(
    case: str, changed: dict[str, Any], reason: str, arrays: dict[str, np.ndarray]
) -> None:
    entry = {**CASES[case], "attributes": {**CASES[case]["attributes"], **changed}}
    model, _ = one_node(entry, arrays)
    with pytest.raises(UserError) as caught:
        lower_training_operators(model)
    (tried,) = caught.value.tried
    assert tried.startswith(f"{entry['domain']}::{entry['op']} '".removeprefix("::"))
    assert tried.endswith(f"': {reason}")


def test_names_of_outputs_stay_and_new_ones_are_fresh(build: Callable[[str], ir.Model]) -> None:
    model = build("""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[4] x) => (float[4] z) {
            "kfac/lower/z/Mul" = Neg (x)
            y = Tanh ("kfac/lower/z/Mul")
            z = com.microsoft.TanhGrad (x, y)
        }""")
    lower_training_operators(model)
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert names[-1] == "z"
    assert model.graph.outputs[0].name == "z"


def test_lowering_twice_gives_the_same_text(arrays: dict[str, np.ndarray]) -> None:
    texts: list[bytes] = []
    for _ in range(2):
        model, _ = one_node(CASES["gru_last_grad"], arrays)
        lower_training_operators(model)
        texts.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


def test_an_output_that_no_rule_makes_is_named() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
    g (float[2] x) => (float[2] y) { a, b = com.microsoft.TanhGrad (x, x)  y = Add(a, b) }"""
    with pytest.raises(UserError) as caught:
        lower_training_operators(ir.from_proto(onnx.parser.parse_model(text)))
    assert caught.value.tried == ("com.microsoft::TanhGrad 'a': only 1 of its outputs are known",)
