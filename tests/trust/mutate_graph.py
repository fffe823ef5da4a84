"""Damages to a graph: the file can still be parsed, but is no sound model."""

from __future__ import annotations

from typing import Any, Final

from mutation_parts import ODD_NUMBERS, Graph, Random, a_graph, a_node, graphs_of, names_of, odd_text
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

__all__ = ["GRAPH"]


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
    graph = a_graph(rng, model)
    for _ in range(rng.choice((1, 1, 3))):
        if graph.node:
            del graph.node[rng.randrange(len(graph.node))]


def double_node(rng: Random, model: ModelProto) -> None:
    graph = a_graph(rng, model)
    if graph.node:
        graph.node.add().CopyFrom(rng.choice(graph.node))


def shuffle_nodes(rng: Random, model: ModelProto) -> None:
    graph = a_graph(rng, model)
    nodes = list(graph.node)
    rng.shuffle(nodes)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def make_cycle(rng: Random, model: ModelProto) -> None:
    first, second = a_node(rng, model), a_node(rng, model)
    if first.input and second.output:
        first.input[rng.randrange(len(first.input))] = rng.choice(second.output)


def read_itself(rng: Random, model: ModelProto) -> None:
    node = a_node(rng, model)
    if node.input and node.output:
        node.input[rng.randrange(len(node.input))] = node.output[0]


def other_operator(rng: Random, model: ModelProto) -> None:
    node = a_node(rng, model)
    others = [*_operators(model), *(item.op_type for item in model.graph.node)]
    node.op_type = rng.choice(others)


def other_domain(rng: Random, model: ModelProto) -> None:
    a_node(rng, model).domain = rng.choice(
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
    node = a_node(rng, model)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names_of(model))


def swap_inputs(rng: Random, model: ModelProto) -> None:
    node = a_node(rng, model)
    order = list(node.input)
    rng.shuffle(order)
    node.input[:] = order


def fewer_inputs(rng: Random, model: ModelProto) -> None:
    node = a_node(rng, model)
    names = node.input if rng.random() < 0.7 else node.output
    if names:
        del names[rng.randrange(len(names)) :]


def more_inputs(rng: Random, model: ModelProto) -> None:
    node = a_node(rng, model)
    names = node.input if rng.random() < 0.7 else node.output
    names.extend(rng.choice(names_of(model)) for _ in range(rng.choice((1, 3, 200))))


def odd_names(rng: Random, model: ModelProto) -> None:
    """Give a value another name, everywhere or in one place."""
    old, new = rng.choice(names_of(model)), rng.choice((odd_text(rng), rng.choice(names_of(model))))
    everywhere = rng.random() < 0.6
    for graph in graphs_of(model.graph):
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
    a_node(rng, model).name = odd_text(rng)
    match rng.randrange(4):
        case 0:
            model.graph.name = odd_text(rng)
        case 1:
            model.producer_name = odd_text(rng)
        case 2:
            a_node(rng, model).doc_string = odd_text(rng)
        case _:
            model.metadata_props.add(key=odd_text(rng), value=odd_text(rng))


def drop_attributes(rng: Random, model: ModelProto) -> None:
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node if node.attribute]
    if nodes:
        node = rng.choice(nodes)
        del node.attribute[rng.randrange(len(node.attribute))]


def odd_attribute(rng: Random, model: ModelProto) -> None:
    """Give an attribute another value or type, or a node one that it has not."""
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node if node.attribute]
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
            a_node(rng, model),
            rng.choice(("axis", "axes", "to", "perm", "reduction", "keepdims", "")),
        )
        node.attribute.append(helper.make_attribute(name, value))


def odd_outputs(rng: Random, model: ModelProto) -> None:
    """Outputs that nothing makes, twice the same, none at all; also inputs."""
    graph = a_graph(rng, model)
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
            values.append(helper.make_tensor_value_info(rng.choice(names_of(model)), TensorProto.INT64, None))


def odd_types(rng: Random, model: ModelProto) -> None:
    """Declared types and shapes that contradict the graph, or are of another kind."""
    graph = a_graph(rng, model)
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
    body = helper.make_graph([helper.make_node("Identity", [names_of(model)[0]], ["deep"])], "leaf", [], [])
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
        model.graph.node.append(
            helper.make_node("F", [rng.choice(names_of(model))], ["looped"], domain="loop")
        )


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
    model.graph.node.append(helper.make_node("F0", [rng.choice(names_of(model))], ["grown"], domain="grow"))


def odd_functions(rng: Random, model: ModelProto) -> None:
    """A function whose body is a part of the graph, called with what fits and with what does not."""
    node = a_node(rng, model)
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
        "Expand": [rng.choice(names_of(model)), "huge_size"],
        "Range": ["huge_size", "huge_size", "huge_size"],
        "Tile": [rng.choice(names_of(model)), "huge_size"],
    }[maker]
    model.graph.node.insert(0, helper.make_node(maker, inputs, ["huge"]))
    node = a_node(rng, model)
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
