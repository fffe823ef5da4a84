"""Write the graphs of TensorFlow's exporter in this folder, each with its sidecars: see README.md.

python make_tf.py NAME ...      with tensorflow-cpu 2.21.0, tf2onnx 1.17.0 (or 1.14.0), onnx 1.23.2
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from onnx import TensorProto
from tf2onnx.graph_builder import GraphBuilder

HERE = Path(__file__).parent
INT32, INT64 = TensorProto.INT32, TensorProto.INT64


# ---- operators of TensorFlow's gradients that tf2onnx does not know ------------------------------------


def const(ctx, array):
    return ctx.make_const(tf2onnx.utils.make_name("c"), np.asarray(array)).output[0]


def one_of(ctx, value):
    return const(ctx, np.ones((), tf2onnx.utils.map_onnx_to_numpy_type(ctx.get_dtype(value))))


def op(ctx, kind, *inputs, **attr):
    return ctx.make_node(kind, list(inputs), attr=attr).output[0]


def keep_names(ctx, node, result):
    """Let `result` be the node's output, under the output's own name."""
    name, shape, kind = node.output[0], ctx.get_shape(node.output[0]), ctx.get_dtype(node.output[0])
    ctx.remove_node(node.name)
    ctx.make_node("Identity", [result], outputs=[name], shapes=[shape], dtypes=[kind])


def tanh_grad(ctx, node, name, args, **_):
    y, dy = node.input[:2]
    keep_names(ctx, node, op(ctx, "Mul", dy, op(ctx, "Sub", one_of(ctx, y), op(ctx, "Mul", y, y))))


def sigmoid_grad(ctx, node, name, args, **_):
    y, dy = node.input[:2]
    slope = op(ctx, "Mul", y, op(ctx, "Sub", one_of(ctx, y), y))
    keep_names(ctx, node, op(ctx, "Mul", dy, slope))


def relu_grad(ctx, node, name, args, **_):
    dy, x = node.input[:2]
    dtype = tf2onnx.utils.map_onnx_to_numpy_type(ctx.get_dtype(x))
    zero = const(ctx, np.zeros((), dtype))
    keep_names(ctx, node, op(ctx, "Where", op(ctx, "Greater", x, zero), dy, zero))


def softplus_grad(ctx, node, name, args, **_):
    dy, x = node.input[:2]
    keep_names(ctx, node, op(ctx, "Mul", dy, op(ctx, "Sigmoid", x)))


def bias_add_grad(ctx, node, name, args, **_):
    rank = len(ctx.get_shape(node.input[0]))
    axes = list(range(rank - 1))
    result = GraphBuilder(ctx).make_reduce_sum({"data": node.input[0], "axes": axes, "keepdims": 0})
    keep_names(ctx, node, result)


def broadcast_args(ctx, node, name, args, **_):
    """Axes along which each of two shapes was broadcast."""
    shapes = [op(ctx, "Cast", item, to=INT64) for item in node.input[:2]]
    ranks = [op(ctx, "Shape", item) for item in shapes]
    rank = op(ctx, "Max", *ranks)
    one = const(ctx, np.array([1], np.int64))
    full = [
        op(ctx, "Concat", op(ctx, "Expand", one, op(ctx, "Sub", rank, own)), shape, axis=0)
        for own, shape in zip(ranks, shapes, strict=True)
    ]
    results = []
    single = const(ctx, np.array(1, np.int64))
    ones = [op(ctx, "Equal", item, single) for item in full]
    for own, other in (ones, ones[::-1]):
        grown = op(ctx, "And", own, op(ctx, "Not", other))
        axes = GraphBuilder(ctx).make_squeeze({"data": op(ctx, "NonZero", grown), "axes": [0]})
        results.append(op(ctx, "Cast", axes, to=INT32))
    names, kinds = list(node.output), [ctx.get_dtype(item) for item in node.output]
    dims = [ctx.get_shape(item) for item in node.output]
    ctx.remove_node(node.name)
    for result, output, kind, dim in zip(results, names, kinds, dims, strict=True):
        ctx.make_node("Identity", [result], outputs=[output], shapes=[dim], dtypes=[kind])


def dynamic_stitch(ctx, node, name, args, **_):
    """Vectors joined by their places; only of numbers, as in the gradient of a mean."""
    half = len(node.input) // 2
    kind = ctx.get_dtype(node.input[half])
    flat = const(ctx, np.array([-1], np.int64))
    places = [op(ctx, "Reshape", op(ctx, "Cast", item, to=INT64), flat) for item in node.input[:half]]
    parts = [op(ctx, "Reshape", op(ctx, "Cast", item, to=INT64), flat) for item in node.input[half:]]
    place, part = op(ctx, "Concat", *places, axis=0), op(ctx, "Concat", *parts, axis=0)
    most = GraphBuilder(ctx).make_reduce_max({"data": place, "axes": [0], "keepdims": 1})
    size = op(ctx, "Add", most, const(ctx, np.array([1], np.int64)))
    base = op(ctx, "Expand", const(ctx, np.array([0], np.int64)), size)
    result = op(ctx, "Cast", op(ctx, "ScatterElements", base, place, part, axis=0), to=kind)
    keep_names(ctx, node, result)


def shape_n(ctx, node, name, args, **_):
    kinds = [ctx.get_dtype(item) for item in node.output]
    inputs, names = list(node.input), list(node.output)
    dims = [ctx.get_shape(item) for item in names]
    ctx.remove_node(node.name)
    for source, output, kind, dim in zip(inputs, names, kinds, dims, strict=True):
        shape = op(ctx, "Shape", source)
        ctx.make_node("Cast", [shape], attr={"to": kind}, outputs=[output], shapes=[dim], dtypes=[kind])


def concat_offset(ctx, node, name, args, **_):
    axis = int(node.inputs[0].get_tensor_value())
    shapes = [op(ctx, "Cast", item, to=INT64) for item in node.input[1:]]
    names, kinds = list(node.output), [ctx.get_dtype(item) for item in node.output]
    dims = [ctx.get_shape(item) for item in names]
    place = const(ctx, np.array([axis], np.int64))
    offset = const(ctx, np.array([0], np.int64))
    nothing = op(ctx, "Sub", shapes[0], shapes[0])
    ctx.remove_node(node.name)
    for shape, output, kind, dim in zip(shapes, names, kinds, dims, strict=True):
        vector = op(ctx, "ScatterElements", nothing, place, offset, axis=0)
        ctx.make_node("Cast", [vector], attr={"to": kind}, outputs=[output], shapes=[dim], dtypes=[kind])
        offset = op(ctx, "Add", offset, op(ctx, "Gather", shape, place))


def sparse_cross_entropy(ctx, node, name, args, **_):
    """Loss per example, and its gradient: softmax minus one-hot."""
    logits, labels = node.input[:2]
    depth = ctx.get_shape(logits)[-1]
    dtype = tf2onnx.utils.map_onnx_to_numpy_type(ctx.get_dtype(logits))
    ids = op(ctx, "Cast", labels, to=INT64)
    hot = op(ctx, "OneHot", ids, const(ctx, np.array([depth], np.int64)), const(ctx, np.array([0, 1], dtype)))
    scores = op(ctx, "LogSoftmax", logits, axis=-1)
    picked = GraphBuilder(ctx).make_reduce_sum(
        {"data": op(ctx, "Mul", scores, hot), "axes": [-1], "keepdims": 0}
    )
    results = [op(ctx, "Neg", picked), op(ctx, "Sub", op(ctx, "Exp", scores), hot)]
    names, kinds = list(node.output), [ctx.get_dtype(item) for item in node.output]
    dims = [ctx.get_shape(item) for item in names]
    ctx.remove_node(node.name)
    for result, output, kind, dim in zip(results, names, kinds, dims, strict=True):
        ctx.make_node("Identity", [result], outputs=[output], shapes=[dim], dtypes=[kind])


HANDLERS = {
    "TanhGrad": tanh_grad,
    "SigmoidGrad": sigmoid_grad,
    "ReluGrad": relu_grad,
    "SoftplusGrad": softplus_grad,
    "BiasAddGrad": bias_add_grad,
    "BroadcastGradientArgs": broadcast_args,
    "DynamicStitch": dynamic_stitch,
    "ShapeN": shape_n,
    "ConcatOffset": concat_offset,
    "SparseSoftmaxCrossEntropyWithLogits": sparse_cross_entropy,
}


# ---- models ------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A loss of parameters and a batch. `batch` maps a name to (dtype, shape, bound or None)."""

    parameters: dict[str, tuple[int, ...]]
    batch: dict[str, tuple[str, tuple[int | None, ...], int | None]]
    loss: object
    tables: dict[str, list[int]]


