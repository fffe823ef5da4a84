"""Random training graphs for property tests, and the same graph in other words.

A `Recipe` says what a graph looks up and how: it is what hypothesis draws. `training_graph` writes it as an ONNX
model: the forward part is differentiated as far as to the looked-up rows, from there on the gradient of each
table is written by hand in one of the exporters' styles. `scrambled` rewrites a model without changing what it
computes: another opset, another order of nodes, other names of inner values, more decoys.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from kfac_onnx.autodiff import differentiate
from kfac_onnx.readers import read_forward_graph

__all__ = ["Recipe", "Table", "Use", "recipes", "scrambled", "training_graph"]

TIMES, OUTPUTS = 3, 2
"""Ids of one example in each lookup, and entries of a prediction."""

VIEWS = ("", "Identity", "Transpose", "Reshape", "scale", "Cast")
READERS = ("Gather", "GatherND", "GatherElements", "one-hot")
CHAINS = ("", "int32", "Reshape", "offset", "Clip", "wrap", "Unsqueeze")
AFTER = ("", "Tanh", "mask", "matmul", "scale")
STYLES = ("elements", "nd", "masked", "one-hot", "padding")
DECOYS = ("frozen", "activations", "labels", "shape")


@dataclass(frozen=True)
class Use:
    """One lookup: how the ids come about, which operator reads, what becomes of the rows, who scatters."""

    reader: str
    ids: str
    after: str
    style: str


@dataclass(frozen=True)
class Table:
    """A table [V, D], the view that all its lookups read through, and these."""

    size: int
    width: int
    view: str
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Recipe:
    """A whole graph; `seed` makes its weights and batches."""

    tables: tuple[Table, ...]
    join: str
    reduction: str
    decoys: frozenset[str] = frozenset()
    seed: int = 0

    def padding_idx(self, table: int) -> int | None:
        """Return the row that the written gradient of a table leaves out."""
        styles = [use.style for use in self.tables[table].uses]
        return 0 if "padding" in styles else None

    def batch(self, examples: int, seed: int) -> dict[str, np.ndarray]:
        """Return a batch with repeated ids, in the range that each chain of ids takes."""
        rng = np.random.default_rng([self.seed, seed])
        feed: dict[str, np.ndarray] = {}
        for t, table in enumerate(self.tables):
            for u, use in enumerate(table.uses):
                ids = rng.integers(0, table.size, (examples, TIMES))
                if use.ids == "offset":
                    ids = ids + 1
                elif use.ids == "Clip":
                    ids = rng.integers(-2, table.size + 2, (examples, TIMES))
                elif use.ids == "wrap":
                    ids = np.where(rng.random(ids.shape) < 0.5, ids - table.size, ids)
                feed[f"ids_{t}_{u}"] = ids.astype(np.int32 if use.ids == "int32" else np.int64)
        feed["target"] = rng.standard_normal((examples, OUTPUTS)).astype(np.float32)
        if "labels" in self.decoys:
            feed["labels"] = rng.integers(0, OUTPUTS, examples)
        return feed


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a recipe: one or two tables, each with one to three uses that agree about padding."""
    tables = []
    for _ in range(draw(st.integers(1, 2))):
        styles = draw(st.sampled_from([STYLES[:-1], STYLES[-1:]]))
        one_use = st.builds(
            Use,
            st.sampled_from(READERS),
            st.sampled_from(CHAINS),
            st.sampled_from(AFTER),
            st.sampled_from(styles),
        )
        uses = draw(st.lists(one_use, min_size=1, max_size=3))
        tables.append(
            Table(draw(st.integers(4, 9)), draw(st.integers(2, 5)), draw(st.sampled_from(VIEWS)), tuple(uses))
        )
    return Recipe(
        tuple(tables),
        draw(st.sampled_from(["Concat", "Add"])),
        draw(st.sampled_from(["mean", "sum"])),
        draw(st.frozensets(st.sampled_from(DECOYS))),
        draw(st.integers(0, 1000)),
    )


