"""Whole models as PyTorch's exporters write them, against autograd (tests/data/graphs_forward/make.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from autodiff_graphs import run_gradients

from kfac_onnx import metadata
from kfac_onnx.passes.differentiate import differentiate

FOLDER = Path(__file__).parents[1] / "data" / "graphs_forward"
GRAPHS = sorted(path.stem for path in FOLDER.glob("*.npz"))
# Gradients pass through some twenty float32 sums; autograd's are float64. Measured: below 2e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", GRAPHS)
def test_every_gradient_equals_autograd(name: str) -> None:
    with np.load(FOLDER / f"{name}.npz") as found:
        known = dict(found)
    model = differentiate(FOLDER / f"{name}.onnx", loss_output="loss")
    results = run_gradients(model, {key: value for key, value in known.items() if key.startswith("in")})
    np.testing.assert_allclose(results["loss"], known["loss"], rtol=TOLERANCE)
    expected = {key.removeprefix("gradient/"): value for key, value in known.items() if "/" in key}
    gradients = {
        item.name: item.gradient for item in metadata.read_list(model, "parameters", metadata.Parameter)
    }
    assert set(expected) <= {key for key, output in gradients.items() if output is not None}
    largest = max(float(np.max(np.abs(value))) for value in expected.values())
    for key, value in expected.items():
        actual = results[str(gradients[key])]
        assert actual.shape == value.shape
        # the bias of keys moves no softmax: its gradient is 0 up to the rounding of the others
        scale = max(float(np.max(np.abs(value))), 1e-3 * largest)
        assert float(np.max(np.abs(actual - value))) <= TOLERANCE * scale, key
