from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.values import carrying, constant, dtype_of, rank_of, static_shape
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPHS = Path(__file__).parent.parent / "data" / "graphs"


def test_types_follow_from_the_producers(build: Callable[[str], ir.Model]) -> None:
    model = build("""<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float16[n,4] x, bool[n,4] m, int64[n] i) => (float16[n,4] y) {
            half = com.microsoft.Unknown (x)
            ids = Shape (half)
            same = Where (m, half, x)
            bits = Equal (half, x)
            wide = Cast <to = 1> (half)
            zeros = ConstantOfShape (ids)
            numbers = ConstantOfShape <value = int32[1] {7}> (ids)
            texts = Constant <value_ints = [1, 2]> ()
            rows = com.microsoft.GatherGrad (ids, i, wide)
            out, mask = Dropout (half)
            like = CastLike (wide, half)
            y = Identity (like)
        }""")
    values = {value.name: value for node in model.graph for value in node.outputs}
    for value in values.values():
        value.type = None
    found = {name: dtype_of(value) for name, value in values.items()}
    half, wide, whole, truth = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
    assert found == {
        "half": half,
        "ids": whole,
        "same": half,
        "bits": truth,
        "wide": wide,
        "zeros": wide,
        "numbers": ir.DataType.INT32,
        "texts": whole,
        "rows": wide,
        "out": half,
        "mask": truth,
        "like": half,
        "y": half,
    }
    assert values["same"].type is None, "nothing is written into the model"
    assert dtype_of(None) is None


def test_shapes_and_constants(build: Callable[[str], ir.Model]) -> None:
    model = build("""<ir_version: 10, opset_import: ["" : 18]>
        g (float[n,4] x, float[2] d) => (float[n,4] y) <float[2] k = {1, 2}, float[2] d = {3, 4}> {
            a = Identity (k)
            b = Identity (a)
            c = Constant <value = float[1] {5}> ()
            y = Add (x, c)
        }""")
    values = {value.name: value for node in model.graph for value in node.outputs}
    inputs = {value.name: value for value in model.graph.inputs}
    assert static_shape(inputs["x"]) is None
    assert rank_of(inputs["x"]) == 2
    assert static_shape(model.graph.initializers["k"]) == (2,)
    assert static_shape(None) is None
    assert rank_of(None) is None
    np.testing.assert_array_equal(constant(values["b"]), [1, 2])
    np.testing.assert_array_equal(constant(values["c"]), [5])
    assert constant(values["y"]) is None
    assert constant(inputs["d"]) is None, "an input's default may be overridden"


@pytest.mark.parametrize(
    "name",
    [
        "ortart_dyncore__lookup_index",
        "ortart_dynloss__gpt_untied",
        "ortart_legloss__lstm_lm",
        "torchjoint_init__nplm",
    ],
)
def test_a_graph_that_says_no_shapes_is_read_as_well(
    name: str,
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    """The shapes of inner values are optional in a file; here they have all been removed."""
    proto = onnx.load(GRAPHS / f"{name}.onnx")
    known = read_training_graph(proto)
    del proto.graph.value_info[:]
    model = read_training_graph(proto)
    with np.load(GRAPHS / f"{name}.npz") as arrays:
        feeds = {str(value.name): arrays[f"in:{value.name}"] for value in model.graph.inputs}
    results, expected = run(model, feeds), run(known, feeds)
    assert list(results) == list(expected)
    assert len(metadata.read_list(model, "parameters", metadata.Parameter)) == len(results) - 1
    for output, array in expected.items():
        check(results[output], array, 2e-6)  # float32, in another order of summation at most


def test_the_type_of_another_domains_cast_is_not_known(build: Callable[[str], ir.Model]) -> None:
    model = build("""<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[n] x) => (float[n] y) {
            cast = com.microsoft.Cast (x)
            y = Identity (cast)
        }""")
    cast = next(iter(model.graph)).outputs[0]
    cast.type = None
    assert dtype_of(cast) is None


@pytest.mark.parametrize("damage", ["axis", "flag"])
def test_damaged_training_operators_are_a_sentence(damage: str, tmp_path: Path) -> None:
    model = onnx.load(GRAPHS / "ortart_dyncore__nplm.onnx")
    if damage == "axis":
        node = next(node for node in model.graph.node if node.op_type == "GatherGrad")
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("axis", 7))
    else:
        node = next(node for node in model.graph.node if node.op_type == "InPlaceAccumulatorV2")
        model.graph.node.append(onnx.helper.make_node("Not", [node.output[0]], ["read"]))
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(UserError):
        read_training_graph(tmp_path / "damaged.onnx")


def test_a_gradient_passes_through_what_is_quantized_and_through_no_other_integers(
    build: Callable[[str], ir.Model],
) -> None:
    model = build("""<ir_version: 10, opset_import: ["" : 20]>
        g (int64[n] ids, float[n] x) => (float l)
        <float[3,2] emb = {1,2,3,4,5,6}, float[3,2] other = {1,2,3,4,5,6}, float sc = {0.1}, int8 zp = {0},
         int8[3,2] weights = {1,2,3,4,5,6}, float[3] logits = {1,2,3}> {
            q = QuantizeLinear (emb, sc, zp)
            rows = Gather (q, ids)
            e = DequantizeLinear (rows, sc, zp)
            frozen = Gather (weights, ids)
            f = DequantizeLinear (frozen, sc, zp)
            cut = Cast <to = 7> (logits)
            c = Gather (other, cut)
            a = Add (e, f)
            s = ReduceSum <keepdims = 0> (a)
            r = ReduceSum <keepdims = 0> (c)
            l = Add (s, r)
        }""")
    names = {value.name for value in carrying(model.graph.outputs)}
    assert {"emb", "q", "rows", "e", "other"} <= names
    assert names.isdisjoint({"ids", "zp", "weights", "cut", "logits"})