@dataclass
class _Writer:
    """Nodes, constants and inputs of a graph, with numbered values."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    made: int = 0

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        self.made += 1
        name = output or f"{op_type.lower()}_{self.made}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"n{self.made}", **attributes))
        return name

    def constant(self, values: object, dtype: type = np.int64) -> str:
        self.made += 1
        name = f"c_{self.made}"
        self.weights[name] = np.array(values, dtype)
        return name

    def input(self, name: str, kind: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name


@dataclass
class _Lookup:
    """What the gradient of a lookup needs: its ids [N, T], and its rows [N, T, D] as they were read."""

    use: Use
    ids: str
    rows: str


def _view(w: _Writer, table: Table, name: str) -> str:
    """Return the table as [V, D]."""
    V, D = table.size, table.width
    match table.view:
        case "Transpose":
            return w.op("Transpose", name, perm=[1, 0])
        case "Reshape":
            return w.op("Reshape", name, w.constant([V, D]))
        case "scale":
            return w.op("Mul", name, w.constant(1.5, np.float32))
        case "Cast":
            return w.op("Cast", name, to=TensorProto.FLOAT)
        case "Identity":
            return w.op("Identity", name)
        case _:
            return name


def _unview(w: _Writer, table: Table, gradient: str) -> str:
    """Return the gradient of the parameter from that of its view."""
    match table.view:
        case "Transpose":
            return w.op("Transpose", gradient, perm=[1, 0])
        case "Reshape":
            return w.op("Reshape", gradient, w.constant([table.size * table.width]))
        case "scale":
            return w.op("Mul", gradient, w.constant(1.5, np.float32))
        case "Cast":
            return w.op("Cast", gradient, to=TensorProto.FLOAT)
        case _:
            return gradient


def _ids(w: _Writer, use: Use, name: str, size: int) -> str:
    """Return the ids [N, T] that the lookup reads by."""
    kind = TensorProto.INT32 if use.ids == "int32" else TensorProto.INT64
    raw = w.input(name, kind, "batch", TIMES)
    match use.ids:
        case "int32":
            return w.op("Cast", raw, to=TensorProto.INT64)
        case "Reshape":
            flat = w.op("Reshape", raw, w.constant([-1]))
            return w.op("Reshape", flat, w.constant([-1, TIMES]))
        case "offset":
            return w.op("Sub", raw, w.constant(1))
        case "Clip":
            return w.op("Clip", raw, w.constant(0), w.constant(size - 1))
        case "wrap":
            low = w.op("Less", raw, w.constant(0))
            return w.op("Where", low, w.op("Add", raw, w.constant(size)), raw)
        case "Unsqueeze":
            return w.op("Squeeze", w.op("Unsqueeze", raw, w.constant([0])), w.constant([0]))
        case _:
            return raw


def _read(w: _Writer, use: Use, table: Table, seen: str, ids: str) -> str:
    """Return the looked-up rows [N, T, D]."""
    V, D = table.size, table.width
    match use.reader:
        case "GatherND":
            return w.op("GatherND", seen, w.op("Unsqueeze", ids, w.constant([-1])))
        case "GatherElements":
            flat = w.op("Reshape", ids, w.constant([-1, 1]))
            spread = w.op("Expand", flat, w.constant([1, D]))
            rows = w.op("GatherElements", seen, spread, axis=0)
            return w.op("Reshape", rows, w.constant([-1, TIMES, D]))
        case "one-hot":
            hot = w.op("OneHot", ids, w.constant(V), w.constant([0, 1], np.float32), axis=-1)
            return w.op("MatMul", hot, seen)
        case _:
            return w.op("Gather", seen, ids, axis=0)


def _after(w: _Writer, use: Use, table: Table, rows: str, ids: str, parameter: str) -> str:
    match use.after:
        case "Tanh":
            return w.op("Tanh", rows)
        case "mask":
            kept = w.op("Not", w.op("Equal", ids, w.constant(1)))
            return w.op("Where", w.op("Unsqueeze", kept, w.constant([-1])), rows, w.constant(0.0, np.float32))
        case "matmul":
            return w.op("MatMul", rows, parameter)
        case "scale":
            return w.op("Mul", rows, w.constant(0.7, np.float32))
        case _:
            return rows


def _scatter(w: _Writer, table: Table, found: _Lookup, gradient: str) -> str:
    """Return the gradient [V, D] of one lookup in its exporter's style."""
    V, D = table.size, table.width
    rows = w.op("Reshape", gradient, w.constant([-1, D]))
    flat = w.op("Reshape", found.ids, w.constant([-1]))
    zeros = w.op("ConstantOfShape", w.constant([V, D]))
    column = w.op("Unsqueeze", flat, w.constant([-1]))
    match found.use.style:
        case "elements":
            spread = w.op("Expand", column, w.constant([1, D]))
            return w.op("ScatterElements", zeros, spread, rows, axis=0, reduction="add")
        case "one-hot":
            hot = w.op("OneHot", flat, w.constant(V), w.constant([0, 1], np.float32), axis=-1)
            return w.op("MatMul", w.op("Transpose", hot, perm=[1, 0]), rows)
        case "nd":
            return w.op("ScatterND", zeros, column, rows, reduction="add")
        case style:  # as PyTorch writes it
            inside = w.op(
                "And", w.op("GreaterOrEqual", flat, w.constant(0)), w.op("Less", flat, w.constant(V))
            )
            if style == "padding":
                inside = w.op("And", inside, w.op("Not", w.op("Equal", flat, w.constant(0))))
            dropped = w.op("Not", w.op("Unsqueeze", inside, w.constant([-1])))
            kept = w.op("Where", dropped, w.constant(0.0, np.float32), rows)
            clipped = w.op("Clip", flat, w.constant(-V), w.constant(V - 1))
            return w.op(
                "ScatterND", zeros, w.op("Unsqueeze", clipped, w.constant([-1])), kept, reduction="add"
            )


