"""Damages to tensors: their shapes, types and data, also in other files."""

from __future__ import annotations

from typing import Final

from mutation_parts import ODD_NUMBERS, Graph, Random, a_node, graphs_of, names_of, odd_text
from onnx import ModelProto, TensorProto, helper

__all__ = ["TENSOR"]


def _tensors(model: ModelProto) -> list[TensorProto]:
    found = []
    for graph in graphs_of(model.graph):
        found += graph.initializer
        for node in graph.node:
            found += [item.t for item in node.attribute if item.HasField("t")]
    return found


def _a_tensor(rng: Random, model: ModelProto) -> TensorProto:
    found = _tensors(model)
    return rng.choice(found) if found else model.graph.initializer.add()


def odd_dims(rng: Random, model: ModelProto) -> None:
    tensor = _a_tensor(rng, model)
    match rng.randrange(4):
        case 0 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(ODD_NUMBERS)
        case 1:
            tensor.dims.append(rng.choice(ODD_NUMBERS))
        case 2:
            del tensor.dims[:]
        case _:
            tensor.dims[:] = [2**20] * rng.choice((2, 3, 60))


def odd_data(rng: Random, model: ModelProto) -> None:
    """Raw data of another length, in the wrong field, in two fields, or none."""
    tensor = _a_tensor(rng, model)
    match rng.randrange(5):
        case 0:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case 1:
            tensor.raw_data = tensor.raw_data + b"\xff" * rng.choice((1, 3, 8))
        case 2:
            tensor.float_data.extend([1.0, float("nan")])
        case 3:
            tensor.int64_data.extend(rng.choice(ODD_NUMBERS) for _ in range(3))
        case _:
            tensor.ClearField("raw_data")


def odd_values(rng: Random, model: ModelProto) -> None:
    """Integers that mean sizes, axes and ids, set to numbers that are none."""
    small = [
        t
        for t in _tensors(model)
        if t.data_type in (TensorProto.INT64, TensorProto.INT32) and len(t.raw_data) >= 4
    ]
    if not small:
        return
    tensor = rng.choice(small)
    width = 8 if tensor.data_type == TensorProto.INT64 else 4
    value = rng.choice(ODD_NUMBERS) % 2 ** (8 * width)
    place = rng.randrange(max(1, len(tensor.raw_data) // width)) * width
    data = bytearray(tensor.raw_data)
    data[place : place + width] = value.to_bytes(width, "little")
    tensor.raw_data = bytes(data)


def odd_dtype(rng: Random, model: ModelProto) -> None:
    _a_tensor(rng, model).data_type = rng.choice((*range(26), 99, -1, 2**31 - 1))


def strings(rng: Random, model: ModelProto) -> None:
    tensor = _a_tensor(rng, model)
    name = tensor.name
    tensor.CopyFrom(helper.make_tensor(name, TensorProto.STRING, [2], [b"a\xff", odd_text(rng).encode()]))


def odd_tensor_names(rng: Random, model: ModelProto) -> None:
    initializers = model.graph.initializer
    if not initializers:
        return
    match rng.randrange(3):
        case 0:
            rng.choice(initializers).name = odd_text(rng)
        case 1:
            initializers.add().CopyFrom(rng.choice(initializers))
        case _:
            rng.choice(initializers).name = rng.choice(names_of(model))


def sparse(rng: Random, model: ModelProto) -> None:
    item = model.graph.sparse_initializer.add()
    item.values.CopyFrom(helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0]))
    item.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [rng.choice(ODD_NUMBERS)]))
    item.dims.append(rng.choice(ODD_NUMBERS))
    if rng.random() < 0.5:
        a_node(rng, model).input.append("sparse")


LOCATIONS: Final = (
    "weights.bin",
    "missing.bin",
    "../outside.bin",
    "OUTSIDE",
    "link.bin",
    "folder/link/outside.bin",
    "./weights.bin",
    "folder/../../outside.bin",
    "",
    ".",
    "folder",
    "model.onnx",
    "nul\x00byte",
    "x" * 5000,
    "\\\\server\\share\\outside.bin",
    "/dev/zero",
    "/etc/passwd",
)
"""Where external data is said to lie; `OUTSIDE` stands for the absolute path of a file outside the folder."""


def external(rng: Random, model: ModelProto) -> None:
    """External data in and outside of the folder, with odd offsets and lengths."""
    tensor = _a_tensor(rng, model)
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    entries = {"location": rng.choice(LOCATIONS)}
    if rng.random() < 0.6:
        entries["offset"] = rng.choice(("0", "16", "-1", "x", "", "99999999999999999999", "1e3", str(2**62)))
    if rng.random() < 0.6:
        entries["length"] = rng.choice(("0", "4", "-4", "x", "99999999999999999999", str(2**62)))
    if rng.random() < 0.2:
        entries[odd_text(rng)] = odd_text(rng)
    for key, value in entries.items():
        if key == "location" and rng.random() < 0.05:
            continue
        tensor.external_data.add(key=key, value=value)


TENSOR: Final[tuple[Graph, ...]] = (
    odd_dims,
    odd_data,
    odd_values,
    odd_values,
    odd_dtype,
    strings,
    odd_tensor_names,
    sparse,
    external,
    external,
    external,
)
