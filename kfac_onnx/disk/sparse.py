"""Sparse tensors of a model, written out as dense ones: nothing behind reads another form.

A sparse tensor of shape `dims` lists its entries that are not zero, `values` [n], with their places
`indices`: int64[n], counted through the tensor in row-major order, or int64[n, rank]. Places ascend, and none
stands twice.

Source: onnx.proto3, message SparseTensorProto.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx

from kfac_onnx.disk.wellformed import tensor_problem
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["holds_sparse", "write_out_sparse"]

LARGEST: Final = 2**31 - 2**20
"""Bytes of a dense tensor that a model file can hold; a few bytes of a sparse one may stand for more."""


def write_out_sparse(proto: onnx.ModelProto, place: str | None) -> int:
    """Replace, in place, every sparse initializer and every `sparse_value` of a Constant; return how many.

    Raises:
        UserError: if places lie outside the tensor, repeat or do not ascend, if values and places differ
            in number, or if the dense tensor is larger than a model file can be.

    """
    count = 0
    for graph in _graphs(proto):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, place))
            count += 1
        del graph.sparse_initializer[:]
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                tensor = _dense(attribute.sparse_tensor, place)
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                attribute.t.CopyFrom(tensor)
                count += 1
    return count


def holds_sparse(proto: onnx.ModelProto) -> bool:
    """Say whether there is a sparse tensor that `write_out_sparse` would replace."""
    return any(graph.sparse_initializer for graph in _graphs(proto)) or any(
        attribute.type == onnx.AttributeProto.SPARSE_TENSOR
        for node in _nodes(proto)
        for attribute in node.attribute
    )


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for training in proto.training_info:
        yield from (training.initialization, training.algorithm)
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    stack = [proto.graph.node, *(function.node for function in proto.functions)]
    for training in proto.training_info:
        stack += [training.initialization.node, training.algorithm.node]
    while stack:
        for node in stack.pop():
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g.node)
                stack.extend(graph.node for graph in attribute.graphs)


def _dense(sparse: onnx.SparseTensorProto, place: str | None) -> onnx.TensorProto:
    name, dims = sparse.values.name, list(sparse.dims)
    problem = _problem(sparse)
    if problem is not None:
        raise UserError(
            f"the ONNX model is malformed: sparse tensor '{name}' {problem}",
            place=place,
            help="export it again, or copy it again",
        )
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices).astype(np.int64)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tuple(dims))
    dense = np.zeros(math.prod(dims), values.dtype)
    dense[flat] = values
    return onnx.numpy_helper.from_array(dense.reshape(dims), name)


def _problem(sparse: onnx.SparseTensorProto) -> str | None:
    """Return what is wrong with a sparse tensor, as the end of a sentence, None if nothing is."""
    dims, values, places = list(sparse.dims), sparse.values, sparse.indices
    for tensor in (values, places):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return "keeps its data in another file, which is not supported"
        problem = tensor_problem(tensor)
        if problem is not None:
            return f"holds a part that is none: {problem}"
    if not dims or any(dim <= 0 for dim in dims):
        return f"has no shape of positive dimensions: {dims}"
    if values.data_type == onnx.TensorProto.STRING or places.data_type != onnx.TensorProto.INT64:
        return "does not hold numbers and int64 places"
    count = math.prod(values.dims)
    if list(places.dims) not in ([count], [count, len(dims)]):
        return f"of shape {dims} has {count} values, and places of shape {list(places.dims)}"
    size = math.prod(dims) * onnx.helper.tensor_dtype_to_np_dtype(values.data_type).itemsize
    if size > LARGEST:
        return f"of shape {dims} takes {size} bytes when it is written out, more than a model file can hold"
    indices = onnx.numpy_helper.to_array(places)
    if indices.ndim == 2:
        if np.any(indices < 0) or np.any(indices >= np.array(dims)):
            return f"names a place outside its shape {dims}"
        indices = np.ravel_multi_index(tuple(indices.T), tuple(dims))
    elif np.any(indices < 0) or np.any(indices >= math.prod(dims)):
        return f"names a place outside its shape {dims}"
    if np.any(np.diff(indices) <= 0):
        return "does not list its places in ascending order, each once"
    return None
