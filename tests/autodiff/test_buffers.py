"""Buffers that look like weights are frozen, named with the reason, and trained where the user says so."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.metadata import Frozen, Parameter

RNG = np.random.default_rng(4)
FREQUENCIES = "frequencies: it meets only positions on its way into a sine"
SPACED = "equally spaced numbers, as positions and centres are"
SLOPES = "a geometric series that multiplies only positions"
ANGLES = "cosines and sines of positions"


def model_of(nodes: str, arrays: dict[str, np.ndarray], inputs: str = "int64[N, 6] ids") -> onnx.ModelProto:
    """Return rows of a table [20, 4] with something else made of `nodes` added: u of shape [.., 6, 4]."""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g ({inputs}) => (float[N, 6, 4] z) <int64 none = {{0}}, int64 six = {{6}}, int64 step = {{1}}, int64[1] back = {{-1}}> {{
            h = Gather(table, ids) {nodes} z = Add(h, u)
        }}""")
    table = {"table": RNG.standard_normal((20, 4)).astype(np.float32)}
    for name, array in {**table, **arrays}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def told(model: onnx.ModelProto, **options: object) -> tuple[list[str], dict[str, str]]:
    made = kx.differentiate(model, loss="mse", **options)
    trained = [item.name for item in metadata.read_list(made, "parameters", Parameter)]
    return trained, {item.name: item.reason for item in metadata.read_list(made, "frozen", Frozen)}


RANGE = "r = Range(none, six, step) f = Cast<to: int = 1>(r) k = Unsqueeze(f, back)"
INVERSE = (10000.0 ** (-np.arange(2) / 2)).astype(np.float32)
RANDOM = RNG.uniform(0.1, 1, 2).astype(np.float32)
WAVES = np.cos(np.outer(np.arange(6), [1.0, 0.3, 0.1, 0.01])).astype(np.float32)

FROZEN = {
    "rotary": (
        f"{RANGE} a = Mul(k, inv) c = Cos(a) s = Sin(a) u = Concat<axis: int = -1>(c, s)",
        {"inv": RANDOM},
        FREQUENCIES,
    ),
    "rotary_of_an_input": (
        "f = Cast<to: int = 1>(ids) k = Unsqueeze(f, back) a = Mul(k, inv) c = Cos(a) s = Sin(a) "
        "u = Concat<axis: int = -1>(c, s)",
        {"inv": RANDOM},
        FREQUENCIES,
    ),
    "rotary_by_matrix": (
        f"{RANGE} w = Unsqueeze(inv, at) a = MatMul(k, w) c = Cos(a) s = Sin(a) "
        "u = Concat<axis: int = -1>(c, s)",
        {"inv": RANDOM, "at": np.array([0])},
        FREQUENCIES,
    ),
    "rotary_scaled": (
        f"{RANGE} w = Mul(inv, k2) a = Mul(k, w) c = Cos(a) s = Sin(a) u = Concat<axis: int = -1>(c, s)",
        {"inv": INVERSE, "k2": np.array([0.5], np.float32)},
        FREQUENCIES,
    ),
    "centres": (
        "n = ReduceMean<keepdims: int = 1>(h, back) d = Sub(n, inv) q = Mul(d, d) m = Neg(q) u = Exp(m)",
        {"inv": np.linspace(0, 5, 4).astype(np.float32)},
        SPACED,
    ),
    "slopes": (
        f"{RANGE} u = Mul(k, inv)",
        {"inv": (0.25 ** np.arange(1, 5)).astype(np.float32)},
        SLOPES,
    ),
    "folded_cosines": ("u = Mul(h, inv)", {"inv": WAVES}, ANGLES),
    "folded_sines": (
        "u = Mul(h, inv)",
        {"inv": np.sin(np.outer(np.arange(8), [1.6, 0.3, 0.1, 0.01]))[None, :6].astype(np.float32)},
        ANGLES,
    ),
}


@pytest.mark.parametrize(("nodes", "arrays", "reason"), FROZEN.values(), ids=FROZEN)
def test_a_buffer_is_frozen_and_named(nodes: str, arrays: dict[str, np.ndarray], reason: str) -> None:
    trained, frozen = told(model_of(nodes, arrays))
    assert trained == ["table"]
    assert frozen["inv"] == reason


def test_it_is_trained_where_the_user_names_it() -> None:
    nodes, arrays, _ = FROZEN["rotary"]
    assert told(model_of(nodes, arrays), train=["table", "inv"])[0] == ["table", "inv"]
    assert told(model_of(nodes, arrays), train=["*"])[0] == ["table", "inv"]
    trained, frozen = told(model_of(nodes, arrays), freeze=["inv"])
    assert (trained, frozen["inv"]) == (["table"], "frozen by the user")


TRAINED = {
    # a frequency of a quantity that the batch brings, and of activations
    "of_a_float_input": (
        "k = Unsqueeze(x, back) a = Mul(k, w) u = Sin(a)",
        {"w": RNG.standard_normal(4).astype(np.float32)},
    ),
    "of_activations": ("a = Mul(h, w) u = Sin(a)", {"w": RNG.standard_normal(4).astype(np.float32)}),
    # a layer over coordinates
    "matrix": (f"{RANGE} a = MatMul(k, w) u = Sin(a)", {"w": RNG.standard_normal((1, 4)).astype(np.float32)[:, :] * np.ones((1, 4), np.float32)}),
    # equally spaced at the start, and multiplied with activations
    "mixing": ("u = Mul(h, w)", {"w": (np.arange(4) / 4).astype(np.float32)}),
    "bias": ("u = Identity(w)", {"w": RNG.standard_normal(4).astype(np.float32)}),
    "positions": ("u = Identity(w)", {"w": RNG.uniform(-1, 1, (6, 4)).astype(np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "arrays"), [case for name, case in TRAINED.items() if name != "matrix"], ids=[n for n in TRAINED if n != "matrix"]
)  # fmt: skip
def test_a_weight_is_none(nodes: str, arrays: dict[str, np.ndarray]) -> None:
    inputs = "int64[N, 6] ids, float[N, 6] x"
    trained, frozen = told(model_of(nodes, arrays, inputs))
    assert trained == ["table", "w"]
    assert frozen == {}


def test_a_layer_over_coordinates_is_trained() -> None:
    arrays = {
        "w": RNG.standard_normal((2, 4)).astype(np.float32),
        "grid": np.arange(12, dtype=np.float32).reshape(6, 2),
    }
    trained, _ = told(model_of("a = MatMul(grid, w) u = Sin(a)", arrays), freeze=["grid"])
    assert trained == ["table", "w"]


def test_quantized_tables_and_their_scales_are_named() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "sc"], ["rows"], axis=0),
        helper.make_node("Gather", ["rows", "ids"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["z"]),
    ]
    arrays = {
        "q": RNG.integers(-128, 128, (7, 4)).astype(np.int8),
        "sc": RNG.uniform(0.01, 0.1, 7).astype(np.float32),
        "w": RNG.standard_normal((4, 3)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    trained, frozen = told(model)
    assert trained == ["w"]
    assert frozen == {
        "q": "quantized numbers have no derivative: train it in floating point",
        "sc": "scales of a quantized tensor",
    }