def cross_entropy(logits, labels):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def bow(p, b):
    """Mean of rows, masked: id 0 is padding that the model itself leaves out."""
    rows = tf.gather(p["emb"], b["ids"])
    mask = tf.cast(tf.not_equal(b["ids"], 0), tf.float32)[..., None]
    mean = tf.reduce_sum(rows * mask, 1) / (tf.reduce_sum(mask, 1) + 1.0)
    return tf.reduce_mean(cross_entropy(tf.matmul(mean, p["out"]) + p["bias"], b["labels"]))


def unrolled(p, b):
    """A recurrent network unrolled over time: one lookup a step, in one table."""
    state = tf.zeros([tf.shape(b["ids"])[0], 8])
    for t in range(3):
        row = tf.nn.embedding_lookup(p["emb"], b["ids"][:, t])
        state = tf.tanh(tf.matmul(row, p["wx"]) + tf.matmul(state, p["wh"]))
    return tf.reduce_mean(cross_entropy(tf.matmul(state, p["out"]), b["labels"]))


def triple(p, b):
    """Three lookups in one table: anchor, positive, negative."""
    a, x, y = (tf.reduce_mean(tf.gather(p["emb"], b[key]), 1) for key in ("a", "x", "y"))
    near, far = tf.reduce_sum(a * x, 1), tf.reduce_sum(a * y, 1)
    return tf.reduce_mean(tf.math.softplus(far - near))


