"""Each check on a small graph that has what it looks for, and on one that has not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.reports.checks import CHECKS, Finding, check

BODY = """
    h = Gather<axis: int = 0>(W, ids)
    {middle}
    z = MatMul({use}, V)
    loss = {loss}
    seed = {seed}
    dz = Expand(seed, shape)
    V_t = Transpose<perm: ints = [1, 0]>(V)
    dh = MatMul(dz, V_t)
    h_t = Transpose<perm: ints = [1, 0]>(h)
    V_grad = MatMul(h_t, dz)
    zeros = ConstantOfShape(size)
    index = Unsqueeze(ids, last)
    columns = Expand(index, h_shape)
    W_grad = ScatterElements<axis: int = 0, reduction: string = "add">(zeros, columns, dh)
    {more}
"""


def graph(
    *,
    middle: str = "",
    use: str = "h",
    loss: str = "ReduceSum<keepdims: int = 0>(z)",
    more: str = "",
    outputs: str = "",
    constants: str = "",
    batch: str = "N",
    opset: int = 18,
    table: np.ndarray | None = None,
    kernel: np.ndarray | None = None,
) -> onnx.ModelProto:
    """Return Σ W[ids] V with its gradients; shapes of the batch are computed, so that it may be free."""
    body = BODY.format(middle=middle, use=use, loss=loss, more=more, seed="Identity(one)")
    text = f"""
    <ir_version: 9, opset_import: ["" : {opset}]>
    training (int64[{batch}] ids) => (float loss, float[5, 3] W_grad, float[3, 2] V_grad{outputs})
    <float one = {{1.0}}, int64[1] last = {{-1}}, int64[2] size = {{5, 3}}, int64[1] two = {{2}}, int64[1] three = {{3}}{constants}>
    {{
        count = Shape(ids)
        shape = Concat<axis: int = 0>(count, two)
        h_shape = Concat<axis: int = 0>(count, three)
        {body}
    }}
    """
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    first = rng.standard_normal((5, 3)) if table is None else table
    second = rng.standard_normal((3, 2)) if kernel is None else kernel
    for name, values in (("W", first), ("V", second)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return model


def found(model: onnx.ModelProto, **options: object) -> dict[str, Finding]:
    """Return the findings by id, each once."""
    report = check(model, **options)
    by_id = {item.id: item for item in report.findings}
    assert len(by_id) == len(report.findings)
    return by_id


def test_a_clean_graph_has_no_findings() -> None:
    assert found(graph()) == {}


def test_a_scatter_that_may_lose_sums() -> None:
    model = graph()
    scatter = next(node for node in model.graph.node if node.op_type == "ScatterElements")
    scatter.op_type, scatter.input[1] = "ScatterND", "index"
    del scatter.attribute[0]
    item = found(model)["racing-scatter"]
    assert item == Finding(
        "racing-scatter",
        "warning",
        "ScatterND 'W_grad' adds into rows that may repeat",
        ("ScatterND 'W_grad'",),
        "onnxruntime's CPU kernel of ScatterND adds rows without locks: with more than one thread, sums of "
        "repeated rows are lost, silently and not always",
        "`transform` rewrites them to ScatterElements; elsewhere run with intra_op_num_threads=1",
    )


NONZERO = """
    everywhere = NonZero(mask)
    places = Transpose(everywhere)"""
RANGE = """
    line = Range(zero, top, step)
    places = Unsqueeze(line, last)"""


@pytest.mark.parametrize("places", [NONZERO, RANGE])
def test_rows_that_an_operator_makes_unique_do_not_race(places: str) -> None:
    model = graph(
        more=f"""
    h_row = ReduceSum<keepdims: int = 0>(h, last)
    mask = Cast<to: int = 9>(h_row)
    {places}
    base = ConstantOfShape(count)
    extra = ScatterND<reduction: string = "add">(base, places, h_row)""",
        constants=", int64 zero = {0}, int64 top = {2}, int64 step = {1}",
        outputs=", float[N] extra",
    )
    assert "racing-scatter" not in found(model)


def test_an_old_opset() -> None:
    report = check(graph(opset=12))
    assert next((item.id, item.severity) for item in report.findings) == ("unreadable", "error")
    old = next(item for item in report.findings if item.id == "old-opset")
    assert old.what == "the graph uses opset 12"


@pytest.mark.parametrize(
    ("ratio", "mode", "expected"),
    [("half", "no", True), ("half", "yes", False), ("half", "", True), ("none", "no", False)],
)
def test_dropout_that_does_nothing(ratio: str, mode: str, expected: bool) -> None:
    model = graph(
        middle=f"d = Dropout(h, {ratio}{', ' + mode if mode else ''})",
        use="d",
        constants=", float half = {0.5}, float none = {0.0}, bool no = {0}, bool yes = {1}",
    )
    items = found(model)
    assert ("inactive-dropout" in items) is expected
    if expected:
        assert items["inactive-dropout"].what == "Dropout 'd' does nothing: it is in inference mode"


def test_batch_normalization_in_inference_mode() -> None:
    model = graph(
        middle="d = BatchNormalization(h, ones3, ones3, ones3, ones3)",
        use="d",
        constants=", float[3] ones3 = {1.0, 1.0, 1.0}",
    )
    assert found(model)["inference-batch-norm"].severity == "warning"


def test_weights_that_are_not_finite_are_an_error() -> None:
    item = found(graph(table=np.where(np.arange(15).reshape(5, 3) < 2, np.nan, 0.5)))["non-finite-weights"]
    assert (item.severity, item.what) == ("error", "2 of 15 first values of 'W' are not finite")


def test_a_table_of_zeros_and_a_constant_matrix() -> None:
    assert set(found(graph(table=np.zeros((5, 3))))) == {"zero-table"}
    item = found(graph(kernel=np.full((3, 2), 0.5)))
    assert set(item) == {"constant-weights"}
    assert item["constant-weights"].what == "all first values of 'V' are 0.5"


def test_values_that_are_given_count() -> None:
    given = {"W": np.full((5, 3), np.inf, np.float32)}
    assert found(graph(), parameters=given)["non-finite-weights"].where == ("W",)


def test_one_row_of_zeros_is_a_padding_row_that_is_trained() -> None:
    table = np.ones((5, 3)) * np.arange(5)[:, None] - 2.0
    item = found(graph(table=table))["padding-lost"]
    assert item.what == "row 2 of 'W' starts at zero, as a padding row does, but is trained"
    masked = graph(
        table=table,
        middle="pad = Equal(ids, mark)\nkeep = Not(pad)\nkept = Cast<to: int = 1>(keep)\n"
        "kept_rows = Unsqueeze(kept, last)\nd = Mul(h, kept_rows)",
        use="d",
        constants=", int64 mark = {2}",
    )
    assert "padding-lost" not in found(masked)
    table[4] = 0.0
    assert "padding-lost" not in found(graph(table=table))


def test_a_loss_whose_reduction_is_not_seen() -> None:
    item = found(graph(middle="", loss="ReduceMax<keepdims: int = 0>(z)"))["loss-reduction"]
    assert item.where == ("loss",)


def test_a_batch_of_fixed_size() -> None:
    item = found(graph(batch="4"))["static-batch"]
    assert (item.severity, item.what) == ("note", "no input of the batch has a free dimension: ids [4]")


def test_a_parameter_outside_the_loss_and_one_whose_gradient_is_zero() -> None:
    model = graph(more="B_grad = ConstantOfShape(three)", outputs=", float[3] B_grad")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "B"))
    assert found(model)["unused-parameter"].what == "the loss does not depend on the parameter 'B'"
    used = graph(
        middle="d = Add(h, B)", use="d", more="B_grad = ConstantOfShape(three)", outputs=", float[3] B_grad"
    )
    used.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "B"))
    item = found(used)["zero-gradient"]
    assert item.what == "the gradient 'B_grad' of 'B' is zero whatever the batch is"


def test_tensors_that_are_not_trained() -> None:
    model = graph(middle="d = MatMul(h, frozen)", use="d")
    frozen = np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(frozen, "frozen"))
    assert found(model)["frozen-parameter"].where == ("frozen",)
    for node in model.graph.node:
        node.input[:] = ["onnx::MatMul_12" if name == "frozen" else name for name in node.input]
    model.graph.initializer[-1].name = "onnx::MatMul_12"
    items = found(model)
    assert set(items) == {"folded-parameter"}
    assert items["folded-parameter"].what == (
        "a constant looks like what an exporter folded from parameters: onnx::MatMul_12"
    )


def test_a_product_whose_shapes_fit_one_batch_only() -> None:
    model = graph(more="wrong = MatMul(dz, dz)", outputs=", float[N, 2] wrong")
    item = found(model)["invalid-shapes"]
    assert (item.severity, item.what) == ("error", "MatMul 'wrong' multiplies [N, 2] by [N, 2]")


def test_an_operator_that_nothing_can_run() -> None:
    model = graph(middle="d = com.example.Strange(h)", use="d")
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    items = found(model)
    assert items["no-kernel"].severity == "error"
    assert items["no-kernel"].where == ("com.example::Strange 'd'",)
    assert items["unreadable"].severity == "error"


def test_what_is_no_model_is_the_users_fault(tmp_path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError):
        check(path)


def test_every_check_says_what_it_reports() -> None:
    assert all((rule.__doc__ or "").startswith("Report ") for rule in CHECKS)