def training_graph(recipe: Recipe) -> onnx.ModelProto:
    """Return the graph of a recipe with its gradients, opset 18; parameters hold their first values."""
    w = _Writer()
    rng = np.random.default_rng([recipe.seed, 99])
    lookups: dict[int, list[_Lookup]] = {}
    parameters: list[str] = []
    parts: list[str] = []

    def weight(name: str, *shape: int) -> str:
        w.weights[name] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        parameters.append(name)
        return name

    for t, table in enumerate(recipe.tables):
        V, D = table.size, table.width
        name = f"table_{t}"
        stored = {"Transpose": (D, V), "Reshape": (V * D,)}.get(table.view, (V, D))
        w.weights[name] = rng.standard_normal(stored).astype(np.float32)
        if "shape" in recipe.decoys:
            w.op("Gather", w.op("Shape", name), w.constant(0), axis=0)
        seen = _view(w, table, name)
        lookups[t] = []
        for u, use in enumerate(table.uses):
            ids = _ids(w, use, f"ids_{t}_{u}", V)
            rows = _read(w, use, table, seen, ids)
            lookups[t].append(_Lookup(use, ids, rows))
            inner = weight(f"inner_{t}_{u}", D, D) if use.after == "matmul" else ""
            rows = _after(w, use, table, rows, ids, inner)
            if "frozen" in recipe.decoys:
                frozen = w.constant(rng.standard_normal((V, D)), np.float32)
                rows = w.op("Add", rows, w.op("Gather", frozen, ids, axis=0))
            total = w.op("ReduceSum", rows, w.constant([1]), keepdims=0)
            parts.append(w.op("MatMul", total, weight(f"out_{t}_{u}", D, OUTPUTS)))
    if recipe.join == "Concat":
        joined = w.op("Concat", *parts, axis=-1)
        prediction = w.op("MatMul", joined, weight("join", OUTPUTS * len(parts), OUTPUTS))
    else:
        prediction = parts[0]
        for part in parts[1:]:
            prediction = w.op("Add", prediction, part)
    prediction = w.op("Add", prediction, weight("bias", OUTPUTS))
    if "activations" in recipe.decoys:
        order = w.constant(list(range(OUTPUTS))[::-1])
        prediction = w.op("Gather", prediction, order, axis=1)
    if "labels" in recipe.decoys:
        labels = w.input("labels", TensorProto.INT64, "batch")
        values = w.constant([0, 1], np.float32)
        hot = w.op("OneHot", labels, w.constant(OUTPUTS), values, axis=-1)
        prediction = w.op("Sub", prediction, hot)
    error = w.op("Sub", prediction, w.input("target", TensorProto.FLOAT, "batch", OUTPUTS))
    reduce = "ReduceMean" if recipe.reduction == "mean" else "ReduceSum"
    w.op(reduce, w.op("Mul", error, error), output="loss", keepdims=0)
    return _with_gradients(w, recipe, lookups, parameters)


