"""Ways to damage a model: functions of a random source and a model, by the level at which they cut.

Each takes `(random, bytes or ModelProto)` and changes it; what it did is its name. `bytes` mutations know nothing
of ONNX, `graph` and `tensor` mutations leave a file that a protobuf parser reads, `metadata` mutations break what
the `kfac.*` entries say, and `text` what users type.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

__all__ = ["BYTES", "GRAPH", "METADATA", "TENSOR", "damaged_bytes", "damaged_text", "odd_text"]

Random = random.Random
Graph = Callable[[Random, ModelProto], None]

ODD_TEXTS: Final = (
    "",
    " ",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "line\nbreak\r",
    "tab\there",
    "nul\x00inside",
    "../../outside",
    "/etc/passwd",
    "\u202eright to left",
    "e\u0301\u200b\ufeff",
    "\U0001f600" * 3,
    "%s%n{0}{x}[bold]",
    "x" * 5000,
    "kfac/state/A",
    "W_grad",
    "-1",
)
ODD_NUMBERS: Final = (0, 1, -1, 2, 7, -(2**31), 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def odd_text(rng: Random) -> str:
    """Return a text that no exporter writes."""
    return rng.choice(ODD_TEXTS)


# ---------------------------------------------------------------------------------------------- bytes


def _flip_bits(rng: Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_bytes(rng: Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 16))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _truncate(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _cut_out(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 100))]


def _repeat_part(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice((1, 8, 300))]


def _insert(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 32)))


def _splice(rng: Random, data: bytearray) -> None:
    """Put a part of the file over another part."""
    start, source, size = (rng.randrange(len(data)) for _ in range(3))
    data[start : start + size] = data[source : source + rng.randrange(1, size + 2)]


def _long_number(rng: Random, data: bytearray) -> None:
    """Write a varint of the largest size somewhere: as a length it points far behind the end."""
    start = rng.randrange(len(data))
    data[start : start + 1] = b"\xff" * rng.choice((4, 9, 12)) + b"\x01"


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise IndexError


def _fields(data: bytes) -> list[tuple[int, int, int]] | None:
    """Return (start, start of the content, end) of each field of a message; None if it is none."""
    at, found = 0, []
    try:
        while at < len(data):
            start = at
            tag, at = _varint(data, at)
            kind = tag & 7
            if not tag >> 3 or kind in (3, 4, 6, 7):
                return None
            body = at
            if kind == 0:
                _, at = _varint(data, at)
            elif kind == 2:
                size, body = _varint(data, at)
                at = body + size
            else:
                at += 8 if kind == 1 else 4
            if at > len(data):
                return None
            found.append((start, body, at))
    except IndexError:
        return None
    return found


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _edit_fields(rng: Random, data: bytes, depth: int = 0) -> bytes:
    """Double, drop, move or retag a field of a message, at a random depth."""
    fields = _fields(data)
    if not fields:
        return data
    start, body, end = rng.choice(fields)
    tag, after_tag = _varint(data, start)
    if tag & 7 == 2 and depth < 8 and rng.random() < 0.75 and _fields(data[body:end]):
        inner = _edit_fields(rng, data[body:end], depth + 1)
        return data[:start] + _number(tag) + _number(len(inner)) + inner + data[end:]
    field = data[start:end]
    match rng.randrange(4):
        case 0:
            return data[:end] + field * rng.choice((1, 1, 50)) + data[end:]
        case 1:
            return data[:start] + data[end:]
        case 2:
            rest = data[:start] + data[end:]
            other = rng.choice(_fields(rest) or [(0, 0, 0)])[0]
            return rest[:other] + field + rest[other:]
        case _:
            return data[:start] + _number(rng.randrange(1, 30) << 3 | tag & 7) + data[after_tag:]


def _nest(rng: Random, data: bytearray) -> None:
    """Append a graph within a node within a graph, deeper than any parser should follow.

    Fields of a message that come twice are merged, so this is added to the model's own graph.
    """
    body = b"\x12\x04leaf"  # GraphProto.name
    for _ in range(rng.choice((10, 24, 30, 33, 34, 50, 500, 5000))):
        attribute = b"\x0a\x04body\x32" + _number(len(body)) + body + b"\xa0\x01\x05"  # name, g, type = GRAPH
        node = (
            b"\x12\x01x\x22\x04Loop\x2a" + _number(len(attribute)) + attribute
        )  # output, op_type, attribute
        body = b"\x0a" + _number(len(node)) + node  # GraphProto.node
    data += b"\x3a" + _number(len(body)) + body  # ModelProto.graph


def _fields_edited(rng: Random, data: bytearray) -> None:
    data[:] = _edit_fields(rng, bytes(data))


BYTES: Final = (
    _flip_bits,
    _set_bytes,
    _truncate,
    _cut_out,
    _repeat_part,
    _insert,
    _splice,
    _long_number,
    _nest,
    *(_fields_edited,) * 8,
)


def damaged_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Return a damaged copy of a file, and what was done."""
    copy = bytearray(data)
    names = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice(BYTES)
        if copy:
            change(rng, copy)
        names.append(change.__name__.strip("_"))
    return bytes(copy), "+".join(names)


