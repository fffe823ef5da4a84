"""Which tables are found, with what, and why others are refused: full sentences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graphs import model_of, training_graph

from kfac_onnx import metadata
from kfac_onnx.metadata import IdCheck, Refusal, Site
from kfac_onnx.passes.find_embeddings import find_tables
from kfac_onnx.pipeline.pipeline import parse_pipeline


def verdict(model: ir.Model):
    (found,) = find_tables(model)
    return found


def refusal(model: ir.Model) -> Refusal:
    found = verdict(model)
    assert found.site is None
    assert found.refusal is not None
    return found.refusal


def site(model: ir.Model) -> Site:
    found = verdict(model)
    assert found.refusal is None, found.refusal
    assert found.site is not None
    return found.site.describe()


def marked_table(
    model: ir.Model, feed: dict[str, np.ndarray]
) -> tuple[np.ndarray, Site, dict[str, np.ndarray]]:
    """Run `find-embeddings`, and return Σ rows at ids as a table, the site, and its values."""
    parse_pipeline("find-embeddings").run(model)
    (found,) = metadata.read_list(model, "sites", Site)
    values = {key: value for key, value in feed.items() if key in (found.ids, found.rows)}
    names = [name for name in (found.ids, found.rows, found.keep) if name and name not in values]
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    by_name |= {value.name: value for value in model.graph.initializers.values()}
    model.graph.outputs.extend(by_name[name] for name in names)
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    want = {item.name for item in host.get_inputs()}
    found_values = host.run(names or None, {k: v for k, v in feed.items() if k in want})
    values.update(zip(names, found_values, strict=False))
    table = np.zeros((found.vocab_size, found.embedding_dim))
    np.add.at(table, values[found.ids], values[found.rows].astype(np.float64))
    return table, found, values


IDS = np.array([[0, 4], [4, 2], [1, 0]], np.int64)
G = np.random.default_rng(0).standard_normal((3, 2, 3)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
TABLE = np.zeros((5, 3))
np.add.at(TABLE, IDS.reshape(-1), G.reshape(-1, 3).astype(np.float64))


def test_gather_and_scatter_nd() -> None:
    model = training_graph()
    found = site(model)
    assert (found.parameter, found.vocab_size, found.embedding_dim, found.layout) == ("W", 5, 3, "rows")
    assert [(use.op, use.ids, use.output, use.output_gradient) for use in found.uses] == [
        ("Gather", "ids", "h", "g")
    ]
    table, _, _ = marked_table(model, {"ids": IDS, "g": G, "W": W})
    np.testing.assert_allclose(table, TABLE, atol=1e-6)  # exact but for the order of float64 sums


@pytest.mark.parametrize(
    ("backward", "factor"),
    [
        (
            'index = Unsqueeze(ids, last)\n s = ScatterND<reduction: string = "add">(zeros, index, g)\n W_grad = Neg(s)',
            -1.0,
        ),
        (
            'index = Unsqueeze(ids, last)\n s = ScatterND<reduction: string = "add">(zeros, index, g)\n'
            " W_grad = Mul(s, two)",
            2.0,
        ),
        (
            'index = Unsqueeze(ids, last)\n s = ScatterND<reduction: string = "add">(zeros, index, g)\n'
            " W_grad = Div(s, columns)",
            1.0 / np.array([1.0, 2.0, 4.0]),
        ),
        (
            'index = Unsqueeze(ids, last)\n s = ScatterND<reduction: string = "add">(zeros, index, g)\n'
            " W_grad = Mul(s, table_rows)",
            np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]),
        ),
    ],
    ids=["negated", "scaled", "scaled by column", "scaled by row"],
)
def test_views_after_the_scatter_act_on_the_rows(backward: str, factor: float | np.ndarray) -> None:
    constants = (
        ", float two = {2.0}, float[3] columns = {1.0, 2.0, 4.0},"
        " float[5, 1] table_rows = {1.0, 2.0, 3.0, 4.0, 5.0}"
    )
    model = training_graph(backward=backward, constants=constants)
    table, _, _ = marked_table(model, {"ids": IDS, "g": G, "W": W})
    np.testing.assert_allclose(table, TABLE * factor, atol=1e-6)


def test_negative_ids_wrap_where_the_exporters_backward_wraps() -> None:
    model = training_graph()
    wrapped = IDS - 5 * (IDS == 4)
    table, _, values = marked_table(model, {"ids": wrapped, "g": G, "W": W})
    np.testing.assert_array_equal(values[metadata.read_list(model, "sites", Site)[0].ids], IDS.reshape(-1))
    np.testing.assert_allclose(table, TABLE, atol=1e-6)
    (check,) = metadata.read_list(model, "id_checks", IdCheck)
    assert check == IdCheck("W", "ids", 5, "wrap")


MASKED = """
        at_least = GreaterOrEqual(ids, none)
        is_pad = Equal(ids, pad)
        no_pad = Not(is_pad)
        fine = And(at_least, no_pad)
        keep = Unsqueeze(fine, last)
        drop = Not(keep)
        masked = Where(drop, zero, g)
        low = Clip(ids, none, most)
        index = Unsqueeze(low, last)
        W_grad = ScatterND<reduction: string = "add">(zeros, index, masked)