def _model(w: _Writer, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    weights = [numpy_helper.from_array(values, name) for name, values in w.weights.items()]
    graph = helper.make_graph(w.nodes, "generated", w.inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _with_gradients(
    w: _Writer, recipe: Recipe, lookups: dict[int, list[_Lookup]], parameters: list[str]
) -> onnx.ModelProto:
    """Differentiate as far as to the rows, then write what is left of each table's gradient."""
    loss = helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])
    model = read_forward_graph(_model(w, [loss]))
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    values.update(model.graph.initializers)
    names = [*parameters, *(found.rows for item in lookups.values() for found in item)]
    gradients = differentiate(model, values["loss"], [values[name] for name in names])
    proto = ir.to_proto(model)
    w.nodes = list(proto.graph.node)
    w.weights = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    made = {name: str(gradients[values[name]].name) for name in names}
    for name in parameters:
        if made[name] != f"{name}_grad":
            w.op("Identity", made[name], output=f"{name}_grad")
    for t, table in enumerate(recipe.tables):
        terms = [_scatter(w, table, found, made[found.rows]) for found in lookups[t]]
        total = terms[0] if len(terms) == 1 else w.op("Sum", *terms)
        w.op("Identity", _unview(w, table, total), output=f"table_{t}_grad")
    trained = [*parameters, *(f"table_{t}" for t in range(len(recipe.tables)))]
    outputs = [
        helper.make_tensor_value_info(f"{name}_grad", TensorProto.FLOAT, w.weights[name].shape)
        for name in trained
    ]
    for node in w.nodes:
        del node.metadata_props[:]
    result = _model(w, [loss, *outputs])
    onnx.checker.check_model(result)
    return result


def scrambled(model: onnx.ModelProto, opset: int, seed: int) -> onnx.ModelProto:
    """Return a model that computes the same by other words."""
    chance = random.Random(seed)  # noqa: S311  a test's choice
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    result.opset_import[0].version = opset
    _add_decoys(graph, chance)
    _rename(graph, chance)
    ordered = _shuffled(list(graph.node), {item.name for item in (*graph.input, *graph.initializer)}, chance)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(ordered)
    kept = list(graph.initializer)
    chance.shuffle(kept)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.checker.check_model(result)
    return result


def _add_decoys(graph: onnx.GraphProto, chance: random.Random) -> None:
    """Add lookups in what is no table, copies that nothing reads, and an output beside the loss."""
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    graph.initializer.append(numpy_helper.from_array(values, "decoy_buffer"))
    graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 1]), "decoy_ids"))
    floats = [node.output[0] for node in graph.node if node.op_type in ("MatMul", "Tanh", "Add")]
    copied = chance.choice(floats)
    graph.node.extend(
        [
            helper.make_node("Gather", ["decoy_buffer", "decoy_ids"], ["decoy_rows"], name="d1", axis=0),
            helper.make_node("ReduceSum", ["decoy_rows"], ["decoy_metric"], name="d2", keepdims=1),
            helper.make_node("Identity", [copied], ["decoy_copy"], name="d3"),
            helper.make_node("Shape", [copied], ["decoy_shape"], name="d4"),
        ]
    )
    graph.output.append(helper.make_tensor_value_info("decoy_metric", TensorProto.FLOAT, [1, 1]))


def _rename(graph: onnx.GraphProto, chance: random.Random) -> None:
    """Give every inner value, constant and node a name that says something else."""
    stay = {item.name for item in (*graph.input, *graph.output)}
    stay |= {name.removesuffix("_grad") for name in stay}
    inner = [name for node in graph.node for name in node.output if name not in stay]
    inner += [item.name for item in graph.initializer if item.name not in stay]
    words = ("emb.weight", "Gather", "ids", "loss_grad", "table_0_copy", "scatter", "x")
    new = {name: f"{chance.choice(words)}.{number}" for number, name in enumerate(inner)}
    for number, node in enumerate(graph.node):
        node.name = f"{chance.choice(words)}_{number}"
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for item in graph.initializer:
        item.name = new.get(item.name, item.name)


def _shuffled(nodes: list[onnx.NodeProto], known: set[str], chance: random.Random) -> list[onnx.NodeProto]:
    """Return the nodes in a random order in which each comes after what it reads."""
    order: list[onnx.NodeProto] = []
    waiting = list(nodes)
    while waiting:
        ready = [node for node in waiting if all(not name or name in known for name in node.input)]
        node = chance.choice(ready)
        waiting.remove(node)
        order.append(node)
        known.update(node.output)
    return order
