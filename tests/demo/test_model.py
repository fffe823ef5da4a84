"""The shipped training graph against the model written out in float64 NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kfac_onnx.demo.model import EMBEDDING, SHAPES, initial_parameters, model_bytes


def reference(values: dict[str, np.ndarray], ids: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return loss and gradients of softmax(O tanh(H e + b) + c), e the rows of the table side by side."""
    v = {name: value.astype(np.float64) for name, value in values.items()}
    count = len(labels)
    rows = v[EMBEDDING][ids].reshape(count, -1)
    hidden = np.tanh(rows @ v["hidden.weight"].T + v["hidden.bias"])
    logits = hidden @ v["output.weight"].T + v["output.bias"]
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)
    loss = -np.log(probability[np.arange(count), labels]).mean()
    delta = probability
    delta[np.arange(count), labels] -= 1.0
    delta /= count
    inner = (delta @ v["output.weight"]) * (1.0 - hidden**2)
    table = np.zeros_like(v[EMBEDDING])
    np.add.at(table, ids.reshape(-1), (inner @ v["hidden.weight"]).reshape(ids.size, -1))
    return {
        "loss": np.asarray(loss),
        f"{EMBEDDING}_grad": table,
        "hidden.weight_grad": inner.T @ rows,
        "hidden.bias_grad": inner.sum(0),
        "output.weight_grad": delta.T @ hidden,
        "output.bias_grad": delta.sum(0),
    }


@pytest.mark.parametrize("size", [1, 7])
def test_loss_and_gradients_equal_the_written_out_model(size: int) -> None:
    random = np.random.default_rng(size)
    ids = random.integers(0, SHAPES[EMBEDDING][0], (size, 4))
    ids[0] = [5, 5, 0, SHAPES[EMBEDDING][0] - 1]
    labels = random.integers(0, 2_001, size)
    values = initial_parameters(0)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the graph's own scatter-add loses updates with more
    session = ort.InferenceSession(model_bytes(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(None, {"ids": ids, "labels": labels, **values}), strict=True))
    expected = reference(values, ids, labels)
    assert set(got) == set(expected)
    for name, want in expected.items():
        # Float32 sums of up to 2,001 terms: 1e-6 of the largest entry each way, and room.
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_the_graph_holds_no_values_of_parameters() -> None:
    model = onnx.load_from_string(model_bytes())
    onnx.checker.check_model(model, full_check=True)
    inputs = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    assert inputs == {"ids": ("batch", 4), "labels": ("batch",), **SHAPES}
    assert len(model_bytes()) < 20_000


def test_initial_values_follow_the_seed() -> None:
    values, again, other = initial_parameters(0), initial_parameters(0), initial_parameters(1)
    assert {name: value.shape for name, value in values.items()} == SHAPES
    for name, value in values.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, again[name])
        assert (value != other[name]).any()
    # 816,768 draws: the standard error of their deviation is below 1e-3 of it.
    np.testing.assert_allclose(values[EMBEDDING].std(), 0.1, rtol=5e-3)
    assert 0.99 / 16 < np.abs(values["hidden.weight"]).max() <= 1 / 16
    assert 0.99 * 128**-0.5 < np.abs(values["output.bias"]).max() <= 128**-0.5