# ---------------------------------------------------------------------------------------------- graphs


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(body)


def _a_graph(rng: Random, model: ModelProto) -> GraphProto:
    return rng.choice(list(_graphs(model.graph)))


def _a_node(rng: Random, model: ModelProto) -> NodeProto:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    return rng.choice(nodes) if nodes else model.graph.node.add()


def _names(model: ModelProto) -> list[str]:
    graph = model.graph
    found = [item.name for item in (*graph.input, *graph.initializer)]
    return [*found, *(name for node in graph.node for name in node.output)] or [""]


def _operators(model: ModelProto) -> list[str]:
    return [
        "Add",
        "If",
        "Loop",
        "Scan",
        "Gather",
        "ScatterND",
        "Constant",
        "Reshape",
        "Cast",
        "NoSuchOperator",
        "",
    ]


def drop_nodes(rng: Random, model: ModelProto) -> None:
    graph = _a_graph(rng, model)
    for _ in range(rng.choice((1, 1, 3))):
        if graph.node:
            del graph.node[rng.randrange(len(graph.node))]


def double_node(rng: Random, model: ModelProto) -> None:
    graph = _a_graph(rng, model)
    if graph.node:
        graph.node.add().CopyFrom(rng.choice(graph.node))


def shuffle_nodes(rng: Random, model: ModelProto) -> None:
    graph = _a_graph(rng, model)
    nodes = list(graph.node)
    rng.shuffle(nodes)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def make_cycle(rng: Random, model: ModelProto) -> None:
    first, second = _a_node(rng, model), _a_node(rng, model)
    if first.input and second.output:
        first.input[rng.randrange(len(first.input))] = rng.choice(second.output)


def read_itself(rng: Random, model: ModelProto) -> None:
    node = _a_node(rng, model)
    if node.input and node.output:
        node.input[rng.randrange(len(node.input))] = node.output[0]


def other_operator(rng: Random, model: ModelProto) -> None:
    node = _a_node(rng, model)
    others = [*_operators(model), *(item.op_type for item in model.graph.node)]
    node.op_type = rng.choice(others)


def other_domain(rng: Random, model: ModelProto) -> None:
    _a_node(rng, model).domain = rng.choice(
        ("com.microsoft", "ai.kfac", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", odd_text(rng))
    )


def other_opset(rng: Random, model: ModelProto) -> None:
    if model.opset_import and rng.random() < 0.6:
        rng.choice(model.opset_import).version = rng.choice((*range(1, 26), *ODD_NUMBERS))
    elif model.opset_import and rng.random() < 0.5:
        del model.opset_import[rng.randrange(len(model.opset_import))]
    else:
        model.opset_import.add(domain=rng.choice(("", "com.microsoft", odd_text(rng))), version=1)
    if rng.random() < 0.2:
        model.ir_version = rng.choice(ODD_NUMBERS)


def rewire(rng: Random, model: ModelProto) -> None:
    node = _a_node(rng, model)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(model))


def swap_inputs(rng: Random, model: ModelProto) -> None:
    node = _a_node(rng, model)
    order = list(node.input)
    rng.shuffle(order)
    node.input[:] = order


def fewer_inputs(rng: Random, model: ModelProto) -> None:
    node = _a_node(rng, model)
    names = node.input if rng.random() < 0.7 else node.output
    if names:
        del names[rng.randrange(len(names)) :]


def more_inputs(rng: Random, model: ModelProto) -> None:
    node = _a_node(rng, model)
    names = node.input if rng.random() < 0.7 else node.output
    names.extend(rng.choice(_names(model)) for _ in range(rng.choice((1, 3, 200))))


def odd_names(rng: Random, model: ModelProto) -> None:
    """Give a value another name, everywhere or in one place."""
    old, new = rng.choice(_names(model)), rng.choice((odd_text(rng), rng.choice(_names(model))))
    everywhere = rng.random() < 0.6
    for graph in _graphs(model.graph):
        for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            if item.name == old and (everywhere or rng.random() < 0.3):
                item.name = new
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old and (everywhere or rng.random() < 0.3):
                        names[index] = new


