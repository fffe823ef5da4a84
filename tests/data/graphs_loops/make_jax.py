"""Write the graphs `jax_*`: training steps by hand-written backpropagation through time over `jax.lax.scan`.

    python tests/data/graphs_loops/make_jax.py

Needs jax 0.11.2 and jax2onnx 0.17.1 (Python 3.12). Each graph has an `.npz`: `in:<input>` a feed and
`ref:<output>` what JAX computes.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax2onnx import to_onnx

FOLDER = Path(__file__).parent
DRAW = np.random.default_rng(0)
VOCAB, TAGS, WIDTH, HIDDEN, CLASSES, BATCH = 30, 9, 6, 5, 4, 7


def weight(*shape):
    return (DRAW.normal(size=shape) * 0.3).astype(np.float32)


def integers(high, *shape):
    return DRAW.integers(0, high, shape).astype(np.int32)


@jax.custom_vjp
def dense(h, w):  # jax2onnx 0.17.1 writes the derivative of h @ w without its transposes
    return h @ w


dense.defvjp(
    lambda h, w: (h @ w, (h, w)),
    lambda saved, g: (g @ jnp.transpose(saved[1]), jnp.transpose(saved[0]) @ g),
)


def cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(log_p * jax.nn.one_hot(labels, logits.shape[-1]), -1))


def run(p, embed, ids, batch):
    def step(h, i):
        new = jnp.tanh(embed(p["emb"], i) @ p["ih"] + h @ p["hh"])
        return new, (h, new)

    return jax.lax.scan(step, jnp.zeros((batch, HIDDEN), jnp.float32), ids)


def classifier(embed, add):
    """Return a step that classifies the last state; `add` accumulates the table's gradient."""

    def training_step(p, ids, labels):
        last, (before, after) = run(p, embed, ids, ids.shape[1])
        loss, (g_out, g_last) = jax.value_and_grad(
            lambda out, h: cross_entropy(dense(h, out), labels), (0, 1)
        )(p["out"], last)

        def back(carry, x):
            g, g_emb, g_ih, g_hh = carry
            i, h, new = x
            dz = g * (1 - new * new)
            rows = embed(p["emb"], i)
            return (dz @ p["hh"].T, add(g_emb, i, dz @ p["ih"].T), g_ih + rows.T @ dz, g_hh + h.T @ dz), None

        zeros = [jnp.zeros_like(p[key]) for key in ("emb", "ih", "hh")]
        (_, *grads), _ = jax.lax.scan(back, (g_last, *zeros), (ids[::-1], before[::-1], after[::-1]))
        return loss, *grads, g_out

    return training_step


def language_model(p, ids):
    """Predict every next id; the loss reads the states of all times."""
    x, y = ids[:-1], ids[1:]
    last, (before, after) = run(p, lambda w, i: w[i], x, ids.shape[1])
    loss, (g_out, g_after) = jax.value_and_grad(
        lambda out, h: cross_entropy(dense(h.reshape(-1, HIDDEN), out), y.reshape(-1)), (0, 1)
    )(p["out"], after)

    def back(carry, v):
        g, g_emb, g_ih, g_hh = carry
        i, h, new, here = v
        dz = (g + here) * (1 - new * new)
        g_emb = g_emb.at[i].add(dz @ p["ih"].T)
        return (dz @ p["hh"].T, g_emb, g_ih + p["emb"][i].T @ dz, g_hh + h.T @ dz), None

    zeros = [jnp.zeros_like(p[key]) for key in ("emb", "ih", "hh")]
    read = (x[::-1], before[::-1], after[::-1], g_after[::-1])
    (_, *grads), _ = jax.lax.scan(back, (jnp.zeros_like(last), *zeros), read)
    return loss, *grads, g_out


