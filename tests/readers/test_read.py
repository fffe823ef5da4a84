"""How a graph's parameters, gradients and loss are found, and what is said when they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.readers import read_forward_graph, read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

GRAPHS = Path(__file__).parent.parent / "data" / "graphs"
HEAD = '<ir_version: 10, opset_import: ["" : 18]> g '


def joint(outputs: str, *, names: str = "p_grad", inputs: str = "float[3] p, float[3] x") -> str:
    """Return a graph whose loss is Σ p x; the gradient of p is x."""
    body = f"m = Mul (p, x)  loss = ReduceSum <keepdims = 0> (m)  {names} = Identity (x)"
    return f"{HEAD} ({inputs}) => ({outputs}) {{ {body} }}"


def pairs(model: ir.Model) -> dict[str, str | None]:
    return {item.name: item.gradient for item in metadata.read_list(model, "parameters", metadata.Parameter)}


def outputs(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.outputs]


def notes(model: ir.Model) -> list[str]:
    return json.loads(model.metadata_props["kfac.notes"])


def test_gradients_by_name(build: Callable[[str], ir.Model]) -> None:
    model = read_training_graph(build(joint("float loss, float[3] p_grad")))
    assert metadata.read_list(model, "parameters", metadata.Parameter) == [
        metadata.Parameter("p", (3,), "float32", "p_grad")
    ]
    assert metadata.read(model, "loss", metadata.Loss) == metadata.Loss("loss", "sum")
    assert model.metadata_props["kfac.frontend"] == "named-gradients"
    assert [value.name for value in model.graph.inputs] == ["p", "x"]


def test_outputs_keep_the_exporters_order(build: Callable[[str], ir.Model]) -> None:
    model = read_training_graph(build(joint("float[3] p_grad, float[3] m, float loss")))
    assert outputs(model) == ["p_grad", "m", "loss"]


def test_gradients_by_position_are_the_last_resort(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] p, float[2] q, float s, float[n] x)
        => (float loss, float[3] a, float[2] b, float c) {{
        a = Neg (p) b = Neg (q) c = Neg (s) y = ReduceSum <keepdims = 0> (x) loss = Add (y, c)
    }}"""
    model = read_training_graph(build(text))
    assert pairs(model) == {"p": "a", "q": "b", "s": "c"}
    assert notes(model) == ["paired 3 gradients with parameters by position and shape"]
    assert model.metadata_props["kfac.frontend"] == "positional"


def test_position_needs_equal_shapes(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] x, float[3] p) => (float loss, float[2] g) <int64[1] a = {{0}}, int64[1] b = {{2}}> {{
        m = Mul (p, x)  loss = ReduceSum <keepdims = 0> (m)  g = Slice (x, a, b) }}"""
    with pytest.raises(UserError) as caught:
        read_training_graph(build(text))
    assert str(caught.value) == (
        "the graph does not say which outputs are the gradients of which parameters\n"
        "  tried: by name: no output is called <parameter>_grad\n"
        "  tried: by position: the shapes differ\n"
        "  tried: by the flow of data: no output is made as the gradient of a parameter is\n"
        "  help: name the pairs with --gradients PARAMETER=OUTPUT, or export the gradients as outputs"
    )


def test_the_user_says_first(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] p, float[3] x) => (float loss, float[3] p_grad, float[3] other) {{
        m = Mul (p, x) loss = ReduceSum <keepdims = 0> (m) p_grad = Identity (p) other = Identity (x) }}"""
    model = read_training_graph(build(text), gradients={"p": "other"})
    assert pairs(model) == {"p": "other"}
    assert outputs(model) == ["loss", "p_grad", "other"]
    model = read_training_graph(
        build(text), loss="loss", gradients={"p": "m"}
    )  # an inner value becomes an output
    assert outputs(model) == ["loss", "p_grad", "other", "m"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"gradients": {"q": "p_grad"}},
            "the graph has no parameter 'q', given in the gradients",
        ),
        (
            {"gradients": {"p": "p_gard"}},
            "the graph has no value 'p_gard', given as the gradient of 'p'; did you mean 'p_grad'?",
        ),
        ({"loss": "lost"}, "the graph has no value 'lost', given as the loss; did you mean 'loss'?"),
    ],
)
def test_unknown_names(keywords: dict[str, object], message: str, build: Callable[[str], ir.Model]) -> None:
    with pytest.raises(UserError) as caught:
        read_training_graph(build(joint("float loss, float[3] p_grad")), **keywords)  # type: ignore[arg-type]
    assert caught.value.message == message


