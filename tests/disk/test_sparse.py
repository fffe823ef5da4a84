"""Sparse tensors of a model are read as the dense ones that they stand for, or refused for what is wrong."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import Parameter

TABLE = np.zeros((11, 4), np.float32)
TABLE[[0, 3, 3, 10], [1, 0, 2, 3]] = [0.5, -1.0, 2.0, 0.25]


def sparse(
    values: list[float], places: np.ndarray, dims: tuple[int, ...] = (11, 4)
) -> onnx.SparseTensorProto:
    return onnx.helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(np.array(values, np.float32), "emb"),
        onnx.numpy_helper.from_array(places.astype(np.int64), "emb_places"),
        dims,
    )


def model_of(tensor: onnx.SparseTensorProto, *, node: bool = False) -> onnx.ModelProto:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        g (int64[b, 5] ids, float[11, 4] emb) => (float[b, 4] z) <int64[1] ax = {1}> {
            e = Gather(emb, ids) z = ReduceMean<keepdims: int = 0>(e, ax)
        }""")
    del model.graph.input[1]
    if node:
        made = onnx.helper.make_node("Constant", [], ["emb"], sparse_value=tensor)
        model.graph.node.insert(0, made)
    else:
        model.graph.sparse_initializer.append(tensor)
    return model


LINEAR = np.flatnonzero(TABLE)
PAIRS = np.stack(np.nonzero(TABLE), axis=1)


@pytest.mark.parametrize("node", [False, True], ids=["initializer", "constant"])
@pytest.mark.parametrize("places", [LINEAR, PAIRS], ids=["linear", "pairs"])
def test_a_sparse_table_is_trained(places: np.ndarray, node: bool) -> None:
    model = model_of(sparse([0.5, -1.0, 2.0, 0.25], places), node=node)
    before = model.SerializeToString()
    made = kx.differentiate(model)
    assert [item.name for item in metadata.read_list(made, "parameters", Parameter)] == ["emb"]
    tensor = made.graph.initializers["emb"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), TABLE)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (sparse([1.0], np.array([44])), "names a place outside its shape [11, 4]"),
        (sparse([1.0], np.array([[0, 4]])), "names a place outside its shape [11, 4]"),
        (sparse([1.0, 2.0], np.array([3, 3])), "does not list its places in ascending order, each once"),
        (sparse([1.0, 2.0], np.array([1])), "of shape [11, 4] has 2 values, and places of shape [1]"),
        (
            sparse([1.0], np.array([0]), (2**31, 2**31)),
            "of shape [2147483648, 2147483648] takes 18446744073709551616 bytes when it is written out, more "
            "than a model file can hold",
        ),
        (sparse([1.0], np.array([0]), (0, 4)), "has no shape of positive dimensions: [0, 4]"),
    ],
    ids=["outside", "outside-pair", "twice", "counts", "huge", "empty"],
)
def test_a_sparse_tensor_that_is_none_is_refused(tensor: onnx.SparseTensorProto, reason: str) -> None:
    with pytest.raises(UserError) as error:
        kx.differentiate(model_of(tensor))
    assert error.value.message == f"the ONNX model is malformed: sparse tensor 'emb' {reason}"
    assert error.value.help == "export it again, or copy it again"
