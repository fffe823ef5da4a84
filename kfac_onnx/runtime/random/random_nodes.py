"""Random bits as a function of a key and of the place in a tensor, in standard ONNX operators on integers.

Entry i = 1, 2, ... of a tensor gets the 64 bits

    z = key + i g      z = (z ^ z >> 30) m1      z = (z ^ z >> 27) m2      z = z ^ z >> 31      (mod 2^64)

which is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17)
started at `key`. Numbers in [0, 1) are the upper 24 bits of z. Integers are exact, so that nothing depends on
threads.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.step.tensors import open_session

if TYPE_CHECKING:
    import onnx

__all__ = ["BITS", "KEYS", "OPSET", "RandomNodes", "has_kernels"]

KEYS: Final = "kfac/random/keys"
"""The input, uint64[operators]: a key per operator."""
BITS: Final = 24
"""Of a number in [0, 1): what a float32 holds exactly."""
OPSET: Final = 18
"""From which on there is `BitwiseXor`."""
_G: Final = 0x9E3779B97F4A7C15
_M1: Final = 0xBF58476D1CE4E5B9
_M2: Final = 0x94D049BB133111EB
_WIDTH: Final = 1024
"""Entries are numbered in rows of this many, so that numbering them is one addition."""


class RandomNodes:
    """The nodes and constants in the place of one random operator, whose key is the `index`-th of KEYS."""

    def __init__(self, index: int) -> None:
        self._prefix, self._index = f"kfac/random/{index}/", index
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def _name(self) -> str:
        return f"{self._prefix}{len(self.nodes) + len(self.constants)}"

    def constant(self, value: object, dtype: type[np.generic]) -> str:
        """Add a constant; return its name."""
        name = self._name()
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, makes: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        name = self._name() if makes is None else makes
        self.nodes.append(
            helper.make_node(kind, inputs, [name], name=f"{self._prefix}{kind}_{name}", **attributes)
        )
        return name

    def cast(self, value: str, element: int, makes: str | None = None) -> str:
        """Return a value in another element type."""
        return self.add("Cast", value, makes=makes, to=element)

    def bits(self, shape: str, *, mixed: bool = False) -> tuple[str, str]:
        """Return uint64[rows, 1024] random bits for a shape, and the number of its entries.

        Without `mixed` only the upper 33 bits are random.
        """
        count = self.add("ReduceProd", shape, keepdims=0)
        rows = self.add("Div", self.add("Add", count, self.integer(_WIDTH - 1)), self.integer(_WIDTH))
        number = self.cast(self.add("Range", self.integer(0), rows, self.integer(1)), TensorProto.UINT64)
        step = self.constant(_WIDTH * _G % 2**64, np.uint64)
        row = self.add("Unsqueeze", self.add("Mul", number, step), self.constant([1], np.int64))
        key = self.add("Gather", KEYS, self.integer(self._index))
        first = self.constant([(i + 1) * _G % 2**64 for i in range(_WIDTH)], np.uint64)
        z = self.add("Add", row, self.add("Add", first, key))
        for places, factor in ((30, _M1), (27, _M2)):
            z = self.add("Mul", self._folded(z, places), self.constant(factor, np.uint64))
        return (self._folded(z, 31) if mixed else z), count

    def integer(self, value: int) -> str:
        """Add an int64 scalar; return its name."""
        return self.constant(value, np.int64)

    def shift(self, z: str, places: int) -> str:
        """Return z >> places."""
        return self.add("BitShift", z, self.constant(places, np.uint64), direction="RIGHT")

    def _folded(self, z: str, places: int) -> str:
        return self.add("BitwiseXor", z, self.shift(z, places))

    def shaped(self, value: str, count: str, shape: str) -> str:
        """Return the first `count` entries of a value in a shape."""
        flat = self.add("Reshape", value, self.constant([-1], np.int64))
        end = self.add("Unsqueeze", count, self.constant([0], np.int64))
        cut = self.add("Slice", flat, self.constant([0], np.int64), end)
        return self.add("Reshape", cut, shape, allowzero=1)

    def uniform(self, shape: str, element: int, *, bits: int = BITS) -> str:
        """Return numbers in [0, 1) of so many bits, in a shape."""
        z, count = self.bits(shape)
        part = self.cast(self.shaped(self.shift(z, 64 - bits), count, shape), element)
        return self.add("Mul", part, self.cast(self.constant(2.0**-bits, np.float64), element))

    def normal(self, shape: str) -> str:
        """Return float32 numbers of the standard normal distribution (Box and Muller 1958), in a shape."""
        z, count = self.bits(shape, mixed=True)
        low = self.add("BitwiseAnd", z, self.constant(2**BITS - 1, np.uint64))
        one, other = (
            self.cast(self.shaped(item, count, shape), TensorProto.FLOAT) for item in (self.shift(z, 40), low)
        )
        unit = self.constant(2.0**-BITS, np.float32)
        above = self.add("Mul", self.add("Add", one, self.constant(1.0, np.float32)), unit)  # (0, 1]
        radius = self.add("Sqrt", self.add("Mul", self.add("Log", above), self.constant(-2.0, np.float32)))
        angle = self.add("Mul", other, self.constant(2 * np.pi * 2.0**-BITS, np.float32))
        return self.add("Mul", radius, self.add("Cos", angle))


@cache
def has_kernels() -> bool:
    """Say whether this onnxruntime computes with 64-bit unsigned integers as is needed here."""
    nodes = RandomNodes(0)
    z, _ = nodes.bits(nodes.constant([3], np.int64))
    nodes.add("GreaterOrEqual", z, nodes.shift(z, 40), makes="y")
    graph = helper.make_graph(
        nodes.nodes,
        "probe",
        [helper.make_tensor_value_info(KEYS, TensorProto.UINT64, [None])],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, None)],
        nodes.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    try:
        open_session(model, ["CPUExecutionProvider"], threads=1)
    except UserError:
        return False
    return True
