"""Dataclasses out of JSON that anybody may have written: every field is checked against its declared type."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, Union, cast

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RecordError", "build", "names_of", "parse"]

T = TypeVar("T")

_LARGEST: Final = 1 << 63
"""No size, count or id reaches it: such numbers fit into int64."""


class RecordError(ValueError):
    """The data is not what the dataclass declares; the text says where, such as `uses[0].ids`."""


def parse(text: str | bytes) -> Any:
    """Return JSON data; raises RecordError (a ValueError) where the text is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise RecordError("it is nested too deeply") from e
    except ValueError as e:
        raise RecordError(f"it is not JSON: {str(e).splitlines()[0]}") from e


def build(cls: type[T], data: Any, where: str = "") -> T:
    """Return the dataclass that a JSON object describes; unknown fields are left out, for newer writers.

    Raises RecordError for a field that is missing or of another type.
    """
    if not isinstance(data, dict):
        raise RecordError(f"{where or 'it'} is no object")
    arguments: dict[str, Any] = {}
    for name, (read, required) in _fields(cls).items():
        place = f"{where}.{name}" if where else name
        if name in data:
            arguments[name] = read(data[name], place)
        elif required:
            raise RecordError(f"'{place}' is missing")
    return cls(**arguments)


@functools.cache
def names_of(cls: type[Any]) -> tuple[str, ...]:
    """Return the names of a dataclass's fields."""
    return tuple(item.name for item in dataclasses.fields(cls))


@functools.cache
def _fields(cls: type[Any]) -> dict[str, tuple[Callable[[Any, str], Any], bool]]:
    """Return what reads each field, and whether it must be given."""
    kinds = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        item.name: (_reader(kinds[item.name]), item.default is missing and item.default_factory is missing)
        for item in dataclasses.fields(cls)
    }


def _value(kind: Any, data: Any, place: str) -> Any:
    """Return JSON data as a value of the type `kind`."""
    return _reader(kind)(data, place)


@functools.cache
def _reader(kind: Any) -> Callable[[Any, str], Any]:
    """Return the function that makes a value of the type `kind` of JSON data found at a place.

    Types are looked at once, not for every value: a step of 2,000 parameters has 400,000.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda data, _: data
    if origin in (Union, types.UnionType):
        kinds = [part for part in parts if part is not type(None)]
        if len(kinds) < len(parts):
            return lambda data, place: None if data is None else _first_of(kinds, data, place)
        return lambda data, place: _first_of(kinds, data, place)
    if origin is tuple:
        entry = _reader(parts[0])

        def items(data: Any, place: str) -> tuple[Any, ...]:
            found = cast("list[Any]", _typed(list, data, place, "list"))
            return tuple(entry(item, f"{place}[{index}]") for index, item in enumerate(found))

        return items
    if origin is dict:
        inner = _reader(parts[1])

        def entries(data: Any, place: str) -> dict[str, Any]:
            found = cast("dict[Any, Any]", _typed(dict, data, place, "object"))
            return {_text(key, place): inner(value, f"{place}.{key}") for key, value in found.items()}

        return entries
    if origin is Literal:
        words = ", ".join(map(str, parts))

        def chosen(data: Any, place: str) -> Any:
            if not isinstance(data, str) or data not in parts:
                raise RecordError(f"'{place}' must be one of {words}")
            return data

        return chosen
    if dataclasses.is_dataclass(kind):
        return functools.partial(build, cast("type[Any]", kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):

        def member(data: Any, place: str) -> enum.Enum:
            try:
                return kind(data)
            except ValueError as e:
                known = ", ".join(str(item.value) for item in kind)
                raise RecordError(f"'{place}' must be one of {known}") from e

        return member
    return functools.partial(_scalar, kind)


def _first_of(kinds: list[Any], data: Any, place: str) -> Any:
    """Return data as the first of some types that it fits."""
    problem: RecordError | None = None
    for kind in kinds:
        try:
            return _value(kind, data, place)
        except RecordError as e:
            problem = problem or e
    raise problem or RecordError(f"'{place}' has no type")


def _scalar(kind: Any, data: Any, place: str) -> Any:
    if kind is str:
        return _text(data, place)
    if kind is bool:
        return _typed(bool, data, place, "bool")
    if isinstance(data, bool):
        raise RecordError(f"'{place}' must be a number")
    if kind is int:
        if not -_LARGEST <= _typed(int, data, place, "whole number") < _LARGEST:
            raise RecordError(f"'{place}' is too large")
        return data
    if kind is float:
        if not isinstance(data, (int, float)) or abs(data) > 1e308 or not math.isfinite(data):
            raise RecordError(f"'{place}' must be a finite number")
        return float(data)
    raise AssertionError(f"a record's field '{place}' has the type {kind}, which JSON cannot hold")


def _typed(kind: type[T], data: Any, place: str, what: str) -> T:
    if not isinstance(data, kind):
        raise RecordError(f"'{place}' must be {'an' if what == 'object' else 'a'} {what}")
    return data


def _text(data: Any, place: str) -> str:
    text = _typed(str, data, place, "text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"'{place}' is no valid text") from e
    return text
