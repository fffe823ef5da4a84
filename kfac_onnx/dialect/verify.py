"""The verifier of a single `ai.kfac` node: counts, types, shapes, attribute ranges."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.dialect.operators import DOMAIN, OPERATORS
from kfac_onnx.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.dialect.signature import Attribute, Operator, Port

__all__ = ["verify_node"]

_DTYPES: Final = {
    "f32": ir.DataType.FLOAT,
    "f64": ir.DataType.DOUBLE,
    "i32": ir.DataType.INT32,
    "i64": ir.DataType.INT64,
}
_KINDS: Final = {"float": ir.AttributeType.FLOAT, "int": ir.AttributeType.INT}


def verify_node(node: ir.Node) -> list[str]:
    """Return what is wrong with a node of the dialect, one sentence each; empty when it is right.

    Types and shapes are checked where they are known. Equal letters of the signature must be equal
    sizes.
    """
    if node.domain != DOMAIN:
        return [f"'{node.domain}::{node.op_type}' is not an operator of '{DOMAIN}'"]
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        return [f"'{DOMAIN}::{node.op_type}' does not exist{did_you_mean(node.op_type, OPERATORS)}"]
    if _is_right(operator, node):
        return []
    sizes: dict[str, tuple[int, str]] = {}
    wrong = _check_ports(operator, "input", operator.inputs, node.inputs, sizes)
    wrong += _check_ports(operator, "output", operator.outputs, node.outputs, sizes)
    wrong += _check_attributes(operator, node)
    vocab = node.attributes.get("vocab_size")
    if vocab is not None and vocab.type == ir.AttributeType.INT and not vocab.is_ref() and "V" in sizes:
        size, where = sizes["V"]
        if vocab.as_int() != size:
            wrong.append(f"{operator.name}: {where} has {size} rows, but vocab_size is {vocab.as_int()}")
    return wrong


def _is_right(operator: Operator, node: ir.Node) -> bool:
    """Say whether there is nothing to report: most nodes are right, and verified after every pass."""
    if len(node.inputs) != len(operator.inputs) or len(node.outputs) != len(operator.outputs):
        return False
    sizes: dict[str, int] = {}
    for (expected, letters, is_open), value in zip(
        _expectations(operator.name), (*node.inputs, *node.outputs), strict=True
    ):
        if value is None:
            return False
        kind, shape = value.type, value.shape
        if expected is not None and kind is not None and kind.dtype != expected:
            return False
        if shape is None:
            continue
        dims = shape.dims
        if len(dims) < len(letters) or (not is_open and len(dims) != len(letters)):
            return False
        for letter, size in zip(letters, dims, strict=False):
            if isinstance(size, int) and sizes.setdefault(letter, size) != size:
                return False
    if _check_attributes(operator, node):
        return False
    vocab = node.attributes.get("vocab_size")
    return vocab is None or vocab.is_ref() or vocab.as_int() == sizes.get("V", vocab.as_int())


@functools.cache
def _expectations(name: str) -> list[tuple[ir.DataType | None, list[str], bool]]:
    """Return of each input and output its type, the letters of its shape, and whether more may follow."""
    operator = OPERATORS[name]
    return [(_DTYPES.get(port.dtype), *_letters(port.shape)) for port in operator.inputs + operator.outputs]


def _check_ports(
    operator: Operator,
    side: str,
    declared: tuple[Port, ...],
    values: Sequence[ir.Value | None],
    sizes: dict[str, tuple[int, str]],
) -> list[str]:
    if len(values) != len(declared):
        return [f"{operator.name} has {len(declared)} {side}s, not {len(values)}"]
    wrong: list[str] = []
    for port, value in zip(declared, values, strict=True):
        if value is None:
            wrong.append(f"{operator.name}: {side} '{port.name}' is missing")
            continue
        expected = _DTYPES.get(port.dtype)
        if expected is not None and value.dtype is not None and value.dtype != expected:
            wrong.append(f"{operator.name}: {side} '{port.name}' is {value.dtype.name}, not {expected.name}")
        if value.shape is not None:
            wrong += _check_shape(operator, side, port, value.shape, sizes)
    return wrong


@functools.cache
def _letters(shape: tuple[str, ...]) -> tuple[list[str], bool]:
    """Return the sizes that a signature names, and whether further ones may follow."""
    return [letter for letter in shape if letter != "..."], "..." in shape


def _check_shape(
    operator: Operator, side: str, port: Port, shape: ir.Shape, sizes: dict[str, tuple[int, str]]
) -> list[str]:
    letters, is_open = _letters(port.shape)
    place = f"{side} '{port.name}'"
    if shape.rank() < len(letters) or (not is_open and shape.rank() != len(letters)):
        return [f"{operator.name}: {place} has rank {shape.rank()}, not {len(letters)}"]
    wrong: list[str] = []
    for letter, size in zip(letters, shape, strict=False):
        if not isinstance(size, int):
            continue
        known, where = sizes.setdefault(letter, (size, place))
        if known != size:
            wrong.append(f"{operator.name}: {letter} is {known} in {where} but {size} in {place}")
    return wrong


def _check_attributes(operator: Operator, node: ir.Node) -> list[str]:
    known = {attribute.name: attribute for attribute in operator.attributes}
    wrong = [
        f"{operator.name} has no attribute '{name}'{did_you_mean(name, known)}"
        for name in node.attributes
        if name not in known
    ]
    for attribute in operator.attributes:
        given = node.attributes.get(attribute.name)
        if given is None:
            wrong.append(f"{operator.name}: attribute '{attribute.name}' is missing")
        elif not given.is_ref():
            wrong += _check_range(operator, attribute, given)
    return wrong


def _check_range(operator: Operator, attribute: Attribute, given: ir.Attr) -> list[str]:
    if given.type != _KINDS[attribute.kind]:
        found, wanted = given.type.name, attribute.kind.upper()
        return [f"{operator.name}: attribute '{attribute.name}' is {found}, not {wanted}"]
    value = given.as_int() if attribute.kind == "int" else given.as_float()
    too_low = value <= attribute.lo if attribute.open_lo else value < attribute.lo
    if too_low or not value <= attribute.hi:
        bracket = "(" if attribute.open_lo else "["
        span = f"{bracket}{attribute.lo:g}, {attribute.hi:g}]"
        return [f"{operator.name}: attribute '{attribute.name}' is {value:g}, outside {span}"]
    return []
