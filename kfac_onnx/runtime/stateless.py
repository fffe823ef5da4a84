"""Random operators as functions of (seed, data position, place in the tensor), so that a resumed run draws the same.

ONNX Runtime's own keep a hidden state that starts anew with every session. Here each of them becomes standard
integer operators: entry i of a tensor gets the 64 bits

    z = key + i g        z = (z ^ z >> 30) m1        z = (z ^ z >> 27) m2        z = z ^ z >> 31      (mod 2^64)

which is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 17) started
at `key`; the key comes anew for every operator and data position from the host (see `RandomKeys`). Numbers in
[0, 1) are the upper 24 bits of z; `Dropout` keeps an entry where that is at least the ratio.

Integers are exact, so the numbers do not depend on threads, and both halves of a step see the same.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["KEYS", "RandomKeys", "make_stateless"]

KEYS: Final = "kfac/random/keys"
"""The input, uint64[operators]: a key per operator, new for every data position."""

_G: Final = 0x9E3779B97F4A7C15
_M1: Final = 0xBF58476D1CE4E5B9
_M2: Final = 0x94D049BB133111EB
_WIDTH: Final = 1024
"""Entries are numbered in rows of this many, so that numbering them is one addition."""
_BITS: Final = 24
"""Of a number in [0, 1): what a float32 holds exactly."""
_OPSET: Final = 18
"""From which on there is `BitwiseXor`."""
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.DOUBLE)
_NARROW: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_NARROW_BITS: Final = {TensorProto.FLOAT16: 11, TensorProto.BFLOAT16: 8}


@dataclass(frozen=True)
class _Operator:
    """A random operator: the name of what it makes, and the seed that the exporter gave it."""

    name: str
    seed: int | float | None


class RandomKeys:
    """The keys of a graph's random operators, written into `array` (uint64[operators]) for each data position.

    A key is a hash of the seed, the position and the operator's output. Without a `seed` the exporter's count;
    operators without one take `entropy`, which is drawn here and belongs into the checkpoint.
    """

    def __init__(self, operators: Iterable[_Operator], seed: int | None) -> None:
        self._operators = tuple(operators)
        self._seed = seed
        self.entropy: int = secrets.randbits(63)
        self.array = np.zeros(len(self._operators), np.uint64)

    def __len__(self) -> int:
        return len(self._operators)

    def set(self, position: int) -> None:
        """Write the keys of a data position."""
        for index, item in enumerate(self._operators):
            own = f"entropy {self.entropy}" if item.seed is None else f"exporter {item.seed}"
            seed = own if self._seed is None else f"seed {self._seed}"
            digest = hashlib.sha256(f"{seed}, position {position}, {item.name}".encode()).digest()
            self.array[index] = int.from_bytes(digest[:8], "little")


def make_stateless(models: Iterable[onnx.ModelProto], types: Mapping[str, onnx.ValueInfoProto]) -> list[_Operator]:
    """Rewrite the random operators of some models in place; return them, in the order of their keys.

    Left as they are: operators within loops and branches (their iterations would draw the same), `Multinomial`,
    what has no known float type, models of an opset before 18, and everything where this onnxruntime has no
    kernels for the integers.
    """
    found: list[_Operator] = []
    for model in models:
        opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
        if opset < _OPSET or not any(_rule(node, types) for node in model.graph.node) or not _has_kernels():
            continue
        nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            rule = _rule(node, types)
            if rule is None:
                nodes.append(node)
                continue
            seeds = [helper.get_attribute_value(item) for item in node.attribute if item.name == "seed"]
            emit = _Emit(f"kfac/random/{len(found)}/", len(found))
            rule(emit, node)
            nodes += emit.nodes
            model.graph.initializer.extend(emit.constants)
            found.append(_Operator(node.output[0], seeds[0] if seeds else None))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        if any(KEYS in node.input for node in nodes):
            model.graph.input.append(helper.make_tensor_value_info(KEYS, TensorProto.UINT64, [None]))
    return found


class _Emit:
    """Nodes and constants in the place of one operator."""

    def __init__(self, prefix: str, index: int) -> None:
        self._prefix, self._index = prefix, index
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def name(self) -> str:
        return f"{self._prefix}{len(self.nodes) + len(self.constants)}"

    def constant(self, value: object, dtype: type[np.generic]) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, makes: str | None = None, **attributes: object) -> str:
        name = self.name() if makes is None else makes
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{self._prefix}{kind}_{name}", **attributes))
        return name

    def cast(self, value: str, element: int, makes: str | None = None) -> str:
        return self.add("Cast", value, makes=makes, to=element)

    def bits(self, shape: str, *, mixed: bool = False) -> tuple[str, str]:
        """Return uint64[rows, 1024] random bits for a shape, and the number of its entries.

        Without `mixed` only the upper 33 bits are random.
        """
        count = self.add("ReduceProd", shape, keepdims=0)
        rows = self.add("Div", self.add("Add", count, self._int(_WIDTH - 1)), self._int(_WIDTH))
        number = self.cast(self.add("Range", self._int(0), rows, self._int(1)), TensorProto.UINT64)
        step = self.constant(_WIDTH * _G % 2**64, np.uint64)
        row = self.add("Unsqueeze", self.add("Mul", number, step), self.constant([1], np.int64))
        key = self.add("Gather", KEYS, self._int(self._index))
        first = self.constant([(i + 1) * _G % 2**64 for i in range(_WIDTH)], np.uint64)
        z = self.add("Add", row, self.add("Add", first, key))
        for places, factor in ((30, _M1), (27, _M2)):
            z = self.add("Mul", self._fold(z, places), self.constant(factor, np.uint64))
        return (self._fold(z, 31) if mixed else z), count

    def _int(self, value: int) -> str:
        return self.constant(value, np.int64)

    def shift(self, z: str, places: int) -> str:
        return self.add("BitShift", z, self.constant(places, np.uint64), direction="RIGHT")

    def _fold(self, z: str, places: int) -> str:
        return self.add("BitwiseXor", z, self.shift(z, places))

    def shaped(self, value: str, count: str, shape: str) -> str:
        """Return the first `count` entries of a value in a shape."""
        flat = self.add("Reshape", value, self.constant([-1], np.int64))
        end = self.add("Unsqueeze", count, self.constant([0], np.int64))
        cut = self.add("Slice", flat, self.constant([0], np.int64), end)
        return self.add("Reshape", cut, shape, allowzero=1)

    def uniform(self, shape: str, element: int, *, bits: int = _BITS) -> str:
        """Return numbers in [0, 1) of so many bits, in a shape."""
        z, count = self.bits(shape)
        part = self.cast(self.shaped(self.shift(z, 64 - bits), count, shape), element)
        return self.add("Mul", part, self.cast(self.constant(2.0**-bits, np.float64), element))

    def normal(self, shape: str) -> str:
        """Return float32 numbers of the standard normal distribution (Box and Muller 1958), in a shape."""
        z, count = self.bits(shape, mixed=True)
        low = self.add("BitwiseAnd", z, self.constant(2**_BITS - 1, np.uint64))
        one, other = (self.cast(self.shaped(item, count, shape), TensorProto.FLOAT) for item in (self.shift(z, 40), low))
        unit = self.constant(2.0**-_BITS, np.float32)
        above = self.add("Mul", self.add("Add", one, self.constant(1.0, np.float32)), unit)  # (0, 1]
        radius = self.add("Sqrt", self.add("Mul", self.add("Log", above), self.constant(-2.0, np.float32)))
        angle = self.add("Mul", other, self.constant(2 * np.pi * 2.0**-_BITS, np.float32))
        return self.add("Mul", radius, self.add("Cos", angle))


_Rule = Callable[[_Emit, onnx.NodeProto], None] if TYPE_CHECKING else object


def _rule(node: onnx.NodeProto, types: Mapping[str, onnx.ValueInfoProto]) -> _Rule | None:
    """Return what rewrites a node, or None where it stays."""
    if node.domain not in ("", "ai.onnx") or not node.output:
        return None
    if node.op_type == "Dropout":
        element = _element(node.input[0], types)
        drops = len(node.input) > 2 and node.input[2]
        return (lambda emit, node: _dropout(emit, node, element)) if drops and element else None
    if node.op_type == "Bernoulli":
        element = _attributes(node).get("dtype") or _element(node.input[0], types)
        return (lambda emit, node: _bernoulli(emit, node, element)) if element else None
    if node.op_type in ("RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike"):
        given = _attributes(node).get("dtype")
        element = given or (_element(node.input[0], types) if node.input else TensorProto.FLOAT)
        known = element in (*_FLOATS, *_NARROW)
        return (lambda emit, node: _numbers(emit, node, element)) if known else None
    return None


def _element(name: str, types: Mapping[str, onnx.ValueInfoProto]) -> int:
    """Return a value's float type, or 0."""
    element = types[name].type.tensor_type.elem_type if name in types else 0
    return element if element in (*_FLOATS, *_NARROW) else 0


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _dropout(emit: _Emit, node: onnx.NodeProto, element: int) -> None:
    """Dropout(X, ratio = 0.5, training): mask = u >= ratio, Y = X mask / (1 - ratio); without training Y = X."""
    x, training = node.input[0], node.input[2]
    ratio = node.input[1] or emit.constant(0.5, np.float32)
    shape = emit.add("Shape", x)
    z, count = emit.bits(shape)
    wide = emit.cast(ratio, TensorProto.DOUBLE)
    places = emit.add("Ceil", emit.add("Mul", wide, emit.constant(2.0**_BITS, np.float64)))
    least = emit.add(
        "BitShift", emit.cast(places, TensorProto.UINT64), emit.constant(64 - _BITS, np.uint64), direction="LEFT"
    )
    drawn = emit.shaped(emit.add("GreaterOrEqual", z, least), count, shape)
    mask_name = node.output[1] if len(node.output) > 1 and node.output[1] else None
    mask = emit.add("Or", drawn, emit.add("Not", training), makes=mask_name)
    one = emit.constant(1.0, np.float64)
    share = emit.add("Where", training, emit.add("Div", one, emit.add("Sub", one, wide)), one)
    work = TensorProto.FLOAT if element in _NARROW else element
    value = emit.cast(x, work) if work != element else x
    kept = emit.add("Mul", value, emit.cast(share, work))
    zero = emit.cast(emit.constant(0.0, np.float32), work)
    if work == element:
        emit.add("Where", mask, kept, zero, makes=node.output[0])
    else:
        emit.cast(emit.add("Where", mask, kept, zero), element, makes=node.output[0])