def two_tables(p, ids, tags, labels):
    """Multiply rows of two tables; one gradient is carried, the other's rows are collected and scattered."""
    i_t, t_t = ids.T, tags.T

    def step(h, x):
        new = jnp.tanh((p["emb"][x[0]] * p["gate"][x[1]]) @ p["ih"] + h @ p["hh"])
        return new, (h, new)

    start = jnp.zeros((ids.shape[0], HIDDEN), jnp.float32)
    last, (before, after) = jax.lax.scan(step, start, (i_t, t_t))
    loss, (g_out, g_last) = jax.value_and_grad(lambda out, h: cross_entropy(dense(h, out), labels), (0, 1))(
        p["out"], last
    )

    def back(carry, x):
        g, g_gate, g_ih, g_hh = carry
        i, t, h, new = x
        dz = g * (1 - new * new)
        rows, gates = p["emb"][i], p["gate"][t]
        de = dz @ p["ih"].T
        carry = (dz @ p["hh"].T, g_gate.at[t].add(de * rows), g_ih + (rows * gates).T @ dz, g_hh + h.T @ dz)
        return carry, de * gates

    zeros = [jnp.zeros_like(p[key]) for key in ("gate", "ih", "hh")]
    read = (i_t[::-1], t_t[::-1], before[::-1], after[::-1])
    (_, *grads), rows = jax.lax.scan(back, (g_last, *zeros), read)
    return loss, jnp.zeros_like(p["emb"]).at[i_t[::-1]].add(rows), *grads, g_out


def write(name, function, parameters, data, dynamic=None):
    """Export a step with parameters as inputs; `dynamic` is the axis of the batch in each data input."""
    keys = [*parameters]

    def flat(*values):
        return function(dict(zip(keys, values[: len(keys)], strict=True)), *values[len(keys) :])

    specs = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in parameters.values()]
    for index, value in enumerate(data.values()):
        shape = list(value.shape)
        if dynamic is not None:
            shape[dynamic[index]] = "B"
        specs.append(jax.ShapeDtypeStruct(tuple(shape), value.dtype))
    model = to_onnx(flat, specs, model_name=name, opset=21)
    inputs, outputs = [*keys, *data], ["loss", *(f"{key}_grad" for key in keys)]
    names = {item.name: new for item, new in zip(model.graph.input, inputs, strict=True)}
    names.update({item.name: new for item, new in zip(model.graph.output, outputs, strict=True)})
    rename(model.graph, names)
    onnx.save(model, FOLDER / f"{name}.onnx")
    values = [*parameters.values(), *data.values()]
    results = flat(*[jnp.asarray(value) for value in values])
    arrays = {f"in:{key}": value for key, value in zip(inputs, values, strict=True)}
    arrays.update({f"ref:{key}": np.asarray(value) for key, value in zip(outputs, results, strict=True)})
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def rename(graph, names):
    for node in graph.node:
        node.input[:] = [names.get(item, item) for item in node.input]
        node.output[:] = [names.get(item, item) for item in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                rename(attribute.g, names)
    for item in (*graph.input, *graph.output, *graph.value_info):
        item.name = names.get(item.name, item.name)


def network(classes=CLASSES):
    return {
        "emb": weight(VOCAB, WIDTH),
        "ih": weight(WIDTH, HIDDEN),
        "hh": weight(HIDDEN, HIDDEN),
        "out": weight(HIDDEN, classes),
    }


def main():
    labels = integers(CLASSES, BATCH)
    write(
        "jax_take",
        classifier(lambda w, i: jnp.take(w, i, axis=0), lambda a, i, g: a.at[i].add(g)),
        network(),
        {"ids": integers(VOCAB, 6, BATCH), "labels": labels},
        dynamic=(1, 0),
    )
    write(
        "jax_add_of_scatters",
        classifier(
            lambda w, i: w.at[i].get(mode="promise_in_bounds"),
            lambda a, i, g: a + jnp.zeros_like(a).at[i].add(g),
        ),
        network(),
        {"ids": integers(VOCAB, 9, BATCH), "labels": labels},
    )
    write("jax_language_model", language_model, network(VOCAB), {"ids": integers(VOCAB, 6, BATCH)})
    write(
        "jax_two_tables",
        two_tables,
        {
            "emb": weight(VOCAB, WIDTH),
            "gate": weight(TAGS, WIDTH),
            **{k: v for k, v in network().items() if k != "emb"},
        },
        {"ids": integers(VOCAB, BATCH, 4), "tags": integers(TAGS, BATCH, 4), "labels": labels},
    )


if __name__ == "__main__":
    main()
