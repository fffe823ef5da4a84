"""What onnxruntime says of its own placements, here on the CPU."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from kfac_onnx.device.placement import measure
from kfac_onnx.device.placement.records import CPU
from kfac_onnx.errors import UserError

TEXT = (
    '<ir_version: 9, opset_import: ["" : 18]>\ng (float[N] x) => (float[N] y) { a = Abs (x)\n y = Sqrt (a) }'
)


def model() -> onnx.ModelProto:
    made = onnx.parser.parse_model(TEXT)
    for node, name in zip(made.graph.node, ("kfac/test/abs", "root"), strict=True):
        node.name = name
    return made


def test_every_node_is_told_with_its_provider() -> None:
    found = measure([("one", model()), ("two", model())], "cpu")
    assert found.measured
    assert {(node.stage, node.name, node.provider) for node in found.nodes} == {
        (stage, name, CPU) for stage in ("one", "two") for name in ("kfac/test/abs", "root")
    }
    assert found.by_provider(inserted=True) == {CPU: 2}
    assert found.fallbacks == ()


def test_a_provider_that_does_not_work_here() -> None:
    with pytest.raises(UserError):
        measure([("one", model())], "DmlExecutionProvider")


def test_a_stage_that_cannot_be_opened_is_named() -> None:
    broken = model()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(UserError, match="onnxruntime cannot open the stage 'broken'"):
        measure([("broken", broken)], "cpu")
