"""Values that are the same at every step, found out without running the graph.

All answers come from data flow and static shapes; names are never looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from kfac_onnx.disk.mapped import greatest
from kfac_onnx.graph.operators import (
    ELEMENTWISE,
    PRODUCTS,
    REDUCTIONS,
    SCATTERS,
    SIZES,
    VIEWS,
    Keeps,
    Trait,
    having,
    keeping,
)
from kfac_onnx.graph.values import ONNX_DOMAINS, int_attribute, is_float, static_shape

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Constants"]

LINEAR = having(Trait.LINEAR)
SCALES = having(Trait.SCALES)

SMALL = 1 << 16
"""Entries above which a constant expression is not evaluated."""

SPREADS = VIEWS | keeping(Keeps.SOME, Keeps.REPEATS)
"""Operators whose result is of nothing but entries of their first input."""
NO_LARGER = VIEWS | {"Range", "Slice"}  # a Range has as many entries as it is looked at for
"""Operators evaluated also where the shape of their result is unknown: no larger than their inputs say."""

BOUNDED = ELEMENTWISE | REDUCTIONS | {"Concat", "Gather"}
"""Operators evaluated also where the shape of their result is unknown: their result has at most as many
entries as the product of those of their inputs (Concat: as their sum)."""


class Constants:
    """Arrays that values always have; `varying` are values that are never constant (parameters, inputs)."""

    def __init__(self, varying: Iterable[ir.Value], opset: int) -> None:
        self.varying = set(varying)
        self.opset = opset
        self._known: dict[ir.Value, np.ndarray | None] = {}
        self._vanishing: dict[ir.Value, bool] = {}

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the array that a value always has, if that can be found out cheaply, otherwise None."""
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = None  # also the answer while a cycle is being walked
            self._known[value] = self._evaluate(value)
        return self._known[value]

    def scalar(self, value: ir.Value | None) -> float | None:
        """Return the number that a one-entry constant holds, otherwise None."""
        array = self.constant(value)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def _evaluate(self, value: ir.Value) -> np.ndarray | None:
        if value in self.varying:
            return None
        if value.is_initializer():
            tensor = value.const_value
            if tensor is None or tensor.size > SMALL:
                return None
            return tensor.numpy()
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type == "Constant":
            return _constant_node(node)
        if node.op_type in SIZES:
            return _shape_node(node)
        if len(node.outputs) > 1:
            return None
        if node.op_type == "Gather" and (length := self._dimension(node)) is not None:
            return length
        shape = static_shape(value)
        small = node.op_type in NO_LARGER | BOUNDED if shape is None else int(np.prod(shape)) <= SMALL
        if not small:
            return None
        inputs = [self.constant(item) for item in node.inputs if item is not None]
        if any(item is None for item in inputs) or any(_has_graph(attr) for attr in node.attributes.values()):
            return None
        if shape is None and node.op_type in BOUNDED and _product(inputs) > SMALL:
            return None
        if node.op_type == "Range" and _range_size(inputs) > SMALL:
            return None
        if node.op_type in ELEMENTWISE and _broadcast_size(inputs) > SMALL:
            return None
        return _run_node(node, [item for item in inputs if item is not None], self.opset)

    def _dimension(self, node: ir.Node) -> np.ndarray | None:
        """Return what a Gather reads of a shape of which only some dimensions are known."""
        shape, places = node.inputs[0], self.constant(node.inputs[1])
        source = None if shape is None else shape.producer()
        if source is None or source.op_type != "Shape" or places is None or source.attributes:
            return None
        of = source.inputs[0]
        dims = None if of is None or of.shape is None else list(of.shape)
        if dims is None or any(not -len(dims) <= int(place) < len(dims) for place in places.reshape(-1)):
            return None
        chosen = [dims[int(place)] for place in places.reshape(-1)]
        known = [dim for dim in chosen if isinstance(dim, int)]
        return np.asarray(known, np.int64).reshape(places.shape) if len(known) == len(chosen) else None

    def is_zeros(self, value: ir.Value | None) -> bool:
        """Say whether a tensor of any size is all zeros, without building it."""
        if value is None or value in self.varying:
            return False
        if value.is_initializer():
            return value.const_value is not None and greatest(value.const_value.numpy()) == 0.0
        node = value.producer()
        if node is None:
            return False
        match node.op_type:
            case "ConstantOfShape":
                fill = node.attributes.get("value")
                return fill is None or not np.any(fill.as_tensor().numpy())
            case op if op in SPREADS:
                return self.is_zeros(node.inputs[0])
            case "Constant":
                array = _constant_node(node)
                return array is not None and not np.any(array)
            case _:
                return False

    def vanishes(self, value: ir.Value | None) -> bool:
        """Say whether linear operators make a tensor of nothing but zeros, as far as that is seen.

        It is what an exporter writes for the derivative by a value that the loss does not depend on.
        """
        if value is None:
            return False
        if value not in self._vanishing:
            self._vanishing[value] = False  # also the answer while a cycle is being walked
            self._vanishing[value] = self._vanishes(value)
        return self._vanishing[value]

    def _vanishes(self, value: ir.Value) -> bool:
        if self.is_zeros(value):
            return True
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return False
        sources, operator = node.inputs, node.op_type
        if operator in SCALES:
            return any(map(self.vanishes, sources[:1] if operator == "Div" else sources))
        if operator in PRODUCTS:
            return any(map(self.vanishes, sources[:2])) and all(map(self.vanishes, sources[2:]))
        if operator in SCATTERS:
            return self.vanishes(sources[0]) and self.vanishes(sources[2])
        # shapes and ids are skipped; a value of unknown type is not, nor a Cast of ids, which are no zeros
        numbers = [item for item in sources if item is not None and (item.dtype is None or is_float(item))]
        return operator in LINEAR and bool(numbers) and all(map(self.vanishes, numbers))