"""


def test_padding_rows_are_dropped_and_do_not_count() -> None:
    constants = ", int64 none = {0}, int64 most = {4}, int64 pad = {4}"
    model = training_graph(backward=MASKED, constants=constants)
    table, found, values = marked_table(model, {"ids": IDS, "g": G, "W": W})
    assert found.padding_idx == 4
    np.testing.assert_array_equal(values[found.keep], (IDS.reshape(-1) != 4).astype(np.float32))
    np.testing.assert_allclose(table, np.where(np.arange(5)[:, None] == 4, 0.0, TABLE), atol=1e-6)
    (check,) = metadata.read_list(model, "id_checks", IdCheck)
    assert check.negatives == "reject"


def test_a_mask_that_drops_no_valid_id_costs_nothing() -> None:
    constants = ", int64 none = {0}, int64 most = {4}, int64 pad = {-1}"
    found = marked_table(training_graph(backward=MASKED, constants=constants), {"ids": IDS, "g": G, "W": W})[
        1
    ]
    assert found.padding_idx is None
    assert found.keep is None


def test_the_users_own_mask_after_the_lookup_counts_as_a_lookup() -> None:
    forward = """
        is_pad = Equal(ids, pad)
        mask = Unsqueeze(is_pad, last)
        rows = Gather<axis: int = 0>(W, ids)
        h = Where(mask, zero, rows)
    """
    backward = """
        masked = Where(mask, zero, g)
        index = Unsqueeze(ids, last)
        W_grad = ScatterND<reduction: string = "add">(zeros, index, masked)
    """
    found = site(training_graph(forward, backward, constants=", int64 pad = {4}"))
    assert found.padding_idx is None
    assert found.uses[0].output == "rows"


def test_two_uses_of_one_table() -> None:
    forward = """
        first = Gather<axis: int = 0>(W, ids)
        second = Gather<axis: int = 0>(W, other)
        h = Add(first, second)
    """
    backward = """
        index = Unsqueeze(ids, last)
        index2 = Unsqueeze(other, last)
        a = ScatterND<reduction: string = "add">(zeros, index, g)
        b = ScatterND<reduction: string = "add">(zeros, index2, g)
        W_grad = Add(b, a)
    """
    model = training_graph(forward, backward, inputs="int64[N, 2] ids, int64[N, 2] other, float[N, 2, 3] g")
    other = (IDS + 1) % 5
    table, found, _ = marked_table(model, {"ids": IDS, "other": other, "g": G, "W": W})
    both = TABLE.copy()
    np.add.at(both, other.reshape(-1), G.reshape(-1, 3).astype(np.float64))
    np.testing.assert_allclose(table, both, atol=1e-6)
    assert {use.ids for use in found.uses} == {"ids", "other"}


def test_tied_projection_is_a_dense_use() -> None:
    forward = """
        rows = Gather<axis: int = 0>(W, ids)
        turned = Transpose<perm: ints = [1, 0]>(W)
        scores = MatMul(rows, turned)
        h = MatMul(scores, W)
    """
    backward = """
        index = Unsqueeze(ids, last)
        s = ScatterND<reduction: string = "add">(zeros, index, g)
        W_grad = Add(s, part)
    """
    inputs = "int64[N, 2] ids, float[N, 2, 3] g, float[5, 3] part"
    found = site(training_graph(forward, backward, inputs=inputs))
    assert {use.op for use in found.dense_uses} == {"MatMul"}
    assert len(found.uses) == 1


def test_decoys_are_no_tables() -> None:
    """A Gather of activations, of a frozen table and of columns by constant ids; a sliced weight matrix."""
    text = """
    decoys (int64[N] ids, float[N, 4] x, float[4, 4] W, float[6, 4] frozen) => (float loss, float[4, 4] W_grad)
    <int64 one = {1}, int64[2] some = {0, 2}, int64[1] start = {0}, int64[1] stop = {2}>
    {
        rows = Gather<axis: int = 0>(frozen, ids)
        y = MatMul(x, W)
        column = Gather<axis: int = 1>(y, one)
        part = Slice(W, start, stop, start)
        turned = Transpose<perm: ints = [1, 0]>(part)
        z = MatMul(x, turned)
        both = Gather<axis: int = 1>(z, some)
        a = ReduceSum<keepdims: int = 0>(both)
        b = ReduceSum<keepdims: int = 0>(column)
        c = ReduceSum<keepdims: int = 0>(rows)
        ab = Add(a, b)
        loss = Add(ab, c)
        xt = Transpose<perm: ints = [1, 0]>(x)
        W_grad = MatMul(xt, y)
    }
    """
    found = verdict(model_of(text, {"W": "W_grad"}))
    assert found.site is None
    assert found.refusal is None
    assert found.trail[-1] == "no operator looks up rows of this parameter: it is not an embedding table"


def test_lookup_without_its_rows_in_the_gradient_is_refused() -> None:
    forward = """
        first = Gather<axis: int = 0>(W, ids)
        second = Gather<axis: int = 0>(W, other)
        h = Add(first, second)
    """
    model = training_graph(forward, inputs="int64[N, 2] ids, int64[N, 2] other, float[N, 2, 3] g")
    assert refusal(model).reason == (
        "Gather 'second' looks rows up by the ids 'other', but its gradient 'W_grad' holds no rows of that "
        "lookup: the exporter merged two tables that started equal, or the lookup is detached"
    )


def test_lookup_without_its_rows_is_detached_where_the_exporter_merged_nothing() -> None:
    forward = """
        first = Gather<axis: int = 0>(W, ids)
        second = Gather<axis: int = 0>(W, other)
        h = Add(first, second)
    """
    model = training_graph(forward, inputs="int64[N, 2] ids, int64[N, 2] other, float[N, 2, 3] g")
    model.metadata_props["kfac.unmerged"] = "true"
    found = site(model)
    assert [use.output for use in found.uses] == ["first"]
    assert [(use.op, use.output) for use in found.dead_ends] == [("Gather", "second")]
    model.metadata_props["kfac.orphans"] = '["V_grad"]'  # then another tool merged V into W
    assert "holds no rows of that lookup" in refusal(model).reason


def test_gradient_with_a_part_of_unknown_origin_is_refused() -> None:
    backward = """
        index = Unsqueeze(ids, last)
        s = ScatterND<reduction: string = "add">(zeros, index, g)
        other = Mul(noise, two)
        W_grad = Add(s, other)
    """
    model = training_graph(
        backward=backward,
        constants=", float two = {2.0}",
        inputs="int64[N, 2] ids, float[N, 2, 3] g, float[5, 3] noise",
    )
    found = refusal(model)
    assert found.reason == (
        "its gradient also gets a part from Mul 'other' that belongs to no use of the table in the loss"
    )
    assert found.remedy == "leave it to the ordinary optimizer (allow-fallback=W), or see `why W`"
    assert found.path == "W -> other -> W_grad"


def test_scatter_by_other_ids_is_refused() -> None:
    backward = """
        index = Unsqueeze(other, last)
        W_grad = ScatterND<reduction: string = "add">(zeros, index, g)
    """
    model = training_graph(backward=backward, inputs="int64[N, 2] ids, int64[N, 2] other, float[N, 2, 3] g")
    assert refusal(model).reason == (
        "no operator of its gradient 'W_grad' scatters the rows of Gather 'h', which looks rows up by the ids "
        "'ids' (ScatterND of 'g' takes other ids than 'h')"
    )


def test_element_wise_scaling_of_the_table_is_refused() -> None:
    backward = """
        index = Unsqueeze(ids, last)
        s = ScatterND<reduction: string = "add">(zeros, index, g)
        W_grad = Mul(s, mask)
    """
    model = training_graph(backward=backward, inputs="int64[N, 2] ids, float[N, 2, 3] g, float[5, 3] mask")
    assert "holds no" in refusal(model).reason or "no operator of its gradient" in refusal(model).reason


def test_names_and_node_order_do_not_matter() -> None:
    """The same graph with every inner value renamed gives the same site but for the names."""
    plain, renamed = training_graph(), training_graph()
    for node in renamed.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"x{abs(hash(value.name))}"
    one, two = site(plain), site(renamed)
    assert (one.vocab_size, one.embedding_dim, one.layout) == (two.vocab_size, two.embedding_dim, two.layout)
    assert len(one.uses) == len(two.uses) == 1


def test_table_of_width_one_and_table_stored_as_a_vector() -> None:
    """Bias tables: float[V, 1], and float[V] with scalar rows."""
    for weight, size in (("float[5, 1] W", "{5, 1}"), ("float[5] W", "{5, 1}")):
        rank = 2 if "1" in weight else 1
        text = f"""
        bias (int64[N] ids, float[N{", 1" if rank == 2 else ""}] g, {weight})
            => (float loss, {weight.replace(" W", "")} W_grad)
        <int64[1] last = {{-1}}, int64[{rank}] size = {size if rank == 2 else "{5}"}>
        {{
            h = Gather<axis: int = 0>(W, ids)
            hg = Mul(h, g)
            loss = ReduceSum<keepdims: int = 0>(hg)
            zeros = ConstantOfShape(size)
            index = Unsqueeze(ids, last)
            W_grad = ScatterND<reduction: string = "add">(zeros, index, g)
        }}
        """
        model = model_of(text, {"W": "W_grad"})
        g = np.array([1.0, 2.0, 4.0], np.float32).reshape((3, 1) if rank == 2 else (3,))
        start = np.zeros((5, 1) if rank == 2 else 5, np.float32)
        table, found, _ = marked_table(model, {"ids": np.array([3, 0, 3]), "g": g, "W": start})
        assert (found.vocab_size, found.embedding_dim, found.layout) == (
            5,
            1,
            "rows" if rank == 2 else "flat",
        )
        np.testing.assert_array_equal(table[:, 0], [2.0, 0.0, 0.0, 5.0, 0.0])


def test_position_table_read_by_a_slice_whose_gradient_is_placed() -> None:
    """W[1:3] is added to activations; the exporter writes its gradient to rows 1 and 2 of zeros."""
    text = """
    position (float[N, 2, 3] x, float[2, 3] g, float[5, 3] W) => (float loss, float[5, 3] W_grad)
    <int64[1] start = {1}, int64[1] stop = {3}, int64[1] axis = {0}, int64[2] size = {5, 3},
     int64[2, 1] places = {1, 2}>
    {
        part = Slice(W, start, stop, axis)
        h = Add(x, part)
        loss = ReduceSum<keepdims: int = 0>(h)
        zeros = ConstantOfShape(size)
        W_grad = ScatterND(zeros, places, g)
    }
    """
    g = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
    feed = {"x": np.zeros((1, 2, 3), np.float32), "g": g, "W": W}
    table, found, values = marked_table(model_of(text, {"W": "W_grad"}), feed)
    assert [(use.op, use.ids, use.output_gradient) for use in found.uses] == [("Slice", None, "g")]
    np.testing.assert_array_equal(values[found.ids], [1, 2])
    np.testing.assert_array_equal(table[1:3], g)
    np.testing.assert_array_equal(table[[0, 3, 4]], 0)


def test_rows_of_a_sliced_table() -> None:
    """A lookup in W[1:4]: ids count from the slice's first row, the gradient is padded back."""
    forward = "part = Slice(W, one, four, none)\n h = Gather<axis: int = 0>(part, ids)"
    backward = """
        small = ConstantOfShape(size3)
        index = Unsqueeze(ids, last)
        s = ScatterND<reduction: string = "add">(small, index, g)
        W_grad = ScatterND(zeros, places, s)
    """
    constants = (
        ", int64[1] one = {1}, int64[1] four = {4}, int64[1] none = {0}, int64[2] size3 = {3, 3},"
        " int64[3, 1] places = {1, 2, 3}"
    )
    ids = np.array([[0, 2], [2, 1], [0, 0]], np.int64)
    table, found, _ = marked_table(
        training_graph(forward, backward, constants=constants), {"ids": ids, "g": G, "W": W}
    )
    want = np.zeros((5, 3))
    np.add.at(want, ids.reshape(-1) + 1, G.reshape(-1, 3).astype(np.float64))
    np.testing.assert_allclose(table, want, atol=1e-6)
    assert found.vocab_size == 5


