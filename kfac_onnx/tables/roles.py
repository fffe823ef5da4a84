"""What each trained parameter is for, told by how the graph uses it.

| role     | is                                                                                          |
|----------|---------------------------------------------------------------------------------------------|
| `table`  | an embedding table: rows of it are looked up                                                |
| `output` | a matrix whose products are the logits of a softmax over many classes                       |
| `head`   | another matrix that no product with a trained matrix or with looked-up rows follows         |
| `hidden` | a matrix (or kernel, or a stack of matrices) that multiplies activations                    |
| `vector` | a tensor with one dimension larger than 1: biases, gains                                    |
| `other`  | anything else                                                                               |

A parameter is followed through views, and through elementwise operations with what does not depend on the
batch, until a product with activations reads it; axes are followed along, so that outputs and inputs of the
matrix are known however it is stored. Names are never looked at.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from kfac_onnx.graph.operators import ELEMENTWISE, SIZES, Keeps, Trait, having, keeping
from kfac_onnx.graph.values import int_attribute, static_shape
from kfac_onnx.metadata import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_ir as ir

    from kfac_onnx.metadata import Site
    from kfac_onnx.tables.facts import Facts

__all__ = ["MANY_CLASSES", "Product", "products_of", "roles_of"]

MANY_CLASSES: Final = 256
"""From this many outputs on, the matrix before a softmax is an output table."""

Axes: TypeAlias = tuple[frozenset[int], ...]
"""For each axis of a view, the axes of the parameter that it is made of."""

_PRODUCTS: Final = having(Trait.WEIGHTED) - having(Trait.RECURRENT)  # which has several matrices, stacked
_SOFTMAX: Final = having(Trait.SOFTMAX)
# Elementwise: with what does not depend on the batch they make another matrix of the same use (weight norm,
# a scale, a mask); with activations they end what is followed.
_ELEMENTWISE: Final = ELEMENTWISE - having(Trait.BOOLEAN)
_SCORING: Final = _PRODUCTS | {"Mul"}  # Mul and a sum: products of pairs of rows
_VIEWS: Final = keeping(Keeps.PLACES, Keeps.ORDER, Keeps.ENTRIES, Keeps.SOME, Keeps.REPEATS)
_KEPT_AXES: Final = keeping(Keeps.PLACES, Keeps.SOME) | {"Pad"}


@dataclass(frozen=True)
class Product:
    """One product of a parameter with activations, by the axes of the parameter as it is stored."""

    node: ir.Node
    inputs: frozenset[int]
    outputs: frozenset[int]
    stack: frozenset[int]
    activations: ir.Value | None = None
    features: int = -1
    """The axis of the activations that is summed over."""
    grouped: bool = False


def roles_of(weights: Mapping[str, ir.Value], sites: Iterable[Site], facts: Facts) -> list[Role]:
    """Return the role of each trained parameter, in the order of `weights`."""
    tables = {site.parameter: site for site in sites}
    batch = _depending_on_the_batch(facts)
    products = {name: _products(weight, facts, batch) for name, weight in weights.items()}
    multiplying = {item.node for found in products.values() for item in found}
    multiplying |= _products_with_rows(tables.values(), facts)
    roles: list[Role] = []
    for name, weight in weights.items():
        shape = static_shape(weight) or ()
        if name in tables:
            uses = len(tables[name].uses)
            tied = ", and multiplies activations too" if tables[name].dense is not None else ""
            roles.append(Role(name, "table", f"{uses} lookup{'s' * (uses != 1)} of its rows{tied}"))
        elif sum(size > 1 for size in shape) < 2:
            roles.append(Role(name, "vector", f"its shape {list(shape)} has one dimension above 1"))
        else:
            roles.append(_matrix(name, shape, products[name], multiplying, facts))
    return roles


def products_of(weight: ir.Value, facts: Facts) -> list[Product]:
    """Return the products that read a parameter or a view of it, also with what does not depend on the batch.

    Such is the first state of a recurrent layer: it has a gradient as any other use has.
    """
    return _products(weight, facts, _Everything())


class _Everything(Container["ir.Value | None"]):
    """The set of all values."""

    def __contains__(self, value: object) -> bool:
        return True


def _matrix(
    name: str, shape: tuple[int, ...], products: Sequence[Product], multiplying: set[ir.Node], facts: Facts
) -> Role:
    if not products:
        return Role(name, "other", "it multiplies no activations")
    first = products[0]
    where = f"{first.node.op_type} '{first.node.outputs[0].name}'"
    if first.grouped:
        return Role(name, "other", f"{where} is a convolution of each channel with a kernel of its own")
    # Axes of size 1, which a reshape may have dropped, can stand anywhere.
    left = set(range(len(shape))) - first.outputs - first.inputs - first.stack
    rows, columns, stack = (tuple(sorted(axes)) for axes in (first.outputs, first.inputs | left, first.stack))
    if any(shape[axis] > 1 for axis in left) or not first.outputs or not first.inputs:
        return Role(name, "other", f"{where} sums over axes of it that cannot be told")
    size = math.prod(shape[axis] for axis in rows)
    kind, reason = "hidden", f"{where} multiplies activations with it"
    last, softmax = _what_follows(first.node, multiplying, facts)
    if last and softmax and size >= MANY_CLASSES:
        kind, reason = "output", f"{where} makes the logits of a softmax over {size} classes"
    elif last:
        kind, reason = "head", f"{where} is the last product before the loss, with {size} outputs"
    alone = len(products) == 1 and first.activations is not None and len(shape) == 2
    return Role(
        name,
        kind,
        reason,
        rows,
        columns,
        stack,
        activations=str(first.activations.name) if alone and first.activations is not None else None,
        features=first.features,
        bias=_bias(first.node, size, facts) if alone else None,
    )


def _bias(product: ir.Node, size: int, facts: Facts) -> str | None:
    """Return the trained vector [size] that is added to a product, and used for nothing else in the loss."""
    candidates = [product.inputs[2]] if product.op_type == "Gemm" and len(product.inputs) > 2 else []
    for node, index in product.outputs[0].uses():
        if node.op_type == "Add" and facts.is_forward(node):
            candidates.append(node.inputs[1 - index])
    for value in candidates:
        if value is None or value not in facts.trained or static_shape(value) != (size,):
            continue
        if sum(facts.is_forward(node) for node, _ in value.uses()) == 1:
            return str(value.name)
    return None


def _what_follows(start: ir.Node, multiplying: set[ir.Node], facts: Facts) -> tuple[bool, bool]:
    """Return whether no product with a trained matrix follows a node, and whether a softmax does."""
    softmax = False
    seen: set[ir.Node] = {start}
    waiting = deque([start])
    while waiting:
        for value in waiting.popleft().outputs:
            for node, _ in value.uses():
                if node in seen or not facts.is_forward(node) or node.op_type in SIZES:
                    continue
                if node in multiplying:
                    return False, False
                softmax = softmax or node.op_type in _SOFTMAX
                seen.add(node)
                waiting.append(node)
    return True, softmax


def _products_with_rows(sites: Iterable[Site], facts: Facts) -> set[ir.Node]:
    """Return the products whose operand is looked-up rows: the table is what scores activations there."""
    outputs = {use.output for site in sites for use in site.uses}
    rows: set[ir.Value] = set()
    products: set[ir.Node] = set()
    for node in facts.model.graph:
        if node.op_type in _SCORING and any(value in rows for value in node.inputs):
            products.add(node)
        first = node.inputs[0] if node.inputs else None
        view = node.op_type in _VIEWS and first in rows
        rows.update(value for value in node.outputs if view or value.name in outputs)
    return products


def _depending_on_the_batch(facts: Facts) -> set[ir.Value]:
    """Return the values of the forward part that depend on what the batch holds, its sizes aside."""
    depending = {value for value in facts.inputs if value not in facts.trained and value.const_value is None}
    for node in facts.model.graph:
        if (node.op_type not in SIZES and any(value in depending for value in node.inputs)) or any(
            value in depending
            for attribute in node.attributes.values()
            if attribute.type.name == "GRAPH"
            for inner in attribute.as_graph().all_nodes()
            for value in inner.inputs
        ):
            depending.update(node.outputs)
    return depending


def _products(weight: ir.Value, facts: Facts, batch: Container[ir.Value | None]) -> list[Product]:
    """Return the products with activations that read a parameter, or a view or function of it alone."""
    rank = len(static_shape(weight) or ())
    start: Axes = tuple(frozenset({axis}) for axis in range(rank))
    products: list[Product] = []
    seen: set[ir.Value] = {weight}
    waiting: deque[tuple[ir.Value, Axes]] = deque([(weight, start)])
    while waiting:
        value, axes = waiting.popleft()
        for node, index in value.uses():
            if not facts.is_forward(node):
                continue
            if node.op_type in _PRODUCTS:
                product = _product(node, index, axes, batch)
                if product is not None and all(item.node is not node for item in products):
                    products.append(product)
                continue
            for output in node.outputs:
                after = _through(node, index, value, output, axes, batch)
                if after is not None and output not in seen:
                    seen.add(output)
                    waiting.append((output, after))
    return products


def _through(
    node: ir.Node,
    index: int,
    value: ir.Value,
    output: ir.Value,
    axes: Axes,
    batch: Container[ir.Value | None],
) -> Axes | None:
    """Return the axes of an operator's output, or None where what comes out is not the matrix any more."""
    kind = node.op_type
    if kind in _KEPT_AXES:
        return axes if index == 0 else None
    if kind == "Transpose":
        order = node.attributes.get_ints("perm") or tuple(reversed(range(len(axes))))
        return tuple(axes[axis] for axis in order)
    if kind in keeping(Keeps.ORDER):
        return _reshaped(axes, static_shape(value), static_shape(output)) if index == 0 else None
    if kind == "Concat":  # of weights that are used as one, such as query, key and value
        alone = all(item is value or item not in batch for item in node.inputs)
        return axes if alone else None
    if kind in _ELEMENTWISE:
        alone = all(item is value or item not in batch for item in node.inputs)
        same = static_shape(output) == static_shape(value)
        return axes if alone and same else None
    return None


