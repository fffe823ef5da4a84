"""A small training graph that contains its optimizer, written as text, and its gradients in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from kfac_onnx import metadata
from kfac_onnx.metadata import Parameter
from kfac_onnx.readers import read_training_graph

V, D, N = 5, 3, 4
SHAPES = {"W": (V, D), "v": (D, 1)}


@dataclass
class Optimizer:
    """How every parameter is updated: lines of text with {p}, {g} and {new}, and what they read.

    `inputs` and `outputs` are per parameter, `shared` inputs and `results` outputs of the whole graph,
    `constants` initializers.
    """

    lines: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    constants: str = ""
    common: str = ""
    after: str = ""
    tables: str = ""
    """What replaces `lines` for the table W, where not empty."""
    extra: dict[str, np.ndarray] = field(default_factory=dict)


FORWARD = """
    h = Gather<axis: int = 0>(W, ids)
    p = MatMul(h, v)
    e = Sub(p, y)
    s = Mul(e, e)
    loss = ReduceMean<keepdims: int = 0>(s)
    size = Size(y)
    count = Cast<to: int = 1>(size)
    weight = Div(two, count)
    dp = Mul(weight, e)
    vt = Transpose(v)
    dh = MatMul(dp, vt)
    ht = Transpose(h)
    dv = MatMul(ht, dp)
    zeros = ConstantOfShape(shape)
    index = Unsqueeze(ids, last)
    dW = ScatterND<reduction: string = "add">(zeros, index, dh)
"""
CONSTANTS = "float two = {2.0}, int64[2] shape = {5, 3}, int64[1] last = {-1}"
GRADIENTS = {"W": "dW", "v": "dv"}


def graph_text(optimizer: Optimizer, order: tuple[str, ...] = ("W", "v")) -> str:
    """Return the model; outputs are called r0, r1, ... and carry no names of parameters."""
    inputs = [f"float[{','.join(map(str, SHAPES[name]))}] {name}" for name in ("W", "v")]
    inputs = ["int64[N] ids", "float[N, 1] y", *inputs, *optimizer.shared]
    outputs, lines = ["float loss"], []
    for number, name in enumerate(order):
        shape = ",".join(map(str, SHAPES[name]))
        names = {"p": name, "g": GRADIENTS[name], "new": f"r{number}", "n": number}
        inputs += [f"float[{shape}] {item.format(**names)}" for item in optimizer.inputs]
        outputs += [f"float[{shape}] {item.format(**names)}" for item in ("{new}", *optimizer.outputs)]
        text = optimizer.tables if name == "W" and optimizer.tables else optimizer.lines
        lines.append(text.format(**names))
    constants = CONSTANTS + (f", {optimizer.constants}" if optimizer.constants else "")
    body = "\n".join([FORWARD, optimizer.common, *lines, optimizer.after])
    return (
        '<ir_version: 9, opset_import: ["" : 18]>\n'
        f"train ({', '.join(inputs)}) => ({', '.join([*outputs, *optimizer.results])})\n"
        f"<{constants}>\n{{{body}}}"
    )


def model_of(optimizer: Optimizer, order: tuple[str, ...] = ("W", "v")) -> onnx.ModelProto:
    """Return the graph with its optimizer inside."""
    model = onnx.parser.parse_model(graph_text(optimizer, order))
    onnx.checker.check_model(model, full_check=True)
    return model


def values(seed: int = 0) -> dict[str, np.ndarray]:
    """Return parameters and a batch with a repeated id."""
    rng = np.random.default_rng(seed)
    return {
        "ids": np.asarray([1, 3, 1, 0]),
        "y": rng.standard_normal((N, 1)).astype(np.float32),
        "W": rng.standard_normal(SHAPES["W"]).astype(np.float32),
        "v": rng.standard_normal(SHAPES["v"]).astype(np.float32),
    }


def gradients(feed: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss and its gradients in float64."""
    W, v, y, ids = (np.asarray(feed[name], np.float64) for name in ("W", "v", "y", "ids"))
    rows = W[ids.astype(int)]
    error = rows @ v - y
    dp = 2.0 / len(y) * error
    dW = np.zeros_like(W)
    np.add.at(dW, ids.astype(int), dp @ v.T)
    return float(np.mean(error**2)), {"W": dW, "v": rows.T @ dp}


def run_canonical(model: ir.Model, feed: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Run a canonical graph by ONNX Runtime; return its loss and gradients by parameter."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = {item.name for item in session.get_inputs()}
    assert names <= set(feed), f"more inputs than the batch and the parameters: {names - set(feed)}"
    outputs = [item.name for item in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {name: feed[name] for name in names}), strict=True))
    parameters = metadata.read_list(model, "parameters", Parameter)
    return float(found["loss"]), {item.name: found[str(item.gradient)] for item in parameters}


def check(proto: onnx.ModelProto, scaled: float = 1.0, **reading: object) -> ir.Model:
    """Read a graph and compare its gradients with NumPy's; return the canonical graph."""
    model = read_training_graph(proto, **reading)
    feed = values()
    loss, found = run_canonical(model, feed)
    want_loss, want = gradients(feed)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert set(found) == set(want)
    for name, array in want.items():  # float32 rounding of a few products and sums
        np.testing.assert_allclose(found[name] * scaled, array, rtol=0, atol=2e-6 * np.abs(array).max())
    return model
