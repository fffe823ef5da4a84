"""Writes a model whose weights are not in memory: its bytes go to the file as they come.

A protobuf message may give a field of a message in parts, which a reader merges: what is given of `graph`
first (everything but its initializers) and afterwards (each initializer) is one graph. An initializer's
`raw_data` is the last of its fields, so that its bytes follow a head of a few bytes.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.disk.mapped import MappedTensor, is_mappable, pieces_of

if TYPE_CHECKING:
    from typing import BinaryIO

    import onnx
    import onnx_ir as ir

__all__ = ["holds_mapped", "write_external", "write_inline"]

_BYTES: Final = 2
"""The wire type of what has a length."""
_GRAPH: Final = 7
_INITIALIZER: Final = 5
_RAW_DATA: Final = 9
_ALIGNMENT: Final = 4096
"""Bytes: where a tensor begins in a data file, so that a page holds rows of one table alone."""


def holds_mapped(model: ir.Model) -> bool:
    """Say whether weights of a model lie in files."""
    return any(isinstance(value.const_value, MappedTensor) for value in model.graph.initializers.values())


def write_inline(model: ir.Model, file: BinaryIO) -> None:
    """Write a model with its weights in the one file, which must stay below 2 GB."""
    proto, large = _outline(model)
    initializers = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    heads: list[bytes] = []
    tensors: list[ir.TensorProtocol | None] = []
    total = 0
    for item in initializers:
        tensor, head = large.get(item.name), item.SerializeToString()
        if tensor is not None:
            head += _key(_RAW_DATA) + _varint(tensor.nbytes)
        size = len(head) + (0 if tensor is None else tensor.nbytes)
        head = _key(_INITIALIZER) + _varint(size) + head
        total += len(head) + (0 if tensor is None else tensor.nbytes)
        heads.append(head)
        tensors.append(tensor)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    file.write(proto.SerializeToString() + _key(_GRAPH) + _varint(len(graph) + total) + graph)
    for head, tensor in zip(heads, tensors, strict=True):
        file.write(head)
        for piece in () if tensor is None else pieces_of(tensor):
            file.write(piece)


def write_external(model: ir.Model, file: BinaryIO, data: BinaryIO, location: str) -> None:
    """Write a model, and the weights that `write_inline` would stream to a file of this name beside it."""
    import onnx

    proto, large = _outline(model)
    place = 0
    for item in proto.graph.initializer:
        if (tensor := large.get(item.name)) is None:
            continue
        place += -place % _ALIGNMENT
        data.seek(place)
        for piece in pieces_of(tensor):
            data.write(piece)
        item.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", place), ("length", tensor.nbytes)):
            item.external_data.add(key=key, value=str(value))
        place += tensor.nbytes
    file.write(proto.SerializeToString())


def _outline(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """Return a model without the contents of its large initializers, and these by name."""
    import numpy as np
    import onnx_ir as ir

    large: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and is_mappable(int(tensor.dtype), tensor.nbytes):
            large[name] = tensor
            value.const_value = ir.tensor(np.zeros(0, np.uint8), name=name)
    try:
        proto = ir.to_proto(model)
    finally:
        for name, tensor in large.items():
            model.graph.initializers[name].const_value = tensor
    for item in proto.graph.initializer:
        if (tensor := large.get(item.name)) is None:
            continue
        item.ClearField("raw_data")
        item.data_type = int(tensor.dtype)
        item.dims[:] = [int(size) for size in tensor.shape.numpy()]
        if tensor.doc_string:
            item.doc_string = tensor.doc_string
        for key, text in tensor.metadata_props.items():
            item.metadata_props.add(key=key, value=text)
    return proto, large


def _key(field: int) -> bytes:
    return _varint(field << 3 | _BYTES)


def _varint(number: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first; the last alone has its eighth bit clear."""
    groups: list[int] = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