def hot(p, b):
    """One-hot times table, with the batch axis kept: a product of rank three."""
    rows = tf.matmul(tf.one_hot(b["ids"], 40), p["emb"])
    flat = tf.reshape(rows, [-1, 3 * 6])
    return tf.reduce_mean(cross_entropy(tf.matmul(flat, p["out"]), b["labels"]))


def positions(p, b):
    """A language model with a position table read by a range, and a tied projection."""
    h = tf.gather(p["tok"], b["ids"]) + tf.expand_dims(tf.gather(p["pos"], tf.range(5)), 0)
    h = tf.tanh(tf.matmul(tf.reshape(h, [-1, 6]), p["w"]))
    logits = tf.matmul(h, p["tok"], transpose_b=True)
    return tf.reduce_mean(cross_entropy(logits, tf.reshape(b["labels"], [-1])))


def segments(p, b):
    """A bag of rows by segment ids in the forward part."""
    rows = tf.gather(p["emb"], b["ids"])
    bags = tf.math.unsorted_segment_sum(rows, b["bag"], 4)
    return tf.reduce_mean(tf.square(tf.matmul(bags, p["out"]) - b["target"]))


def interactions(p, b):
    """Three tables, bags of ids, dense features, logistic loss."""
    bags = [tf.reduce_sum(tf.gather(p[f"t{k}"], b[f"c{k}"]), 1) for k in range(3)]
    x = tf.concat([*bags, b["dense"]], 1)
    x = tf.nn.relu(tf.matmul(x, p["w1"]) + p["b1"])
    score = tf.reshape(tf.matmul(x, p["w2"]), [-1])
    return tf.reduce_mean(tf.math.softplus(score) - score * b["labels"])


IDS = ("int64", (None, 4), 40)
LABELS = ("int64", (None,), 7)
MODELS = {
    "bow": Model(
        {"emb": (40, 6), "out": (6, 7), "bias": (7,)},
        {"ids": IDS, "labels": LABELS},
        bow,
        {"emb": [40, 6, 1]},
    ),
    "unrolled": Model(
        {"emb": (40, 6), "wx": (6, 8), "wh": (8, 8), "out": (8, 7)},
        {"ids": ("int64", (None, 3), 40), "labels": LABELS},
        unrolled,
        {"emb": [40, 6, 3]},
    ),
    "triple": Model(
        {"emb": (40, 6)},
        {"a": ("int64", (None, 4), 40), "x": ("int64", (None, 4), 40), "y": ("int64", (None, 2), 40)},
        triple,
        {"emb": [40, 6, 3]},
    ),
    "hot": Model(
        {"emb": (40, 6), "out": (18, 7)},
        {"ids": ("int64", (None, 3), 40), "labels": LABELS},
        hot,
        {"emb": [40, 6, 1]},
    ),
    "positions": Model(
        {"tok": (40, 6), "pos": (5, 6), "w": (6, 6)},
        {"ids": ("int64", (None, 5), 40), "labels": ("int64", (None, 5), 40)},
        positions,
        {"tok": [40, 6, 1], "pos": [5, 6, 1]},
    ),
    "segments": Model(
        {"emb": (40, 6), "out": (6, 2)},
        {"ids": ("int64", (None,), 40), "bag": ("int64", (None,), 4), "target": ("float32", (4, 2), None)},
        segments,
        {"emb": [40, 6, 1]},
    ),
    "interactions": Model(
        {"t0": (20, 4), "t1": (30, 6), "t2": (40, 8), "w1": (21, 8), "b1": (8,), "w2": (8, 1)},
        {
            "c0": ("int64", (None, 2), 20),
            "c1": ("int64", (None, 3), 30),
            "c2": ("int64", (None, 1), 40),
            "dense": ("float32", (None, 3), None),
            "labels": ("float32", (None,), None),
        },
        interactions,
        {"t0": [20, 4, 1], "t1": [30, 6, 1], "t2": [40, 8, 1]},
    ),
}


