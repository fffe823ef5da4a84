"""Write training graphs that contain their optimizer, each with its sidecars: see README.md.

python make_optimizers.py jax      with jax 0.11.2, jax2onnx 0.17.1, optax 0.2.8, onnx 1.23.2
python make_optimizers.py torch    with torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2
python make_optimizers.py info     with onnx 1.23.2, torch 2.13.0 (gradients of the sidecars)
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx

HERE = Path(__file__).parent
V, D, T, H, C, B = 40, 6, 4, 8, 5, 6
RNG = np.random.default_rng(5)
SHAPES = {"emb": (V, D), "bias": (H,), "fc": (T * D, H), "out": (H, C)}
START = {name: (RNG.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in SHAPES.items()}


def draw():
    ids = RNG.integers(0, V, (B, T)).astype(np.int32)
    ids[1] = ids[0]
    return ids, RNG.integers(0, C, (B,)).astype(np.int32)


BATCHES = [draw(), draw()]


def clean(proto):
    del proto.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del part.metadata_props[:]
    return proto


def write(name, proto, inputs, batch, weights, references, tables):
    """Store a graph; `references` are a loss and gradients by parameter for each of two batches."""
    onnx.save(clean(proto), HERE / f"{name}.onnx")
    arrays = {f"in:{key}": value for key, value in inputs.items()}
    for which, ref, given, (loss, gradients) in zip(
        ("in", "in2"), ("ref", "ref2"), batch, references, strict=True
    ):
        arrays |= {f"{which}:{key}": value for key, value in given.items()}
        arrays |= {f"{ref}:grad:{key}": np.asarray(value) for key, value in gradients.items()}
        arrays[f"{ref}:loss"] = np.asarray(loss)
    arrays |= {f"in:{key}": value for key, value in weights.items()}
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    (HERE / f"{name}.json").write_text(json.dumps({"tables": tables}) + "\n")


def from_jax():
    import jax
    import jax.numpy as jnp
    import optax
    from jax2onnx import to_onnx

    @jax.custom_vjp
    def product(a, b):  # jax2onnx 0.17.1 leaves the transposition out of the gradient of a @ b
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda held, g: (g @ held[1].T, held[0].T @ g))

    def loss_of(p, ids, labels):
        rows = jnp.take(p["emb"], ids, axis=0, mode="clip").reshape(ids.shape[0], T * D)
        logits = product(jnp.tanh(product(rows, p["fc"]) + p["bias"]), p["out"])
        return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, C) * jax.nn.log_softmax(logits), -1))

    optimizers = {
        "sgd": optax.sgd(0.1),
        "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
        "clipped_adamw": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=1e-3)),
        "adagrad_decayed": optax.adagrad(optax.exponential_decay(0.1, 100, 0.9)),
    }
    names = list(SHAPES)
    start = {name: jnp.asarray(value) for name, value in START.items()}
    for kind, optimizer in optimizers.items():
        leaves, tree = jax.tree_util.tree_flatten(optimizer.init(start))

        def step(*given, tree=tree, optimizer=optimizer):
            p = dict(zip(names, given[: len(names)], strict=True))
            ids, labels = given[len(names) : len(names) + 2]
            held = jax.tree_util.tree_unflatten(tree, given[len(names) + 2 :])
            loss, gradients = jax.value_and_grad(loss_of)(p, ids, labels)
            updates, held = optimizer.update(gradients, held, p)
            new = optax.apply_updates(p, updates)
            return (loss, *[new[name] for name in names], *jax.tree_util.tree_leaves(held))

        given = [*start.values(), *map(jnp.asarray, BATCHES[0]), *leaves]
        proto = to_onnx(
            step, [jax.ShapeDtypeStruct(np.shape(item), np.asarray(item).dtype) for item in given]
        )
        called = [item.name for item in proto.graph.input]
        inputs = {name: np.asarray(item) for name, item in zip(called, given, strict=True)}
        own = dict(zip(names, called, strict=False))
        batch = [dict(zip(called[len(names) :], pair, strict=False)) for pair in BATCHES]
        references = []
        for pair in BATCHES:
            loss, gradients = jax.value_and_grad(loss_of)(start, *pair)
            references.append((loss, {own[name]: gradients[name] for name in names}))
        tables = {own["emb"]: [V, D, 1]}
        write(f"optax__{kind}", proto, inputs, batch, {}, references, tables)


def from_torch():
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss_of(p, ids, hot):
        rows = torch.nn.functional.embedding(ids.long(), p["emb"]).flatten(1)
        logits = torch.tanh(rows @ p["fc"] + p["bias"]) @ p["out"]
        return -(torch.log_softmax(logits, 1) * hot).sum(1).mean()

    def momentum(p, g, held, t):
        held = [0.9 * m + b for m, b in zip(held, g, strict=True)]
        return [torch.add(a, m, alpha=-0.1) for a, m in zip(p, held, strict=True)], held

    def adam(p, g, held, t):
        n = len(p)
        m = [torch.lerp(a, b, 0.1) for a, b in zip(held[:n], g, strict=True)]
        v = [a.mul(0.999).addcmul(b, b, value=0.001) for a, b in zip(held[n:], g, strict=True)]
        t = t + 1
        rate, root = 0.01 / (1 - 0.9**t), (1 - 0.999**t).sqrt()
        new = [a - rate * x / (z.sqrt() / root + 1e-8) for a, x, z in zip(p, m, v, strict=True)]
        return new, [*m, *v, t]

    def decayed(p, g, held, t):
        return [a * (1 - 1e-3) - 0.1 * b for a, b in zip(p, g, strict=True)], []

    names = list(SHAPES)
    count = len(names)
    start = [torch.from_numpy(value) for value in START.values()]
    for kind, update, states in (("momentum", momentum, 1), ("adam", adam, 2), ("decayed_sgd", decayed, 0)):
        held = [torch.full_like(item, 0.01) for _ in range(states) for item in start]
        more = [torch.tensor(3.0)] if states == 2 else []

        def step(*given, states=states, update=update):
            p = [item.detach().requires_grad_() for item in given[:count]]
            loss = loss_of(dict(zip(names, p, strict=True)), *given[count : count + 2])
            gradients = torch.autograd.grad(loss, p)
            with torch.no_grad():
                kept = list(given[count + 2 : count + 2 + states * count])
                new, kept = update(list(given[:count]), gradients, kept, given[-1])
            return (loss.detach(), *new, *kept)

        data = [(torch.from_numpy(ids), torch.eye(C)[torch.from_numpy(y).long()]) for ids, y in BATCHES]
        given = [*start, *data[0], *held, *more]
        program = torch.export.export(make_fx(step, tracing_mode="real")(*given), tuple(given))
        called = [f"x{index}" for index in range(len(given))]
        with contextlib.redirect_stdout(io.StringIO()):
            proto = torch.onnx.export(program, dynamo=True, input_names=called).model_proto
        inputs = {name: item.numpy() for name, item in zip(called, given, strict=True)}
        batch = [dict(zip(called[count:], (item.numpy() for item in pair), strict=False)) for pair in data]
        references = []
        for pair in data:
            p = [item.clone().requires_grad_() for item in start]
            loss = loss_of(dict(zip(names, p, strict=True)), *pair)
            loss.backward()
            references.append(
                (loss.detach().numpy(), {f"x{i}": item.grad.numpy() for i, item in enumerate(p)})
            )
        write(f"torchstep__{kind}", proto, inputs, batch, {}, references, {"x0": [V, D, 1]})


INFO = """
<ir_version: 9, opset_import: ["" : 21, "ai.onnx.preview.training" : 1]>
rank (int32[N, 3] query, int32[N] item) => (float[N] score)
<float[30, 6] words, float[20, 6] items, float[6] scale, int64[1] one = {1}>
{
    rows = Gather<axis: int = 0>(words, query)
    mean = ReduceMean<keepdims: int = 0>(rows, one)
    left = LayerNormalization<axis: int = -1>(mean, scale)
    right = Gather<axis: int = 0>(items, item)
    both = Mul(left, right)
    score = ReduceSum<keepdims: int = 0>(both, one)
}
"""
ALGORITHM = """
<ir_version: 9, opset_import: ["" : 21, "ai.onnx.preview.training" : 1]>
learn (float[N] clicked, float R) => (float loss, float[30, 6] words_1, float[20, 6] items_1, float[6] scale_1,
    float[30, 6] Vw_1, float[30, 6] Hw_1, float[20, 6] Vi_1, float[20, 6] Hi_1, float[6] Vs_1, float[6] Hs_1, int64 T_1)
