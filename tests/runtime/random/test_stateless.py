"""Random operators by seed and position: the numbers, their distribution, and what stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.random import stateless
from kfac_onnx.runtime.random.random_nodes import KEYS
from kfac_onnx.runtime.random.stateless import RandomKeys, RandomOperator, make_stateless
from kfac_onnx.runtime.step.tensors import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

MASK = (1 << 64) - 1


def split_mix(key: int, count: int) -> list[int]:
    """SplitMix64, by Python's integers."""
    out = []
    for i in range(1, count + 1):
        z = (key + i * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        out.append(z ^ z >> 31)
    return out


def model(
    text: str, inputs: dict[str, int], outputs: dict[str, int], opset: int = 18, **constants: Any
) -> onnx.ModelProto:
    """A model of nodes in ONNX's text form, with inputs and outputs of unknown shape."""
    graph = onnx.parser.parse_graph(f"g () => () {{ {text} }}")
    info = helper.make_tensor_value_info
    graph.input.extend(info(name, element, None) for name, element in inputs.items())
    graph.output.extend(info(name, element, None) for name, element in outputs.items())
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


class Drawn:
    """A model whose random operators were rewritten, and which can be run at a position."""

    def __init__(self, proto: onnx.ModelProto, seed: int | None = 0, threads: int = 1) -> None:
        self.operators = make_stateless([proto], {value.name: value for value in proto.graph.input})
        self.keys = RandomKeys(self.operators, seed)
        self.session = open_session(proto, ["CPUExecutionProvider"], threads=threads)

    def at(self, position: int, **feeds: np.ndarray) -> list[np.ndarray]:
        self.keys.set(position)
        return self.session.run(None, {**feeds, KEYS: self.keys.array})


FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
DROPOUT = "y, m = Dropout (x, r, t)"


def dropout(ratio: float = 0.25, *, element: int = FLOAT, training: bool | None = True) -> onnx.ModelProto:
    inputs = {"x": element} | ({"t": BOOL} if training is None else {})
    constants = {} if training is None else {"t": np.array(training)}
    return model(DROPOUT, inputs, {"y": element, "m": BOOL}, r=np.float32(ratio), **constants)


def test_the_numbers_are_those_of_splitmix() -> None:
    """3 x 700 entries: more than one row of 1024, the last one not full."""
    proto = model("y = RandomUniformLike (x)", {"x": FLOAT}, {"y": FLOAT})
    drawn = Drawn(proto, seed=5)
    (found,) = drawn.at(2, x=np.zeros((3, 700), np.float32))
    want = np.array([z >> 40 for z in split_mix(int(drawn.keys.array[0]), 2100)], np.float64) / 2**24
    np.testing.assert_array_equal(found.astype(np.float64), want.reshape(3, 700))


def test_dropout_keeps_what_is_not_below_the_ratio() -> None:
    drawn = Drawn(dropout(0.25))
    x = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    y, mask = drawn.at(7, x=x)
    want = np.array([z >> 40 for z in split_mix(int(drawn.keys.array[0]), x.size)]) >= 0.25 * 2**24
    np.testing.assert_array_equal(mask, want.reshape(x.shape))
    np.testing.assert_allclose(
        y, np.where(mask, x / 0.75, 0.0), rtol=2e-7
    )  # one rounding of 1 / 0.75, one of *


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_share_the_mean_and_the_steps_are_independent(ratio: float) -> None:
    """All within five standard deviations of what independent draws give."""
    drawn = Drawn(dropout(ratio))
    n = 100_000
    x = np.ones((n // 50, 50), np.float32)
    masks = np.stack([drawn.at(step, x=x)[1].reshape(-1) for step in range(20)]).astype(np.float64)
    spread = np.sqrt(ratio * (1 - ratio))
    assert np.abs(masks.mean(1) - (1 - ratio)).max() < 5 * spread / np.sqrt(n)
    z = (masks - (1 - ratio)) / spread
    assert np.abs((z @ z.T / n)[~np.eye(20, dtype=bool)]).max() < 5 / np.sqrt(n)  # between steps
    for lag in (1, 2, 50, 1024):  # within a step: neighbours, the entry below, the row of the numbering
        assert np.abs((z[:, lag:] * z[:, :-lag]).mean(1)).max() < 5 / np.sqrt(n - lag)
    per_column = masks.reshape(20, -1, 50).mean((0, 1))
    assert np.abs(per_column - (1 - ratio)).max() < 5 * spread / np.sqrt(20 * n / 50)
    (y, _) = drawn.at(0, x=x)
    assert abs(float(y.mean()) - 1) < 5 * spread / (1 - ratio) / np.sqrt(n)


def test_each_operator_seed_and_position_draws_its_own() -> None:
    text = "a = RandomUniform <shape = [500]> () b = RandomUniform <shape = [500]> ()"
    seen = {
        array.tobytes()
        for seed in (0, 1)
        for position in (0, 1, 2)
        for array in Drawn(model(text, {}, {"a": FLOAT, "b": FLOAT}), seed).at(position)
    }
    assert len(seen) == 12


def test_threads_draw_the_same() -> None:
    x = np.random.default_rng(0).standard_normal((300, 1000)).astype(np.float32)
    one, four = (Drawn(dropout(), threads=threads).at(3, x=x) for threads in (1, 4))
    assert [a.tobytes() for a in one] == [a.tobytes() for a in four]


def test_without_a_seed_the_exporters_counts_and_else_the_sessions_own() -> None:
    def numbers(seed: int | None, entropy: int) -> list[int]:
        keys = RandomKeys([RandomOperator("a", 3), RandomOperator("b", None)], seed)
        keys.entropy = entropy
        keys.set(9)
        return keys.array.tolist()

    assert numbers(None, 1)[0] == numbers(None, 2)[0]
    assert numbers(None, 1)[1] != numbers(None, 2)[1]
    assert numbers(4, 1) == numbers(4, 2)
    assert numbers(4, 1) != numbers(5, 1)
    given = Drawn(model("y = RandomUniform <shape = [2], seed = 1.5> ()", {}, {"y": FLOAT}))
    assert given.operators == [RandomOperator("y", 1.5)]
    assert RandomKeys([], None).entropy != RandomKeys([], None).entropy


@pytest.mark.parametrize("kind", ["given", "constant"])
def test_training_off_changes_nothing(kind: str) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    drawn = Drawn(dropout(training=None if kind == "given" else False))
    y, mask = drawn.at(0, x=x, **({"t": np.array(False)} if kind == "given" else {}))
    np.testing.assert_array_equal(y, x)
    assert mask.all()


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (1024,), (2, 1, 3)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    y, mask = Drawn(dropout(0.5)).at(0, x=np.ones(shape, np.float32))
    assert y.shape == mask.shape == shape
    np.testing.assert_array_equal(y, 2.0 * mask)


@pytest.mark.parametrize("element", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_dropout_in_other_types(element: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(element)
    x = np.linspace(1, 2, 500).astype(dtype)
    y, mask = Drawn(dropout(0.5, element=element)).at(0, x=x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, np.where(mask, x * dtype.type(2), dtype.type(0)))
    assert 200 < mask.sum() < 300


def test_a_ratio_of_zero_keeps_all_and_one_half_is_the_default() -> None:
    x = np.ones(1000, np.float32)
    y, _ = Drawn(dropout(0.0)).at(0, x=x)
    np.testing.assert_array_equal(y, x)
    proto = model("y = Dropout (x, , t)", {"x": FLOAT}, {"y": FLOAT}, t=np.array(True))
    (y,) = Drawn(proto).at(0, x=x)
    assert set(y.tolist()) == {0.0, 2.0}


def test_uniform_normal_and_bernoulli_have_their_moments() -> None:
    """Five standard deviations of mean and variance, from the fourth moments of each distribution."""
    n = 200_000
    text = (
        "u = RandomUniformLike <low = -1.0, high = 3.0> (x)"
        "n = RandomNormalLike <mean = 2.0, scale = 0.5> (x) b = Bernoulli <dtype = 6> (p)"
    )
    names = {"u": FLOAT, "n": FLOAT, "b": TensorProto.INT32}
    drawn = Drawn(model(text, {"x": FLOAT, "p": FLOAT}, names))
    u, normal, b = drawn.at(0, x=np.zeros(n, np.float32), p=np.full(n, 0.3, np.float32))
    for found, mean, var, fourth in (
        (u, 1.0, 16 / 12, 1.8),
        (normal, 2.0, 0.25, 3.0),
        (b, 0.3, 0.21, 1.7619),
    ):
        assert abs(float(found.mean(dtype=np.float64)) - mean) < 5 * np.sqrt(var / n)
        assert abs(float(found.var(dtype=np.float64)) - var) < 5 * var * np.sqrt((fourth - 1) / n)
    assert -1.0 <= u.min() < u.max() < 3.0
    assert np.isfinite(normal).all()
    assert set(np.unique(b)) == {0, 1}
    tails = np.abs((normal - 2) / 0.5) > 3  # 0.0027 of a normal distribution
    assert abs(float(tails.mean()) - 0.0026998) < 5 * np.sqrt(0.0027 / n)


@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_uniform_numbers_stay_below_the_upper_end(element: int) -> None:
    text = f"y = RandomUniform <shape = [20000], dtype = {int(element)}> ()"
    (y,) = Drawn(model(text, {}, {"y": element})).at(0)
    assert y.dtype == helper.tensor_dtype_to_np_dtype(element)
    assert 0.0 <= y.min() < 0.01
    assert 0.99 < y.max() < 1.0


def test_what_stays_as_it_is() -> None:
    """Loops would draw the same in each iteration; opset 17 has no BitwiseXor; a type that is not known."""
    inner = "y = Loop (n, , x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] z)"
    inner += " { d = Identity (c) z, k = Dropout (s, r, t) }>"
    constants: dict[str, Any] = {"n": np.int64(3), "r": np.float32(0.5), "t": np.array(True)}
    plain = {name: value for name, value in constants.items() if name != "n"}
    for proto in (
        model(inner, {"x": FLOAT}, {"y": FLOAT}, **constants),
        model(DROPOUT, {"x": FLOAT}, {"y": FLOAT}, 17, **plain),
        model("h = Abs (x) y = Dropout (h, r, t)", {"x": FLOAT}, {"y": FLOAT}, **plain),
        model("y = Dropout (x, r)", {"x": FLOAT}, {"y": FLOAT}, r=np.float32(0.5)),
    ):
        before = proto.SerializeToString()
        assert make_stateless([proto], {value.name: value for value in proto.graph.input}) == []
        assert proto.SerializeToString() == before


def test_an_onnxruntime_without_the_integers_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfac_onnx.runtime.random import random_nodes

    def refused(*_: object, **__: object) -> ort.InferenceSession:
        raise UserError("NOT_IMPLEMENTED")

    random_nodes.has_kernels.cache_clear()
    monkeypatch.setattr(random_nodes, "open_session", refused)
    assert make_stateless([dropout()], {"x": dropout().graph.input[0]}) == []
    random_nodes.has_kernels.cache_clear()
    monkeypatch.undo()
    assert len(make_stateless([dropout()], {"x": dropout().graph.input[0]})) == 1
    assert stateless.has_kernels()


def test_bfloat16_numbers_are_drawn_in_its_bits() -> None:
    text = f"h = RandomUniform <shape = [5000], dtype = {int(TensorProto.BFLOAT16)}> () y = Cast <to = 1> (h)"
    (y,) = Drawn(model(text, {}, {"y": FLOAT})).at(0)
    np.testing.assert_array_equal(y, y.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert y.max() < 1.0
    assert abs(float(y.mean()) - 0.498) < 5 * np.sqrt(1 / 12 / 5000)  # 256 steps of 1/256 have mean 255/512