def _reshaped(axes: Axes, old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> Axes | None:
    """Follow axes through a reshape that joins or splits neighbours."""
    if old is None or new is None or 0 in old:
        return None
    result: list[frozenset[int]] = []
    place, left, current = 0, 1, frozenset[int]()
    for size in new:
        group = frozenset[int]() if left == 1 else current
        have = left
        while have < size and place < len(old):
            group |= axes[place]
            current = axes[place]
            have *= old[place]
            place += 1
        if have % size:
            return None
        left = have // size
        result.append(group if size > 1 else frozenset())
    return tuple(result)


def _product(node: ir.Node, index: int, axes: Axes, batch: Container[ir.Value | None]) -> Product | None:
    """Return how a product uses an operand with these axes, if the other operand is activations."""
    if index > 1 or len(node.inputs) < 2 or node.inputs[1 - index] not in batch:
        return None
    rank = len(axes)
    kind = node.op_type
    grouped = False
    if kind == "Einsum":
        contracted, kept, stack = _einsum_axes(node, index, rank)
    elif kind in ("Conv", "ConvTranspose"):
        if index != 1:
            return None
        contracted, kept, stack = (
            ([0], list(range(1, rank)), []) if kind == "ConvTranspose" else (list(range(1, rank)), [0], [])
        )
        shape = static_shape(node.inputs[1])
        grouped = int_attribute(node, "group", 1) > 1 and shape is not None and shape[1] == 1
    elif rank < 2:
        return None
    else:
        turned = bool(int_attribute(node, "transA" if index == 0 else "transB", 0))
        last = (
            (rank - 1 if index == 0 else rank - 2) if not turned else (rank - 2 if index == 0 else rank - 1)
        )
        contracted = [last]
        kept = [2 * rank - 3 - last]
        stack = list(range(rank - 2))
    joined = [frozenset[int]().union(*(axes[axis] for axis in part)) for part in (contracted, kept, stack)]
    inputs, outputs, stacked = joined
    if inputs & outputs or inputs & stacked or outputs & stacked:
        return None
    activations, features = node.inputs[1 - index], -1
    if kind in ("Gemm", "MatMul", "FusedMatMul"):
        turned = bool(int_attribute(node, "transB" if index == 0 else "transA", 0))
        features = -1 if (index == 1) != turned else -2
    elif kind == "Einsum":
        own, other = _einsum_terms(node, index)
        summed = [other.index(own[axis]) for axis in contracted if own[axis] in other]
        activations, features = (activations, summed[0]) if len(summed) == 1 else (None, -1)
    else:
        activations = None
    return Product(node, inputs, outputs, stacked, activations, features, grouped)


def _einsum_terms(node: ir.Node, index: int) -> tuple[str, str]:
    """Return the letters of one operand of an Einsum of two, and those of the other."""
    terms = node.attributes.get_string("equation", "").replace(" ", "").partition("->")[0].split(",")
    return terms[index], terms[1 - index]


def _einsum_axes(node: ir.Node, index: int, rank: int) -> tuple[list[int], list[int], list[int]]:
    """Return the axes of one operand that an Einsum sums over, keeps alone, and shares with the other one."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "." in equation or len(terms[index]) != rank:
        return [], [], []
    own, other = terms[index], terms[1 - index]
    contracted = [axis for axis, letter in enumerate(own) if letter not in right]
    kept = [axis for axis, letter in enumerate(own) if letter in right and letter not in other]
    shared = [axis for axis, letter in enumerate(own) if letter in right and letter in other]
    return contracted, kept, shared