def test_one_lookup_whose_rows_two_scatters_add() -> None:
    """The exporter shares one Gather between two consumers, and scatters each one's gradient."""
    backward = """
        index = Unsqueeze(ids, last)
        a = ScatterND<reduction: string = "add">(zeros, index, g)
        b = ScatterND<reduction: string = "add">(zeros, index, more)
        W_grad = Add(a, b)
    """
    model = training_graph(backward=backward, inputs="int64[N, 2] ids, float[N, 2, 3] g, float[N, 2, 3] more")
    feed = {"ids": IDS, "g": G, "more": 2 * G, "W": W}
    table, found, values = marked_table(model, feed)
    assert len(found.uses) == 1
    assert values[found.ids].size == IDS.size
    np.testing.assert_allclose(table, 3 * TABLE, atol=1e-5)


def test_one_lookup_by_constant_ids_whose_rows_two_scatters_add() -> None:
    """Two layers share one table of relative positions: one Gather, and one scatter for each layer."""
    text = """
    bias (float[N, 3, 3] x, float[3, 3] g, float[3, 3] more, float[5, 3] W) => (float loss, float[5, 3] W_grad)
    <int64[3] ids = {4, 1, 4}, int64[2] size = {5, 3}, int64[3, 1] places = {4, 1, 4}>
    {
        part = Gather<axis: int = 0>(W, ids)
        h = Add(x, part)
        loss = ReduceSum<keepdims: int = 0>(h)
        zeros = ConstantOfShape(size)
        a = ScatterND<reduction: string = "add">(zeros, places, g)
        b = ScatterND<reduction: string = "add">(zeros, places, more)
        W_grad = Add(a, b)
    }
    """
    g = np.arange(9, dtype=np.float32).reshape(3, 3) + 1
    feed = {"x": np.zeros((1, 3, 3), np.float32), "g": g, "more": 2 * g, "W": W}
    table, found, values = marked_table(model_of(text, {"W": "W_grad"}), feed)
    assert len(found.uses) == 1
    np.testing.assert_array_equal(values[found.ids], [4, 1, 4])
    want = np.zeros((5, 3))
    np.add.at(want, [4, 1, 4], 3.0 * g.astype(np.float64))
    np.testing.assert_allclose(table, want, atol=1e-6)


