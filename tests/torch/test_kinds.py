"""Kinds of modules that real models are made of: a training session beside PyTorch, 20 steps of SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx.torch import export_training_graph

torch = pytest.importorskip("torch")
kinds = pytest.importorskip("torch_kinds")

if TYPE_CHECKING:
    from pathlib import Path

RATE, STEPS = 0.1, 20
# Float32 sums over tens of terms of order one are off by 1e-6 each way; a result scaled by 1.01 is off by 1e-2.
TOLERANCE = 1e-5


def flat(value: Any, name: str) -> dict[str, np.ndarray]:
    """Return the tensors of a nested argument under the names of the graph's inputs."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy()}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: array for part, entry in parts for key, array in flat(entry, f"{name}.{part}").items()}


def loss_of(output: Any) -> Any:
    if isinstance(output, dict):
        return output["loss"]
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", kinds.KINDS)
def test_a_session_trains_as_pytorch_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = kinds.KINDS[name]
    module = kind.module()
    export_training_graph(module, kind.batch(3), tmp_path / "train.onnx", **kind.options)
    onnx.shape_inference.infer_shapes(
        onnx.load(tmp_path / "train.onnx"), check_type=True, strict_mode=True, data_prop=True
    )
    report = kx.check(tmp_path / "train.onnx")
    allowed = {"racing-scatter", "frozen-parameter"}
    allowed |= {"inference-batch-norm"} if name == "batch norm for inference" else set()
    # Its only table is computed, not looked up.
    allowed |= {"refused-table", "no-table"} if name == "weight norm" else set()
    allowed |= {"loss-reduction"} if name == "targets" else set()  # means over different axes
    assert {finding.id for finding in report.findings} <= allowed
    transformed = kx.transform(tmp_path / "train.onnx", preset="plain-sgd", lr=RATE, rest="sgd", rest_lr=RATE)
    kx.save(transformed, tmp_path / "step.onnx")
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    with kx.TrainingSession(tmp_path / "step.onnx") as session:
        for step in range(STEPS):
            batch = kind.batch(3 + step % 3)
            optimizer.zero_grad()
            loss = loss_of(module(**batch)).sum()
            loss.backward()
            optimizer.step()
            feed = {key: array for part, value in batch.items() for key, array in flat(value, part).items()}
            metrics = session.step(feed)
            assert not metrics["skipped"]
            np.testing.assert_allclose(metrics["loss"], loss.detach(), rtol=TOLERANCE, atol=0)
        trained = {key: value for key, value in module.named_parameters() if value.requires_grad}
        _compare(session.parameters, trained)
        changed = {key: value for key, value in module.named_buffers() if key in session.statistics}
        _compare(session.statistics, changed)
        if "batch norm" in name or name == "audio":
            expected = {key for key, _ in module.named_buffers() if module.training and "bn" in key}
            assert {key for key in session.statistics if "bn" in key} == expected


def _compare(found: Any, expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        array = value.detach().numpy()
        largest = float(np.abs(array).max())
        np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE * largest, err_msg=name)
