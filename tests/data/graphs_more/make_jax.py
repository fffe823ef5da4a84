"""Write the graphs of JAX's exporter in this folder, each with its sidecars: see README.md.

python make_jax.py NAME ...    with jax 0.11.2, jax2onnx 0.17.1, flax 0.12.12, onnx 1.23.2 (jax12_*: jax 0.9.1,
                               jax2onnx 0.12.5, flax 0.12.6)
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import onnx
from jax import export
from jax import nn as jnn
from jax2onnx import to_onnx

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
V, D, T, H = 24, 5, 3, 7
BATCHES = (6, 9)


@jax.custom_vjp
def dense(x, w):
    """x·w with a gradient whose transposes are explicit: jax2onnx loses those of a contraction of rows."""
    return x @ w


def _dense_forward(x, w):
    return dense(x, w), (x, w)


def _dense_backward(saved, g):
    x, w = saved
    return dense(g, jnp.transpose(w)), dense(jnp.transpose(x), g)


dense.defvjp(_dense_forward, _dense_backward)


def rows(h, width):
    """Return h as [n, width]; jax2onnx takes no -1 for a batch of any size."""
    count = 1
    for dim in h.shape:
        count = count * dim
    return jnp.reshape(h, (count // width, width))


def cross_entropy(logits, labels):
    picked = jnn.log_softmax(logits) * jnn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(picked, -1))


def classify(h, p):
    return dense(jnp.tanh(dense(rows(h, T * D), p["w1"]) + p["b1"]), p["w2"])


@dataclass(frozen=True)
class Model:
    """loss(parameters, batch), the shapes of both, and the tables ([V, D, lookups])."""

    loss: Callable
    parameters: dict[str, tuple[int, ...]]
    tables: dict[str, list[int]]
    ids: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"ids": (T,)})
    labels: str = "classes"
    lowest: int = 0
    highest: int = V
    opset: int = 21
    any_batch: bool = True
    traced: bool = False
    """Whether the step is traced before the export, as layers of flax need it."""


LAYERS = {"w1": (T * D, H), "b1": (H,), "w2": (H, V)}


def padded(p, d):
    """Ids of -1 are padding: their rows are zero, and the gradient's are dropped."""
    table = p["emb"].at[d["ids"]]
    h = table.get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return cross_entropy(classify(h, p), d["labels"])


def columns(p, d):
    h = jnp.moveaxis(jnp.take(p["emb"], d["ids"], axis=1), 0, -1)
    return cross_entropy(classify(h, p), d["labels"])


def hot(p, d):
    """One-hot rows by comparison along the last axis, and by the exporter's own operator along the first."""
    one = (d["ids"][..., None] == jnp.arange(V)).astype(jnp.float32)
    h = jnp.einsum("btv,vd->btd", one, p["emb"])
    other = jnp.einsum("vbt,dv->btd", jnn.one_hot(d["more"], V, axis=0), p["turned"])
    return cross_entropy(classify(h * other, p), d["labels"])


def tied(p, d):
    """A language model with positions, whose table is its output projection, too."""
    h = jnp.take(p["emb"], d["ids"], axis=0) + jnp.take(p["pos"], jnp.arange(T), axis=0)
    h = jnp.tanh(dense(rows(h, D), p["w"]))
    return cross_entropy(dense(h, jnp.transpose(p["emb"])), rows(d["labels"], 1)[:, 0])


def factors(p, d):
    """Matrix factorization with a bias table of one dimension; a sum of squares."""
    user, item = jnp.take(p["users"], d["ids"], axis=0), p["items"][d["item"]]
    return jnp.sum((jnp.sum(user * item, -1) + jnp.take(p["bias"], d["ids"], axis=0) - d["labels"]) ** 2)


def recomputed(p, d):
    """A table looked up twice, once by ids that are computed, all of it recomputed in the backward pass."""

    def h(table, ids):
        return jnp.take(table, ids, axis=0) * jnp.take(table, (ids * 5 + 2) % V, axis=0)

    return cross_entropy(classify(jax.checkpoint(h)(p["emb"], d["ids"]), p), d["labels"])