def _bernoulli(emit: _Emit, node: onnx.NodeProto, element: int) -> None:
    """Bernoulli(p): 1 where u < p."""
    chance = emit.cast(node.input[0], TensorProto.FLOAT)
    u = emit.uniform(emit.add("Shape", node.input[0]), TensorProto.FLOAT)
    emit.cast(emit.add("Less", u, chance), element, makes=node.output[0])


def _numbers(emit: _Emit, node: onnx.NodeProto, element: int) -> None:
    """RandomUniform (low + (high - low) u) and RandomNormal (mean + scale n), by a shape or like a tensor."""
    given = _attributes(node)
    shape = emit.add("Shape", node.input[0]) if node.input else emit.constant(given["shape"], np.int64)
    work = TensorProto.FLOAT if element in _NARROW else element
    if node.op_type.startswith("RandomUniform"):
        low, high = (float(str(given.get(name, default))) for name, default in (("low", 0.0), ("high", 1.0)))
        drawn, scale, offset = emit.uniform(shape, work, bits=_NARROW_BITS.get(element, _BITS)), high - low, low
    else:
        mean, scale = (float(str(given.get(name, default))) for name, default in (("mean", 0.0), ("scale", 1.0)))
        drawn, offset = emit.cast(emit.normal(shape), work), mean
    scaled = emit.add("Mul", drawn, emit.cast(emit.constant(scale, np.float64), work))
    moved = emit.add("Add", scaled, emit.cast(emit.constant(offset, np.float64), work))
    emit.cast(moved, element, makes=node.output[0])


@cache
def _has_kernels() -> bool:
    """Say whether this onnxruntime computes with 64-bit unsigned integers as is needed here."""
    from kfac_onnx.runtime.tensors import open_session

    emit = _Emit("", 0)
    z, _ = emit.bits(emit.constant([3], np.int64))
    last = emit.add("GreaterOrEqual", z, emit.shift(z, 40), makes="y")
    graph = helper.make_graph(
        emit.nodes,
        "probe",
        [helper.make_tensor_value_info(KEYS, TensorProto.UINT64, [None])],
        [helper.make_tensor_value_info(last, TensorProto.BOOL, None)],
        emit.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    try:
        open_session(model, ["CPUExecutionProvider"], threads=1)
    except Exception:  # ONNX Runtime's exceptions share no class of their own
        return False
    return True