def test_a_gradient_of_another_shape(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] p) => (float loss, float[4] p_grad) <float[4] k = {{1, 2, 3, 4}}> {{
        loss = ReduceSum <keepdims = 0> (p) p_grad = Neg (k) }}"""
    with pytest.raises(UserError) as caught:
        read_training_graph(build(text))
    assert caught.value.message == "the gradient 'p_grad' has shape [4], but its parameter 'p' has shape [3]"


def test_a_parameter_of_unknown_shape(build: Callable[[str], ir.Model]) -> None:
    text = joint("float loss, float[n] p_grad", inputs="float[n] p, float[n] x")
    with pytest.raises(UserError) as caught:
        read_training_graph(build(text))
    assert caught.value.message == "the shape of the parameter 'p' is not static"


def test_a_gradient_whose_parameter_is_gone(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] p, float[3] x) => (float loss, float[3] p_grad, float[2,3] q_grad) {{
        m = Mul (p, x) loss = ReduceSum <keepdims = 0> (m)
        p_grad = Identity (x) q_grad = Concat <axis = 0> (r, r)
        r = Reshape (x, s) s = Constant <value = int64[2] {{1, 3}}> () }}"""
    model = read_training_graph(build(text))
    assert pairs(model) == {"p": "p_grad"}
    assert outputs(model) == ["loss", "p_grad", "q_grad"]  # a drop-in graph keeps it
    assert metadata.read_strings(model, "orphans") == ["q_grad"]
    (refused,) = metadata.read_list(model, "refused", metadata.Refusal)
    assert refused.parameter == "q"
    assert refused.path == "gradient output q_grad"
    assert refused.reason == (
        "its gradient is computed, but the parameter is gone: the exporter folded it away"
    )
    assert "optimize=False" in refused.remedy


def test_one_value_that_is_the_gradient_of_two(
    build: Callable[[str], ir.Model], run: Callable[..., dict[str, np.ndarray]]
) -> None:
    text = f"""{HEAD} (float[3] p, float[3] q) => (float loss, float[3] s) {{
        s = Add (p, q) t = Mul (s, s) loss = ReduceSum <keepdims = 0> (t) }}"""
    model = read_training_graph(build(text), gradients={"p": "s", "q": "s"})
    assert pairs(model) == {"p": "s", "q": "kfac/gradient/q"}
    ones = np.ones(3, np.float32)
    results = run(model, {"p": ones, "q": 2 * ones})
    np.testing.assert_array_equal(results["s"], results["kfac/gradient/q"])


def test_a_frozen_table_and_initializers_stay(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] frozen, float[3] x) => (float loss, float[3] p_grad)
        <float[3] p = {{1, 2, 3}}, float[3] unused = {{0, 0, 0}}> {{
        a = Mul (p, x) m = Mul (a, frozen) loss = ReduceSum <keepdims = 0> (m) p_grad = Mul (x, frozen) }}"""
    model = read_training_graph(build(text))
    assert pairs(model) == {"p": "p_grad"}
    assert [value.name for value in model.graph.inputs] == ["frozen", "x"]
    assert set(model.graph.initializers) == {"p"}


def test_sparse_gradients_are_not_passed_over(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] p, float[9,3] e, float[3] x)
        => (float loss, float[3] p_grad, float[1,3] e_grad_values, int64[1] e_grad_indices) {{
        m = Mul (p, x) loss = ReduceSum <keepdims = 0> (m) p_grad = Identity (x)
        e_grad_indices = Constant <value = int64[1] {{2}}> () e_grad_values = Gather (e, e_grad_indices) }}"""
    assert pairs(read_training_graph(build(text))) == {"p": "p_grad", "e": "e_grad"}


