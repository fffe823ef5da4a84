"""What is a tensor of zeros whatever the batch is, and what only looks so."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from kfac_onnx.graph.constants import Constants


@pytest.mark.parametrize(
    ("body", "vanishes"),
    [
        ("z = ConstantOfShape(size) y = Mul(z, x)", True),
        ("z = ConstantOfShape(size) y = Add(z, x)", False),
        ("y = Cast<to: int = 1>(ids)", False),
        ("i = Cast<to: int = 1>(ids) z = ConstantOfShape(size) y = Add(z, i)", False),
    ],
)
def test_zeros(body: str, vanishes: bool) -> None:
    model = ir.from_onnx_text(f"""
    <ir_version: 9, opset_import: ["" : 18]>
    f (float[3] x, int64[3] ids) => (float[3] y) <int64[1] size = {{3}}> {{ {body} }}""")
    assert Constants(model.graph.inputs, 18).vanishes(model.graph.outputs[0]) is vanishes
