"""The engine itself: which nodes are differentiated, how terms add up, what is refused, and its speed."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from autodiff_graphs import run_gradients

from kfac_onnx.autodiff import append_gradients, differentiate
from kfac_onnx.autodiff import table as table_module
from kfac_onnx.errors import UserError
from kfac_onnx.graph.shapes import infer_shapes

HEADER = '<ir_version: 10, opset_import: ["" : 18, "acme" : 1]>'


def graph(text: str) -> tuple[ir.Model, dict[str, ir.Value]]:
    model = ir.from_proto(onnx.parser.parse_model(f"{HEADER}\n{text}"))
    infer_shapes(model)
    values = {str(value.name): value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    values.update((str(value.name), value) for node in model.graph for value in node.outputs)
    return model, values


def gradients(
    model: ir.Model, values: dict[str, ir.Value], loss: str, wrt: list[str], feeds: dict[str, np.ndarray]
) -> list[np.ndarray]:
    found = differentiate(model, values[loss], [values[name] for name in wrt])
    for name in wrt:
        node = ir.node("Identity", [found[values[name]]])
        node.outputs[0].name = f"d {name}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(values[name].dtype), values[name].shape
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    del model.opset_imports["acme"]
    results = run_gradients(model, feeds)
    return [results[f"d {name}"] for name in wrt]


X = np.array([1.0, -2.0, 3.0], np.float32)


def test_terms_of_several_readers_add_up() -> None:
    model, values = graph(
        "g (float[3] x) => (float[3] z) { a = Neg(x) b = Mul(x, a) c = Add(b, x) z = Mul(c, x) }"
    )
    (found,) = gradients(model, values, "z", ["x"], {"x": X})
    np.testing.assert_allclose(found, -3 * X**2 + 2 * X, rtol=1e-6)  # z = −x³ + x²


def test_a_loss_that_is_no_scalar_is_summed() -> None:
    model, values = graph("g (float[N] x) => (float[N] z) { z = Mul(x, x) }")
    (found,) = gradients(model, values, "z", ["x"], {"x": X})
    np.testing.assert_array_equal(found, 2 * X)


def test_the_gradient_of_the_loss_itself_is_ones() -> None:
    model, values = graph("g (float[3] x) => (float[3] z) { z = Neg(x) }")
    found = gradients(model, values, "z", ["z", "x"], {"x": X})
    np.testing.assert_array_equal(found[0], np.ones(3, np.float32))
    np.testing.assert_array_equal(found[1], -np.ones(3, np.float32))


def test_values_inside_have_gradients_as_well_as_what_they_are_made_of() -> None:
    model, values = graph("g (float[3] x) => (float[3] z) { h = Mul(x, x) a = Exp(h) z = Mul(a, h) }")
    x = X / 4
    h = x**2
    inner, outer = gradients(model, values, "z", ["h", "x"], {"x": x})
    np.testing.assert_allclose(inner, np.exp(h) * (1 + h), rtol=1e-6)
    np.testing.assert_allclose(outer, np.exp(h) * (1 + h) * 2 * x, rtol=1e-6)


def test_what_the_loss_does_not_depend_on_has_a_gradient_of_zeros() -> None:
    model, values = graph(
        "g (float[3] x, float[2, N] y, float[3] w) => (float[3] z) { f = Floor(w) a = Add(f, x) z = Mul(a, a) u = Neg(y) }"
    )
    feeds = {"x": X, "y": np.ones((2, 4), np.float32), "w": X}
    _, y, w = gradients(model, values, "z", ["x", "y", "w"], feeds)
    np.testing.assert_array_equal(y, np.zeros((2, 4), np.float32))
    np.testing.assert_array_equal(w, np.zeros(3, np.float32))


def test_append_gradients_leaves_out_what_the_loss_does_not_depend_on() -> None:
    model, values = graph("g (float[3] x, float[3] y) => (float[3] z) { f = Floor(y) z = Add(f, x) }")
    found = append_gradients(model, values["z"], [values["x"], values["y"]])
    assert list(found) == [values["x"]]


def test_every_node_without_a_rule_is_listed_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    g (float[2, 3] x, float[3] y) => (float z) {
        [one] a = acme.Twist(x)
        [two] b = MatMul(a, y)
        c = acme.Bend(b)
        [four] d = ScatterElements<reduction: string = "max">(c, ids, c)
        [five] e = acme.Unused(y)
        z = ReduceSum<keepdims: int = 0>(d)
    }"""
    text = text.replace("float[3] y)", "float[3] y, int64[2] ids)")
    model, values = graph(text)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    uses = {name: len(value.uses()) for name, value in values.items()}
    with pytest.raises(UserError) as caught:
        differentiate(model, values["z"], [values["x"]], place="m.onnx")
    assert str(caught.value) == (
        "4 nodes have no gradient rule between the parameters and the loss\n"
        "  --> m.onnx\n"
        "  tried: ScatterElements 'd': reduction=max is not supported\n"
        "  tried: acme::Bend 'c': no rule for acme::Bend\n"
        "  tried: MatMul 'b': the rank of its inputs is unknown\n"
        "  tried: acme::Twist 'a': no rule for acme::Twist\n"
        "  help: export the model without these operators, or export its gradients with it"
    )
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert {name: len(value.uses()) for name, value in values.items()} == uses
    monkeypatch.undo()