def _has_graph(attr: ir.Attr) -> bool:
    return attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _constant_node(node: ir.Node) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(node.outputs[0])
    return None if tensor is None else tensor.numpy()


def _shape_node(node: ir.Node) -> np.ndarray | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    if node.op_type == "Size":
        shape = static_shape(source)
        return None if shape is None else np.asarray(np.prod(shape), np.int64)
    rank = len(source.shape)
    dims = list(source.shape)[int_attribute(node, "start", 0) : int_attribute(node, "end", rank)]
    if not all(isinstance(dim, int) for dim in dims):
        return None
    return np.asarray(dims, np.int64)


def _product(inputs: list[np.ndarray | None]) -> int:
    return int(np.prod([max(item.size, 2) for item in inputs if item is not None], dtype=object))


def _range_size(inputs: list[np.ndarray | None]) -> float:
    start, limit, step = (float(item.reshape(())) for item in inputs if item is not None)
    return (limit - start) / step if step else np.inf


def _broadcast_size(inputs: list[np.ndarray | None]) -> float:
    try:
        return float(np.prod(np.broadcast_shapes(*(item.shape for item in inputs if item is not None))))
    except ValueError:  # shapes that do not fit: the graph cannot run, and there is nothing to evaluate
        return np.inf


def _run_node(node: ir.Node, inputs: list[np.ndarray], opset: int) -> np.ndarray | None:
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    names = [name for name in dict.fromkeys(proto.input) if name]
    feeds = dict(zip([name for name in proto.input if name], inputs, strict=True))
    info = onnx.helper.make_empty_tensor_value_info
    graph = onnx.helper.make_graph([proto], "constant", [info(n) for n in names], [info(proto.output[0])])
    imports = [onnx.helper.make_opsetid("", opset)]
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports))
    try:
        result: Any = evaluator.run(None, feeds)  # pyright: ignore[reportUnknownMemberType]  untyped library
    except (NotImplementedError, RuntimeError, ValueError, TypeError, IndexError):
        return None  # not evaluable is an answer: the value is then simply not known
    return np.asarray(result[0])
