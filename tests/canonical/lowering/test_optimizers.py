"""Adam, Adagrad and Momentum of ai.onnx.preview.training, lowered, against the formulas of their specification."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from preview_training import formula

from kfac_onnx.canonical.lowering import lower_training_operators
from kfac_onnx.errors import UserError

DOMAIN = "ai.onnx.preview.training"
SHAPES = [(3, 2), (4,), ()]
STATES = {"Momentum": 1, "Adagrad": 1, "Adam": 2}


CASES = [
    ("Momentum", {"alpha": 0.5, "beta": 0.25, "norm_coefficient": 0.0, "mode": "standard"}),
    ("Momentum", {"alpha": 0.5, "beta": 0.25, "norm_coefficient": 0.5, "mode": "nesterov"}),
    ("Momentum", {"alpha": 0.75, "beta": 1.0, "norm_coefficient": 0.0, "mode": "nesterov"}),
    ("Adagrad", {}),
    ("Adagrad", {"decay_factor": 0.5, "norm_coefficient": 0.125, "epsilon": 0.0625}),
    ("Adam", {}),
    ("Adam", {"alpha": 0.5, "beta": 0.75, "epsilon": 0.125}),
    ("Adam", {"norm_coefficient": 0.25, "norm_coefficient_post": 0.125}),
]


def lowered(op: str, attributes: dict, dtype: int, rate_shape: list[int]) -> tuple[ir.Model, list[str]]:
    groups = ["X", "G", "V", "H"][: 2 + STATES[op]]
    names = ["R", "T", *(f"{group}{i}" for group in groups for i in range(len(SHAPES)))]
    outputs = [f"{group}{i}_new" for group in groups if group != "G" for i in range(len(SHAPES))]
    node = helper.make_node(op, names, outputs, domain=DOMAIN, **attributes)
    inputs = [
        helper.make_tensor_value_info("R", dtype, rate_shape),
        helper.make_tensor_value_info("T", TensorProto.INT64, []),
        *(
            helper.make_tensor_value_info(f"{group}{i}", dtype, shape)
            for group in groups
            for i, shape in enumerate(SHAPES)
        ),
    ]
    results = [helper.make_tensor_value_info(name, dtype, SHAPES[int(name[1])]) for name in outputs]
    graph = helper.make_graph([node], "g", inputs, results)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))
    notes = lower_training_operators(model)
    assert notes == [f"{op} lowered to standard operators: 1"]
    del model.opset_imports[DOMAIN]
    return model, names


def check(op: str, attributes: dict, count: int, dtype: type, scaled: float = 1.0) -> None:
    rng = np.random.default_rng(7)
    element = TensorProto.DOUBLE if dtype is np.float64 else TensorProto.FLOAT
    model, names = lowered(op, attributes, element, [] if count else [1])
    rate = np.asarray(0.3, dtype) if count else np.asarray([0.3], dtype)
    feed = {"R": rate, "T": np.asarray(count, np.int64)}
    for name in names[2:]:
        array = rng.standard_normal(SHAPES[int(name[1:])])
        feed[name] = np.asarray(np.abs(array) if name[0] == "H" or op == "Adagrad" else array, dtype)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    got = dict(zip([item.name for item in session.get_outputs()], session.run(None, feed), strict=True))
    groups = ["X", "G", "V", "H"][: 2 + STATES[op]]
    exact = {key: float(np.float32(value)) for key, value in attributes.items() if key != "mode"}
    if op == "Adam":  # the attributes' defaults are float32 too
        exact = {"alpha": float(np.float32(0.9)), "beta": float(np.float32(0.999)), **exact}
    exact.setdefault("epsilon", float(np.float32(1e-6)))
    if "mode" in attributes:
        exact["mode"] = attributes["mode"]
    for i in range(len(SHAPES)):
        held = [np.asarray(feed[f"{group}{i}"], np.float64) for group in groups]
        want = formula(op, exact, float(np.asarray(feed["R"], np.float64).reshape(())), count, *held)
        for group, array in zip([group for group in groups if group != "G"], want, strict=True):
            found = got[f"{group}{i}_new"] * dtype(scaled)
            assert found.shape == SHAPES[i]
            assert found.dtype == dtype
            # float64 rounds a handful of operations; float32 the same, Adam's 1 - beta^T loses three digits
            limit = 1e-7 if dtype is np.float64 else 3e-4
            np.testing.assert_allclose(found, array, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize(("op", "attributes"), CASES)
def test_new_values_are_those_of_the_specification(
    op: str, attributes: dict, count: int, dtype: type
) -> None:
    check(op, attributes, count, dtype)


def test_comparison_notices_one_percent() -> None:
    with pytest.raises(AssertionError):
        check("Adam", {}, 3, np.float64, scaled=1.01)


def test_incomplete_inputs_are_refused() -> None:
    node = helper.make_node("Adam", ["R", "T", "X", "G", "V"], ["X_new", "V_new"], "adam", domain=DOMAIN)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "XGV"]
    inputs += [
        helper.make_tensor_value_info("R", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("T", TensorProto.INT64, []),
    ]
    outputs = [helper.make_tensor_value_info("X_new", TensorProto.FLOAT, [2])]
    graph = helper.make_graph([node], "g", inputs, outputs)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))
    with pytest.raises(UserError) as caught:
        lower_training_operators(model, "m.onnx")
    assert caught.value.tried == (
        "ai.onnx.preview.training::Adam 'X_new': its inputs are not R, T and as many tensors as gradients and "
        "states",
    )


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        lowered("Momentum", {"alpha": 0.5, "beta": 1.0, "norm_coefficient": 0.0, "mode": "heavy"}, 1, [])
    assert "its mode is 'heavy', not standard or nesterov" in str(caught.value.tried)