def test_operators_off_the_way_need_no_rule() -> None:
    model, values = graph("""
    g (float[3] x, float[3] y) => (float[3] z) {
        a = acme.Twist(y)
        b = Mul(x, a)
        c = acme.Bend(b)
        f = Floor(b)
        s = Shape(c)
        z = Add(b, f)
    }""")
    found = differentiate(model, values["z"], [values["x"]])
    assert found[values["x"]].name == "x_grad"
    assert not any(
        node.op_type in ("Twist", "Bend") and "kfac.lowered" in node.metadata_props for node in model.graph
    )


def test_gradients_are_called_after_their_values_and_names_stay_unique() -> None:
    model, values = graph(
        'g (float[3] x, float[3] x_grad) => (float[3] z) { h = Mul(x, x_grad) "gradient/h/Mul" = Exp(h) z = Mul("gradient/h/Mul", h) }'
    )
    found = differentiate(model, values["z"], [values["x"], values["h"]])
    assert found[values["h"]].name == "h_grad"
    assert found[values["x"]].name == "x_grad_2"
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(names) == len(set(names))


def test_gradients_have_the_type_and_shape_of_their_values() -> None:
    model, values = graph("g (double[N, 3] x, double[3] b) => (double[N, 3] z) { a = Add(x, b) z = Exp(a) }")
    for value, gradient in differentiate(model, values["z"], [values["x"], values["b"]]).items():
        assert gradient.dtype == ir.DataType.DOUBLE
        assert list(gradient.shape or ()) == list(value.shape or ())


def test_the_same_model_gives_the_same_bytes() -> None:
    made: list[bytes] = []
    for _ in range(2):
        model, values = graph(
            "g (float[N, 3] x, float[M] y) => (float[N, 3] z) { a = Add(x, y) b = Mul(a, y) z = Sub(b, x) }"
        )
        differentiate(model, values["z"], [values["x"], values["y"]])
        made.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]


def chain(length: int) -> tuple[ir.Model, ir.Value, ir.Value]:
    """Return a long graph: every node reads the one before it and the weight."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    nodes: list[ir.Node] = []
    value = x
    for index in range(length):
        node = ir.node(("Mul", "Add", "Tanh")[index % 3], [value, w][: 1 + (index % 3 < 2)])
        value = node.outputs[0]
        value.name, value.type, value.shape = f"v{index}", x.type, ir.Shape([4])
        nodes.append(node)
    inner = ir.Graph([x, w], [value], nodes=nodes, opset_imports={"": 18}, name="chain")
    return ir.Model(inner, ir_version=10), value, w


def test_time_grows_linearly_with_the_number_of_nodes() -> None:
    seconds: list[float] = []
    for length in (2_000, 20_000):
        model, loss, w = chain(length)
        start = time.process_time()  # of this process alone: the machine may be busy
        differentiate(model, loss, [w])
        seconds.append(time.process_time() - start)
    assert seconds[1] < 15
    assert seconds[1] < 40 * seconds[0]  # ten times the nodes; a quadratic engine would take a hundred times


def test_no_two_modules_have_a_rule_for_one_operator() -> None:
    modules = [getattr(table_module, name) for name in dir(table_module) if name.startswith("rules_")]
    keys = [key for module in modules for key in module.RULES]
    assert len(keys) == len(set(keys))
    assert len(keys) == len(table_module.RULES)