<int64 T = {0}, int64 step = {1}>
{
    bound = Softplus(score)
    reward = Mul(score, clicked)
    each = Sub(bound, reward)
    loss = ReduceMean<keepdims: int = 0>(each)
    gw, gi, gs = ai.onnx.preview.training.Gradient<xs: strings = ["words", "items", "scale"],
        zs: strings = ["query", "item", "clicked"], y: string = "loss">(words, items, scale, query, item, clicked)
    words_1, items_1, scale_1, Vw_1, Vi_1, Vs_1, Hw_1, Hi_1, Hs_1 = ai.onnx.preview.training.Adam<alpha: float = 0.9,
        beta: float = 0.99, norm_coefficient: float = 0.01>(R, T, words, items, scale, gw, gi, gs, Vw, Vi, Vs, Hw, Hi, Hs)
    T_1 = Add(T, step)
}
"""


def from_info():
    """Two tables under Adam with a penalty and a learning rate that is an input, opset 21, int32 ids."""
    import torch

    model, shapes = onnx.parser.parse_model(INFO), {"words": (30, 6), "items": (20, 6), "scale": (6,)}
    info = model.training_info.add()
    info.algorithm.CopyFrom(onnx.parser.parse_model(ALGORITHM).graph)
    for name, shape in shapes.items():
        held = (RNG.standard_normal(shape) * 0.5).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(held, name))
        info.update_binding.add(key=name, value=f"{name}_1")
        for state in "VH":
            own = f"{state}{name[0]}"
            info.algorithm.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), own))
            info.update_binding.add(key=own, value=f"{own}_1")
    info.update_binding.add(key="T", value="T_1")
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    weights = {name: stored[name] for name in shapes}
    batch, references = [], []
    for size in (6, 9):
        query, item = (
            RNG.integers(0, 30, (size, 3)).astype(np.int32),
            RNG.integers(0, 20, size).astype(np.int32),
        )
        query[1], item[1] = query[0], item[0]
        clicked = RNG.integers(0, 2, size).astype(np.float32)
        batch.append({"query": query, "item": item, "clicked": clicked, "R": np.asarray(0.05, np.float32)})
        p = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
        rows = p["words"][torch.from_numpy(query).long()].mean(1)
        left = torch.nn.functional.layer_norm(rows, (6,), p["scale"])
        score = (left * p["items"][torch.from_numpy(item).long()]).sum(1)
        loss = (torch.nn.functional.softplus(score) - score * torch.from_numpy(clicked)).mean()
        loss.backward()
        references.append((loss.detach().numpy(), {name: value.grad.numpy() for name, value in p.items()}))
    tables = {"words": [30, 6, 1], "items": [20, 6, 1]}
    write("info21__ranking", model, {}, batch, weights, references, tables)


{"jax": from_jax, "torch": from_torch, "info": from_info}[sys.argv[1]]()