def test_a_gradient_that_is_zero_whatever_the_batch_is_is_refused() -> None:
    """The loss reads one of two equal lookups, and the derivative is by the other one."""
    backward = """
        shape = Shape(h)
        nothing = ConstantOfShape(shape)
        step = Mul(rate, nothing)
        rows = Neg(step)
        index = Unsqueeze(ids, last)
        W_grad = ScatterND<reduction: string = "add">(zeros, index, rows)
    """
    model = training_graph(backward=backward, constants=", float rate = {0.1}")
    assert refusal(model).reason == (
        "its gradient 'W_grad' is zero whatever the batch is, so it would never be trained"
    )


def test_lookup_in_a_normalized_table_is_refused() -> None:
    forward = """
        squares = Mul(W, W)
        total = ReduceSum<keepdims: int = 1>(squares, last)
        length = Sqrt(total)
        unit = Div(W, length)
        h = Gather<axis: int = 0>(unit, ids)
    """
    backward = """
        index = Unsqueeze(ids, last)
        s = ScatterND<reduction: string = "add">(zeros, index, g)
        inner = Mul(s, unit)
        W_grad = Div(inner, length)
    """
    found = refusal(training_graph(forward, backward))
    assert found.reason == (
        "Gather 'h' looks rows up in a table that Div 'unit' computes from it, not in the parameter itself"
    )