def odd_labels(rng: Random, model: ModelProto) -> None:
    """Names of nodes, graphs, producers and documentation."""
    _a_node(rng, model).name = odd_text(rng)
    match rng.randrange(4):
        case 0:
            model.graph.name = odd_text(rng)
        case 1:
            model.producer_name = odd_text(rng)
        case 2:
            _a_node(rng, model).doc_string = odd_text(rng)
        case _:
            model.metadata_props.add(key=odd_text(rng), value=odd_text(rng))


def drop_attributes(rng: Random, model: ModelProto) -> None:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node if node.attribute]
    if nodes:
        node = rng.choice(nodes)
        del node.attribute[rng.randrange(len(node.attribute))]


def odd_attribute(rng: Random, model: ModelProto) -> None:
    """Give an attribute another value or type, or a node one that it has not."""
    nodes = [node for graph in _graphs(model.graph) for node in graph.node if node.attribute]
    value: Any = rng.choice(
        (
            rng.choice(ODD_NUMBERS),
            rng.choice((1.5, float("nan"), 1e38)),
            odd_text(rng),
            [rng.choice(ODD_NUMBERS) for _ in range(rng.choice((1, 2, 9)))],
            [1.0, float("inf")],
            ["a", odd_text(rng)],
            helper.make_tensor("t", TensorProto.INT64, [2], [5, 3]),
            helper.make_tensor("t", TensorProto.FLOAT, [], [1.0]),
            helper.make_graph([], "empty", [], []),
        )
    )
    if nodes and rng.random() < 0.8:
        node = rng.choice(nodes)
        index = rng.randrange(len(node.attribute))
        name = node.attribute[index].name
        if rng.random() < 0.2:
            node.attribute[index].type = rng.choice(list(AttributeProto.AttributeType.values()))
            return
        if rng.random() < 0.4 and isinstance(value, int):
            node.attribute[index].i = value
            return
        node.attribute[index].CopyFrom(helper.make_attribute(name, value))
    else:
        node, name = (
            _a_node(rng, model),
            rng.choice(("axis", "axes", "to", "perm", "reduction", "keepdims", "")),
        )
        node.attribute.append(helper.make_attribute(name, value))


def odd_outputs(rng: Random, model: ModelProto) -> None:
    """Outputs that nothing makes, twice the same, none at all; also inputs."""
    graph = _a_graph(rng, model)
    values = graph.output if rng.random() < 0.6 else graph.input
    match rng.randrange(5):
        case 0:
            values.append(helper.make_tensor_value_info(odd_text(rng), TensorProto.FLOAT, [1]))
        case 1 if values:
            values.add().CopyFrom(rng.choice(values))
        case 2:
            del values[:]
        case 3 if values:
            rng.choice(values).ClearField("type")
        case _:
            values.append(helper.make_tensor_value_info(rng.choice(_names(model)), TensorProto.INT64, None))


def odd_types(rng: Random, model: ModelProto) -> None:
    """Declared types and shapes that contradict the graph, or are of another kind."""
    graph = _a_graph(rng, model)
    infos = [*graph.input, *graph.output, *graph.value_info]
    if not infos:
        return
    info = rng.choice(infos)
    tensor = info.type.tensor_type
    match rng.randrange(6):
        case 0:
            tensor.elem_type = rng.choice((*range(24), 99, -1))
        case 1 if tensor.shape.dim:
            rng.choice(tensor.shape.dim).dim_value = rng.choice(ODD_NUMBERS)
        case 2 if tensor.shape.dim:
            rng.choice(tensor.shape.dim).dim_param = odd_text(rng)
        case 3:
            tensor.shape.dim.add(dim_value=rng.choice(ODD_NUMBERS))
        case 4:
            info.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
        case _:
            del tensor.shape.dim[:]


def nest_deeply(rng: Random, model: ModelProto) -> None:
    """Wrap a new branch around itself, many times."""
    kind = rng.choice(("If", "Loop"))
    body = helper.make_graph([helper.make_node("Identity", [_names(model)[0]], ["deep"])], "leaf", [], [])
    body.output.append(helper.make_tensor_value_info("deep", TensorProto.FLOAT, None))
    for level in range(rng.choice((3, 12, 20, 26))):
        name = f"deep{level}"
        if kind == "If":
            node = helper.make_node(
                "If", ["deep_condition"], [name], then_branch=body, else_branch=GraphProto()
            )
        else:
            node = helper.make_node("Loop", ["", "deep_condition"], [name], body=body)
        body = helper.make_graph(
            [node], f"level{level}", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )
    model.graph.node.extend(body.node)
    model.graph.initializer.append(helper.make_tensor("deep_condition", TensorProto.BOOL, [], [True]))