def test_a_forward_graph(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[n,3] x) => (float[n,2] y)
        <float[3,2] w = {{1, 2, 3, 4, 5, 6}}, float k = {{2}}> {{ h = MatMul (x, w) y = Mul (h, k) }}"""
    with pytest.raises(UserError) as caught:
        read_training_graph(build(text))
    assert str(caught.value) == (
        "the graph has no gradients of its parameters\n"
        "  tried: optimizer-inside: none of its outputs is a scalar that could be the loss\n"
        "  tried: ort-artifacts: it has no InPlaceAccumulatorV2 nodes\n"
        "  tried: ort-module: it has no YieldOp\n"
        "  tried: named-gradients: none of its outputs is named <parameter>_grad after one of its "
        "parameters\n"
        "  tried: positional: it has fewer than two floating-point outputs, a loss and a gradient\n"
        "  help: append loss and gradients with `kfac-onnx differentiate`, export them as outputs, or name the pairs with --gradients PARAMETER=OUTPUT"
    )
    model = read_forward_graph(build(text))
    assert pairs(model) == {"w": None}
    assert metadata.read(model, "loss", metadata.Loss) == metadata.Loss(None)
    assert model.metadata_props["kfac.frontend"] == "forward"


def test_accumulators_may_have_a_second_output() -> None:
    proto = onnx.load(GRAPHS / "ortart_legcore__nplm.onnx")
    for node in proto.graph.node:
        if node.op_type == "InPlaceAccumulatorV2":
            node.output.append(f"{node.output[0]}.buffer")
    proto.graph.node.append(
        onnx.helper.make_node("Neg", ["emb.weight_grad.accumulation.out.buffer"], ["extra"])
    )
    proto.graph.output.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, [100, 16]))
    model = read_training_graph(proto)
    assert pairs(model)["emb.weight"] == "emb.weight_grad"
    (extra,) = [node for node in model.graph if node.outputs[0].name == "extra"]
    assert extra.inputs[0] is not None
    assert extra.inputs[0].name == "emb.weight_grad"


def test_views_before_and_behind_accumulators_go_with_them() -> None:
    proto = onnx.load(GRAPHS / "ortart_legcore__nplm.onnx")
    nodes: list[onnx.NodeProto] = []
    for place, node in enumerate(proto.graph.node):
        if node.op_type == "InPlaceAccumulatorV2":
            buffer, flag, reset = node.input[0], node.output[0], node.input[2]
            matrix = not buffer.startswith(("fc.bias", "out.bias"))
            back = ["Transpose", "Transpose"] if matrix else ["Identity", "Identity"]
            nodes.append(onnx.helper.make_node(back[0], [buffer], [f"turned{place}"]))
            nodes.append(onnx.helper.make_node(back[1], [f"turned{place}"], [f"buffer{place}"]))
            nodes.append(onnx.helper.make_node("Identity", [reset], [f"reset{place}"]))
            node.input[0], node.input[2], node.output[0] = f"buffer{place}", f"reset{place}", f"flag{place}"
            nodes += [node, onnx.helper.make_node("Identity", [f"flag{place}"], [flag])]
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    plain = read_training_graph(GRAPHS / "ortart_legcore__nplm.onnx")
    model = read_training_graph(proto)
    assert pairs(model) == pairs(plain)
    assert {value.name for value in model.graph.inputs} == {value.name for value in plain.graph.inputs}
    assert outputs(model) == outputs(plain)


def test_a_boundary_gradient_becomes_a_batch_input() -> None:
    model = read_training_graph(GRAPHS / "ortmodule_leg__nplm.onnx")
    assert model.metadata_props["kfac.frontend"] == "ort-module"
    assert metadata.read(model, "loss", metadata.Loss) == metadata.Loss(
        None, predictions={"pred": "pred_grad"}
    )
    assert "pred_grad" in {value.name for value in model.graph.inputs}
    assert outputs(model)[-1] == "pred"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_training_graph(tmp_path / "none.onnx")
    assert caught.value.message == f"there is no file '{tmp_path}/none.onnx'"
    (tmp_path / "bad.onnx").write_bytes(b"\x89PNG and more")
    with pytest.raises(UserError) as caught:
        read_training_graph(tmp_path / "bad.onnx")
    assert caught.value.message == f"'{tmp_path}/bad.onnx' is not an ONNX model"


def test_external_data_is_read_beside_the_model_only(
    tmp_path: Path, run: Callable[..., dict[str, np.ndarray]]
) -> None:
    text = f"""{HEAD} (float[3] x) => (float loss, float[3] p_grad) <float[3] p = {{1, 2, 3}}> {{
        m = Mul (p, x) loss = ReduceSum <keepdims = 0> (m) p_grad = Identity (x) }}"""
    model = onnx.parser.parse_model(text)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "p"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    read = read_training_graph(tmp_path / "m.onnx")
    assert run(read, {"x": np.ones(3, np.float32)})["loss"] == 6
    (tmp_path / "m.data").rename(tmp_path / "other.data")
    with pytest.raises(UserError, match=r"is missing: there is no file 'm\.data'"):
        read_training_graph(tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../outside.data"
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(12))
    (tmp_path / "inner" / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="keeps its data outside the model's folder"):
        read_training_graph(tmp_path / "inner" / "m.onnx")


def square(outputs: str) -> str:
    """Return two square layers without a name that says what is whose gradient."""
    return f"""{HEAD} (float[3,3] v, float[3,3] w, float[n,3] x) => (float loss, {outputs}) {{
        h = MatMul (x, v) y = MatMul (h, w) loss = ReduceSum <keepdims = 0> (y)
        s = Shape (y) one = ConstantOfShape <value = float[1] {{1.0}}> (s)
        hT = Transpose (h) b = MatMul (hT, one) wT = Transpose (w) dh = MatMul (one, wT)
        xT = Transpose (x) a = MatMul (xT, dh) }}"""


def test_positions_agree_with_the_flow_of_data(build: Callable[[str], ir.Model]) -> None:
    model = read_training_graph(build(square("float[3,3] a, float[3,3] b")))
    assert pairs(model) == {"v": "a", "w": "b"}
    assert notes(model) == ["paired 2 gradients with parameters by position and shape"]


def test_positions_against_the_flow_of_data_are_refused(build: Callable[[str], ir.Model]) -> None:
    with pytest.raises(UserError) as caught:
        read_training_graph(build(square("float[3,3] b, float[3,3] a")))
    assert str(caught.value) == (
        "by position 'b' is the gradient of 'v', but it is made as that of 'w'\n"
        "  help: name the pairs with --gradients PARAMETER=OUTPUT"
    )
    model = read_training_graph(build(square("float[3,3] b, float[3,3] a")), gradients={"v": "a", "w": "b"})
    assert pairs(model) == {"v": "a", "w": "b"}


def test_what_position_alone_decides_is_said(build: Callable[[str], ir.Model]) -> None:
    text = f"""{HEAD} (float[3] p, float[3] q, float[3] x) => (float loss, float[3] a, float[3] b) {{
        m = Mul (p, x) k = Mul (q, m) loss = ReduceSum <keepdims = 0> (k) a = Mul (q, x) b = Identity (m) }}"""
    assert notes(read_training_graph(build(text))) == [
        "position alone tells the gradients of p, q: `verify` checks them",
        "paired 2 gradients with parameters by position and shape",
    ]


def test_the_gradient_of_a_batch_input_trains_nothing(build: Callable[[str], ir.Model]) -> None:
    """ORTModule gives it for inputs that require one."""
    text = f"""{HEAD} (float[3] p, float[n] x) => (float loss, float[3] p_grad, float[n] x_grad) {{
        m = Mul (p, x) loss = ReduceSum <keepdims = 0> (m) p_grad = Identity (x) x_grad = Identity (p) }}"""
    model = read_training_graph(build(text))
    assert [item.name for item in metadata.read_list(model, "parameters", metadata.Parameter)] == ["p"]
    assert "'x_grad' is the gradient of the batch input 'x', not used" in notes(model)
    assert outputs(model) == ["loss", "p_grad", "x_grad"]