# ---- ways of exporting -------------------------------------------------------------------------------


def starting(model, rng):
    return {key: rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in model.parameters.items()}


def batch_of(model, rng, size, ids):
    found = {}
    for key, (dtype, shape, bound) in model.batch.items():
        shape = tuple(size if dim is None else dim for dim in shape)
        if bound is None:
            found[key] = rng.normal(0, 1, shape).astype(dtype)
            continue
        found[key] = rng.integers(0, bound, shape).astype(dtype if key == "labels" else ids)
        if key not in ("labels", "bag"):
            found[key].reshape(-1)[:2] = found[key].reshape(-1)[-1]  # rows repeat
    return found


def write(name, model_name, how="in", opset=18, ids="int64", size=None):
    """Write one graph: `in` takes parameters as inputs, `sparse` leaves rows and ids, `var` has variables."""
    model = MODELS[model_name]
    rng = np.random.default_rng(sum(map(ord, name)))
    values = starting(model, rng)
    batches = {"": batch_of(model, rng, size or 6, ids), "2": batch_of(model, rng, size or 9, ids)}
    keys = list(model.parameters)

    def gradients_of(parameters, batch):
        with tf.GradientTape() as tape:
            tape.watch(list(parameters.values()))
            loss = model.loss(parameters, batch)
        return loss, tape.gradient(loss, parameters)

    variables = {key: tf.Variable(value) for key, value in values.items()} if how == "var" else None
    order = [*(keys if variables is None else []), *model.batch]

    def step(*arguments):
        given = dict(zip(order, arguments, strict=True))
        batch = {key: given[key] for key in model.batch}
        parameters = {key: given[key] for key in keys} if variables is None else variables
        loss, gradients = gradients_of(parameters, batch)
        results = {"loss": loss}
        for index, (key, gradient) in enumerate(gradients.items()):
            if how == "sparse" and isinstance(gradient, tf.IndexedSlices):
                results[f"{key}_grad_values"] = gradient.values
                results[f"{key}_grad_indices"] = gradient.indices
            else:
                output = f"{key}_grad" if variables is None else f"out{index}"
                results[output] = tf.convert_to_tensor(gradient)
        return results

    signature = [tf.TensorSpec(values[key].shape, tf.float32, name=key) for key in order if key in values]
    for key, (dtype, shape, bound) in model.batch.items():
        kind = dtype if bound is None or key == "labels" else ids
        signature.append(tf.TensorSpec([size if dim is None else dim for dim in shape], kind, name=key))
    function = tf.function(step, input_signature=signature, autograph=False)
    handlers = {key: (value, []) for key, value in HANDLERS.items()}
    proto, _ = tf2onnx.convert.from_function(
        function, input_signature=signature, opset=opset, custom_op_handlers=handlers
    )
    del proto.metadata_props[:]
    onnx.checker.check_model(proto)
    onnx.save(proto, HERE / f"{name}.onnx")

    names = {key: key for key in keys}
    if variables is not None:  # the exporter's names for the variables that it froze
        for item in proto.graph.initializer:
            array = onnx.numpy_helper.to_array(item)
            names.update((key, item.name) for key in keys if np.array_equal(array, values[key]))
    arrays = {} if how == "var" else {f"in:{key}": value for key, value in values.items()}
    for which, batch in batches.items():
        arrays.update({f"in{which}:{key}": value for key, value in batch.items()})
        tensors = {key: tf.constant(value) for key, value in values.items()}
        loss, gradients = gradients_of(tensors, {key: tf.constant(value) for key, value in batch.items()})
        arrays[f"ref{which}:loss"] = loss.numpy()
        for key, gradient in gradients.items():
            arrays[f"ref{which}:grad:{names[key]}"] = tf.convert_to_tensor(gradient).numpy()
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    tables = {names[key]: entry for key, entry in model.tables.items()}
    (HERE / f"{name}.json").write_text(json.dumps({"tables": tables}) + "\n")


GRAPHS = {
    "tf_in13__positions": {"model_name": "positions", "opset": 13, "size": 6},
    "tf_in15__unrolled": {"model_name": "unrolled", "opset": 15, "ids": "int32"},
    "tf_in18__hot": {"model_name": "hot", "opset": 18},
    "tf_in18__segments": {"model_name": "segments", "opset": 18},
    "tf_sparse17__triple": {"model_name": "triple", "opset": 17, "how": "sparse", "ids": "int32"},
    "tf_var16__interactions": {"model_name": "interactions", "opset": 16, "how": "var"},
    "tf114_in15__bow": {"model_name": "bow", "opset": 15},
}
"""tf114 was written with tf2onnx 1.14.0, the others with 1.17.0."""

if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name, **GRAPHS[name])