def recursive_functions(rng: Random, model: ModelProto) -> None:
    """Functions that call themselves or each other, and a node that calls one."""
    names = ["F", "G", "H"][: rng.randrange(1, 4)]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("loop", 1)]
    for index, name in enumerate(names):
        callee = names[(index + 1) % len(names)]
        call = helper.make_node(callee, ["x"], ["y"], domain="loop")
        model.functions.append(helper.make_function("loop", name, ["x"], ["y"], [call], imports))
    model.opset_import.append(helper.make_opsetid("loop", 1))
    if rng.random() < 0.8:
        model.graph.node.append(helper.make_node("F", [rng.choice(_names(model))], ["looped"], domain="loop"))


def growing_functions(rng: Random, model: ModelProto) -> None:
    """Functions that each call the next twice: inlined, they would be 2^n nodes."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("grow", 1)]
    depth = rng.choice((4, 12, 24, 40))
    for level in range(depth):
        calls = [
            helper.make_node(f"F{level + 1}", ["x"], ["m"], domain="grow"),
            helper.make_node(f"F{level + 1}", ["m"], ["y"], domain="grow"),
        ]
        model.functions.append(helper.make_function("grow", f"F{level}", ["x"], ["y"], calls, imports))
    last = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("grow", f"F{depth}", ["x"], ["y"], last, imports))
    model.opset_import.append(helper.make_opsetid("grow", 1))
    model.graph.node.append(helper.make_node("F0", [rng.choice(_names(model))], ["grown"], domain="grow"))


def odd_functions(rng: Random, model: ModelProto) -> None:
    """A function whose body is a part of the graph, called with what fits and with what does not."""
    node = _a_node(rng, model)
    body = NodeProto.FromString(node.SerializeToString())
    inputs, outputs = [name for name in body.input if name], [name for name in body.output if name]
    if rng.random() < 0.3 and inputs:
        inputs.pop()
    opset = [helper.make_opsetid("", rng.choice((1, 13, 18, 21)))]
    model.functions.append(helper.make_function("own", "Part", inputs, outputs, [body], opset))
    if rng.random() < 0.2:
        model.functions.add().CopyFrom(model.functions[-1])
    if rng.random() < 0.8:
        model.opset_import.append(helper.make_opsetid("own", 1))
    node.domain, node.op_type = "own", "Part"
    if rng.random() < 0.7:
        del node.attribute[:]


def no_graph(rng: Random, model: ModelProto) -> None:
    model.ClearField(rng.choice(("graph", "opset_import", "ir_version")))


def empty_graph(rng: Random, model: ModelProto) -> None:
    for field in rng.sample(("node", "input", "output", "initializer"), rng.randrange(1, 5)):
        model.graph.ClearField(field)


def huge_loops(rng: Random, model: ModelProto) -> None:
    """A constant that asks for more memory than there is, read by the graph."""
    size = rng.choice(([2**40], [2**31, 2**31], [2**62], [-1], [10**6, 10**6]))
    model.graph.initializer.append(helper.make_tensor("huge_size", TensorProto.INT64, [len(size)], size))
    maker = rng.choice(("ConstantOfShape", "Expand", "Range", "Tile"))
    inputs = {
        "ConstantOfShape": ["huge_size"],
        "Expand": [rng.choice(_names(model)), "huge_size"],
        "Range": ["huge_size", "huge_size", "huge_size"],
        "Tile": [rng.choice(_names(model)), "huge_size"],
    }[maker]
    model.graph.node.insert(0, helper.make_node(maker, inputs, ["huge"]))
    node = _a_node(rng, model)
    if node.input and rng.random() < 0.7:
        node.input[rng.randrange(len(node.input))] = "huge"


GRAPH: Final[tuple[Graph, ...]] = (
    drop_nodes,
    double_node,
    shuffle_nodes,
    make_cycle,
    read_itself,
    other_operator,
    other_domain,
    other_opset,
    rewire,
    rewire,
    swap_inputs,
    fewer_inputs,
    more_inputs,
    odd_names,
    odd_names,
    odd_labels,
    drop_attributes,
    odd_attribute,
    odd_attribute,
    odd_outputs,
    odd_types,
    odd_types,
    nest_deeply,
    recursive_functions,
    growing_functions,
    odd_functions,
    no_graph,
    empty_graph,
    huge_loops,
)


# --------------------------------------------------------------------------------------------- tensors


def _tensors(model: ModelProto) -> list[TensorProto]:
    found = []
    for graph in _graphs(model.graph):
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
            rng.choice(initializers).name = rng.choice(_names(model))


def sparse(rng: Random, model: ModelProto) -> None:
    item = model.graph.sparse_initializer.add()
    item.values.CopyFrom(helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0]))
    item.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [rng.choice(ODD_NUMBERS)]))
    item.dims.append(rng.choice(ODD_NUMBERS))
    if rng.random() < 0.5:
        _a_node(rng, model).input.append("sparse")


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


# -------------------------------------------------------------------------------------------- metadata


def _odd_json(rng: Random) -> Any:
    return rng.choice(
        (
            None,
            True,
            0,
            -1,
            2**70,
            1e308,
            float("nan"),
            [],
            {},
            [[]],
            "\ud800",
            odd_text(rng),
            {"x": [1]},
            "parameter",
        )
    )


def _edit_json(rng: Random, value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if rng.random() < 0.05:
            return {**value, odd_text(rng): _odd_json(rng)}
        return {**value, key: _edit_json(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return [*value, value[index]]
            case _:
                return [*value[:index], _edit_json(rng, value[index], depth + 1), *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(ODD_NUMBERS)
    if isinstance(value, str) and rng.random() < 0.4:
        return value[:-1] if rng.random() < 0.5 else odd_text(rng)
    return _odd_json(rng)


def edit_entry(rng: Random, model: ModelProto) -> None:
    """Change one value inside the JSON of an entry."""
    entries = [item for item in model.metadata_props if item.key.startswith("kfac.")]
    if not entries:
        model.metadata_props.add(key="kfac.step", value=json.dumps(_odd_json(rng)))
        return
    entry = rng.choice(entries)
    try:
        data = json.loads(entry.value)
    except (ValueError, RecursionError):
        entry.value = odd_text(rng)
        return
    entry.value = json.dumps(_edit_json(rng, data))


def break_entry(rng: Random, model: ModelProto) -> None:
    """Make an entry something that is not JSON, or JSON without end."""
    entries = [item for item in model.metadata_props if item.key.startswith("kfac.")]
    if not entries:
        model.metadata_props.add(key="kfac.sites", value=odd_text(rng))
        return
    rng.choice(entries).value = rng.choice(
        (odd_text(rng), "[" * 100_000, '{"a":' * 5000, "NaN", "1" * 5000, "{}", "[]", "null", '"x"')
    )


def drop_entry(rng: Random, model: ModelProto) -> None:
    entries = model.metadata_props
    if entries:
        del entries[rng.randrange(len(entries))]


def double_entry(rng: Random, model: ModelProto) -> None:
    if model.metadata_props:
        model.metadata_props.add().CopyFrom(rng.choice(model.metadata_props))


def swap_entries(rng: Random, model: ModelProto) -> None:
    if len(model.metadata_props) > 1:
        first, second = rng.sample(list(model.metadata_props), 2)
        first.value, second.value = second.value, first.value


def odd_marks(rng: Random, model: ModelProto) -> None:
    """Break the marks on nodes: phase, site, pass."""
    marked = [node for node in model.graph.node if node.metadata_props]
    if marked:
        rng.choice(rng.choice(marked).metadata_props).value = rng.choice(
            (odd_text(rng), "commit", "gradients", "refresh", "undo", "select")
        )


METADATA: Final[tuple[Graph, ...]] = (
    edit_entry,
    edit_entry,
    edit_entry,
    edit_entry,
    break_entry,
    drop_entry,
    double_entry,
    swap_entries,
    odd_marks,
)


# ------------------------------------------------------------------------------------------------ text


def damaged_text(rng: Random, text: str) -> str:
    """Return a pipeline or a name with a few characters changed, repeated or put in."""
    pieces = (
        "{",
        "}",
        "[",
        "]",
        ",",
        "=",
        '"',
        "\\",
        "\x00",
        "\x1b[2J",
        "é",
        "\u202e",
        " ",
        "\n",
        "1e999",
        "nan",
        "-1",
    )
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:at] + rng.choice(pieces) + text[at:]
            case 1:
                text = text[:at] + text[at + rng.choice((1, 5)) :]
            case 2:
                text = text[:at] + text[at : at + 20] * rng.choice((2, 30)) + text[at:]
            case _:
                text = text[:at] + rng.choice(pieces) * rng.choice((1, 100, 3000)) + text[at:]
    return text


def parsed(data: bytes) -> ModelProto:
    """Return the model in the bytes."""
    return onnx.ModelProto.FromString(data)
