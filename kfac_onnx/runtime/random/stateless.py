"""Random operators as functions of seed and data position: a resumed run draws what it would have drawn.

ONNX Runtime's own keep a hidden state that starts anew with every session. Here each becomes standard
operators on integers (see `random_nodes`) with a key that the host makes anew for every operator and data
position. Both halves of a step see the same numbers, and so does a step that is made again.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from onnx import TensorProto, helper

from kfac_onnx.runtime.random.random_nodes import BITS, KEYS, OPSET, RandomNodes, has_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import onnx

__all__ = ["RandomKeys", "RandomOperator", "make_stateless"]

_NARROW: Final = {int(TensorProto.FLOAT16): 11, int(TensorProto.BFLOAT16): 8}
"""Types that numbers are drawn for in float32, and the bits of a number in [0, 1) that they hold exactly."""
_FLOATS: Final = (int(TensorProto.FLOAT), int(TensorProto.DOUBLE), *_NARROW)


@dataclass(frozen=True)
class RandomOperator:
    """A random operator: the name of what it makes, and the seed that the exporter gave it."""

    name: str
    seed: int | float | None


class RandomKeys:
    """The keys of a graph's random operators: `array` (uint64[operators]) at each data position.

    A key is a hash of the seed, the position and the operator's output. Without a `seed` the exporter's
    counts; operators without one take `entropy`, which is drawn here and belongs into the checkpoint.
    """

    def __init__(self, operators: Iterable[RandomOperator], seed: int | None) -> None:
        self._operators = tuple(operators)
        self._seed = seed
        self._position = 0
        self.entropy: int = secrets.randbits(63)
        self.array = np.zeros(len(self._operators), np.uint64)

    def __len__(self) -> int:
        return len(self._operators)

    def set(self, position: int) -> None:
        """Write the keys of a data position."""
        self._position = position
        self.array[:] = self.of(self._operators)

    def of(self, operators: Iterable[RandomOperator]) -> np.ndarray:
        """Return the keys of operators, in whatever part of the graph, at the position that was set last."""
        return np.array([self._key(item) for item in operators], np.uint64)

    def _key(self, item: RandomOperator) -> int:
        own = f"entropy {self.entropy}" if item.seed is None else f"exporter {item.seed}"
        seed = own if self._seed is None else f"seed {self._seed}"
        digest = hashlib.sha256(f"{seed}, position {self._position}, {item.name}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def make_stateless(
    models: Iterable[onnx.ModelProto], types: Mapping[str, onnx.ValueInfoProto]
) -> list[RandomOperator]:
    """Rewrite the random operators of some models in place; return them, in the order of their keys.

    One that several models have, because a host runs the one or the other, has one key.

    Left as they are: operators within loops and branches (iterations would draw the same), `Multinomial`,
    what has no known float type, and all where opset or onnxruntime lack the operators on integers.
    """
    found: dict[RandomOperator, int] = {}
    for model in models:
        versions = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
        chosen = [_element(node, types) for node in model.graph.node]
        if not any(chosen) or max(versions, default=0) < OPSET or not has_kernels():
            continue
        nodes: list[onnx.NodeProto] = []
        for node, element in zip(model.graph.node, chosen, strict=True):
            if not element:
                nodes.append(node)
                continue
            drawn = RandomOperator(node.output[0], _attributes(node).get("seed"))
            into = RandomNodes(found.setdefault(drawn, len(found)))
            _RULES[node.op_type](into, node, element)
            nodes += into.nodes
            model.graph.initializer.extend(into.constants)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.input.append(helper.make_tensor_value_info(KEYS, TensorProto.UINT64, [None]))
    return [*found]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _element(node: onnx.NodeProto, types: Mapping[str, onnx.ValueInfoProto]) -> int:
    """Return the type of what a random operator makes; 0 for a node that stays as it is."""
    if node.op_type not in _RULES or node.domain not in ("", "ai.onnx") or not node.output[0]:
        return 0
    if node.op_type == "Dropout" and (len(node.input) < 3 or not node.input[2]):
        return 0  # without training_mode it passes through
    known = node.input[0] in types if node.input else False
    like = types[node.input[0]].type.tensor_type.elem_type if known else 0
    element = int(_attributes(node).get("dtype", like if node.input else TensorProto.FLOAT))
    return element if element in _FLOATS or node.op_type == "Bernoulli" else 0


def _dropout(into: RandomNodes, node: onnx.NodeProto, element: int) -> None:
    """Y, mask = Dropout(X, ratio = 0.5, training): mask = u >= ratio, Y = X mask / (1 - ratio).

    Without training the mask is true everywhere and Y = X.
    """
    x, training = node.input[0], node.input[2]
    ratio = into.cast(node.input[1] or into.constant(0.5, np.float64), TensorProto.DOUBLE)
    shape = into.add("Shape", x)
    z, count = into.bits(shape)
    least = into.cast(
        into.add("Ceil", into.add("Mul", ratio, into.constant(2.0**BITS, np.float64))), TensorProto.UINT64
    )
    above = into.add("BitShift", least, into.constant(64 - BITS, np.uint64), direction="LEFT")
    drawn = into.shaped(into.add("GreaterOrEqual", z, above), count, shape)
    named = node.output[1] if len(node.output) > 1 and node.output[1] else None
    mask = into.add("Or", drawn, into.add("Not", training), makes=named)
    one = into.constant(1.0, np.float64)
    share = into.add("Where", training, into.add("Div", one, into.add("Sub", one, ratio)), one)
    work = TensorProto.FLOAT if element in _NARROW else element
    scaled = into.add("Mul", into.cast(x, work), into.cast(share, work))
    kept = into.add("Where", mask, scaled, into.cast(into.constant(0.0, np.float32), work))
    into.cast(kept, element, makes=node.output[0])


def _bernoulli(into: RandomNodes, node: onnx.NodeProto, element: int) -> None:
    """Bernoulli(p): 1 where u < p."""
    u = into.uniform(into.add("Shape", node.input[0]), TensorProto.FLOAT, bits=BITS)
    into.cast(into.add("Less", u, into.cast(node.input[0], TensorProto.FLOAT)), element, makes=node.output[0])


def _uniform(into: RandomNodes, node: onnx.NodeProto, element: int) -> None:
    """RandomUniform(low = 0, high = 1): low + (high - low) u."""
    given = _attributes(node)
    low, high = float(given.get("low", 0.0)), float(given.get("high", 1.0))
    work = TensorProto.FLOAT if element in _NARROW else element
    u = into.uniform(_shape(into, node), work, bits=_NARROW.get(element, BITS))
    _moved(into, node, u, high - low, low, element)


def _normal(into: RandomNodes, node: onnx.NodeProto, element: int) -> None:
    """RandomNormal(mean = 0, scale = 1): mean + scale n."""
    given = _attributes(node)
    mean, scale = float(given.get("mean", 0.0)), float(given.get("scale", 1.0))
    work = TensorProto.FLOAT if element in _NARROW else element
    _moved(into, node, into.cast(into.normal(_shape(into, node)), work), scale, mean, element)


def _shape(into: RandomNodes, node: onnx.NodeProto) -> str:
    if node.input:
        return into.add("Shape", node.input[0])
    return into.constant(_attributes(node)["shape"], np.int64)


def _moved(
    into: RandomNodes, node: onnx.NodeProto, drawn: str, scale: float, offset: float, element: int
) -> None:
    work = TensorProto.FLOAT if element in _NARROW else element
    scaled = into.add("Mul", drawn, into.cast(into.constant(scale, np.float64), work))
    moved = into.add("Add", scaled, into.cast(into.constant(offset, np.float64), work))
    into.cast(moved, element, makes=node.output[0])


_RULES: Final[dict[str, Callable[[RandomNodes, onnx.NodeProto, int], None]]] = {
    "Bernoulli": _bernoulli,
    "Dropout": _dropout,
    "RandomNormal": _normal,
    "RandomNormalLike": _normal,
    "RandomUniform": _uniform,
    "RandomUniformLike": _uniform,
}
