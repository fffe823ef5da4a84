from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

import kfac_onnx as kx
from kfac_onnx.autodiff.detached import cancelled

HEAD = '<ir_version: 10, opset_import: ["" : 18]> g (float[N, 2] h, float[N, 2] q, float[N, 2] r) => (float[N, 2] z)'


@pytest.mark.parametrize(
    "body",
    [
        "d = Sub(q, h) z = Add(h, d)",
        "d = Sub(q, h) z = Add(d, h)",
        "s = Add(q, h) z = Sub(s, h)",
        "s = Add(h, q) k = Identity(h) z = Sub(s, k)",
    ],
)
def test_what_cancels_is_told(body: str) -> None:
    model = ir.from_proto(onnx.parser.parse_model(f"{HEAD} {{ {body} }}"))
    (pair,) = cancelled(model.graph)
    assert (pair[0].outputs[0].name, pair[1].name) == ("z", "h")


@pytest.mark.parametrize(
    "body",
    [
        "d = Sub(h, q) z = Add(h, d)",
        "d = Sub(q, r) z = Add(h, d)",
        "s = Add(q, h) z = Sub(h, s)",
        "c = Constant<value = float {1.0}>() d = Sub(q, c) z = Add(d, c)",
    ],
)
def test_other_sums_are_not(body: str) -> None:
    assert cancelled(ir.from_proto(onnx.parser.parse_model(f"{HEAD} {{ {body} }}")).graph) == []


def test_differentiate_and_check_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18]>
    g (int64[N] ids, float[N, 2] q) => (float loss)
    <float[3, 2] W = {1, 2, 3, 4, 5, 6}, float[2, 2] H = {1, 2, 3, 5}> {
        e = Gather(W, ids) h = MatMul(e, H) d = Sub(q, h) z = Add(h, d) y = Mul(z, e)
        loss = ReduceMean<keepdims = 0>(y)
    }""")
    assert [item.what for item in kx.check(model).findings if item.id == "lost-detach"] == [
        "Add 'z' adds 'h' to what it was subtracted from"
    ]
    made = kx.differentiate(model, loss_output="loss")
    assert (
        "Add 'z' adds 'h' to what it was subtracted from, as a straight-through estimator does whose `detach` was not "
        "exported: no gradient reaches 'h' there; export the training graph instead "
        "(kfac_onnx.torch.export_training_graph), which keeps what is detached"
    ) in caplog.text
    assert "lost-detach" in {item.id for item in kx.check(made).findings}