class Net(nn.Module):
    """Flax's own embedding, also as the output projection."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(V, D)
        h = embed(ids)
        return embed.attend(jnp.tanh(h * self.param("scale", nn.initializers.ones, (D,))))


def attended(p, d):
    held = {"Embed_0": {"embedding": p["Embed_0.embedding"]}, "scale": p["scale"]}
    logits = Net().apply({"params": held}, d["ids"])
    return cross_entropy(rows(logits, V), rows(d["labels"], 1)[:, 0])


BASE = {"emb": (V, D), **LAYERS}
ONE = {"emb": [V, D, 1]}
MODELS = {
    "jax_in21__padded": Model(padded, BASE, ONE, lowest=-2),
    "jax_in18__columns": Model(columns, {**BASE, "emb": (D, V)}, ONE, lowest=-V, opset=18),
    "jax_in21__hot": Model(
        hot,
        {**BASE, "turned": (D, V)},
        {**ONE, "turned": [V, D, 1]},
        {"ids": (T,), "more": (T,)},
        highest=V + 3,
    ),
    "jax_in23__tied": Model(
        tied,
        {"emb": (V, D), "pos": (T, D), "w": (D, D)},
        {**ONE, "pos": [T, D, 1]},
        labels="sequences",
        opset=23,
        any_batch=False,
    ),
    "jax_in21__factors": Model(
        factors,
        {"users": (V, D), "items": (V, D), "bias": (V,)},
        {"users": [V, D, 1], "items": [V, D, 1], "bias": [V, 1, 1]},
        {"ids": (), "item": ()},
        labels="numbers",
    ),
    "jax12_in21__recomputed": Model(recomputed, BASE, {"emb": [V, D, 2]}, any_batch=False),
    "jax_in21__flax": Model(
        attended,
        {"Embed_0.embedding": (V, D), "scale": (D,)},
        {"Embed_0.embedding": [V, D, 1]},
        labels="sequences",
        any_batch=False,
        traced=True,
    ),
}


def batch_of(model, rng, size):
    """Return a batch in which rows are looked up more than once."""
    batch = {}
    for name, shape in model.ids.items():
        batch[name] = rng.integers(model.lowest, model.highest, (size, *shape)).astype(np.int32)
        batch[name][0] = batch[name][-1]
    shape = (size, *model.ids["ids"]) if model.labels == "sequences" else (size,)
    if model.labels == "numbers":
        batch["labels"] = rng.normal(size=shape).astype(np.float32)
    else:
        batch["labels"] = rng.integers(0, V, shape).astype(np.int32)
    return batch


def write(name):
    model = MODELS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    weights = {
        key: jnp.asarray(rng.normal(0, 0.6, shape), jnp.float32) for key, shape in model.parameters.items()
    }
    sizes = BATCHES if model.any_batch else BATCHES[:1] * 2
    batches = [batch_of(model, rng, size) for size in sizes]
    value_and_grad = jax.value_and_grad(model.loss)

    def step(*values):
        loss, gradients = value_and_grad(
            dict(zip(weights, values, strict=False)),
            dict(zip(batches[0], values[len(weights) :], strict=True)),
        )
        return (loss, *(gradients[key] for key in weights))

    (size,) = export.symbolic_shape("B") if model.any_batch else BATCHES[:1]
    inputs = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in weights.values()]
    inputs += [jax.ShapeDtypeStruct((size, *item.shape[1:]), item.dtype) for item in batches[0].values()]
    called = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(step)(*inputs)) if model.traced else step
    exported = to_onnx(
        called,
        inputs,
        opset=model.opset,
        model_name=name,
        input_names=[*weights, *batches[0]],
        output_names=["loss", *(f"{key}_grad" for key in weights)],
    )
    onnx.checker.check_model(exported)
    arrays = {f"in:{key}": np.asarray(value) for key, value in weights.items()}
    for which, ref, batch in (("in", "ref", batches[0]), ("in2", "ref2", batches[1])):
        loss, gradients = value_and_grad(weights, {key: jnp.asarray(item) for key, item in batch.items()})
        arrays.update({f"{which}:{key}": item for key, item in batch.items()})
        arrays[f"{ref}:loss"] = np.asarray(loss)
        arrays.update({f"{ref}:grad:{key}": np.asarray(item) for key, item in gradients.items()})
    onnx.save(exported, HERE / f"{name}.onnx")
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    (HERE / f"{name}.json").write_text(json.dumps({"tables": model.tables}, indent=1) + "\n")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        write(chosen)
