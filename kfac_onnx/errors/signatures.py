"""Arguments held against the types that a function's signature says, where users call in.

What is of another type would fail somewhere inside, in words that are not the user's. Names of types that are
not in the table below are not looked at. NumPy's scalars pass for Python's.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Final, ParamSpec, TypeVar, cast

from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import plain, shown

__all__ = ["checked", "require_types"]

P = ParamSpec("P")
R = TypeVar("R")

_LONGEST_NAME: Final = 255
"""Bytes of a file's name: what Linux, macOS and Windows take."""


def _is_whole(value: object) -> bool:
    return isinstance(plain(value), int) and not isinstance(plain(value), bool)


def _is_number(value: object) -> bool:
    return isinstance(plain(value), (int, float)) and not isinstance(plain(value), bool)


def _is_named(name: str) -> Callable[[object], bool]:
    """Return a check by the name of a class: its package may not even be loaded."""
    return lambda value: any(cls.__name__ == name for cls in type(value).__mro__)


def _is_many(value: object) -> bool:
    """Say whether a value holds others one by one; a mapping holds pairs, an array of rank 0 nothing."""
    if isinstance(value, (str, bytes, memoryview, Mapping)) or getattr(value, "ndim", 1) == 0:
        return False
    return isinstance(value, Iterable)


_KINDS: Final[dict[str, tuple[str, Callable[[object], bool]]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "bool": ("True or False", lambda value: isinstance(plain(value), bool)),
    "None": ("None", lambda value: value is None),
    "object": ("anything", lambda value: True),
    "ir.Model": ("a model of onnx_ir", _is_named("Model")),
    "onnx.ModelProto": ("an onnx.ModelProto", _is_named("ModelProto")),
    "Mapping": ("a mapping", lambda value: isinstance(value, Mapping)),
    "Iterable": ("several of them", _is_many),
    "Sequence": ("a list", lambda value: _is_many(value) and isinstance(value, Sequence)),
    "tuple": ("a tuple or a list", lambda value: isinstance(value, (tuple, list))),
    "Callable": ("a function", callable),
    "Schedule": ("a Schedule", _is_named("Schedule")),
    "MappedTables": ("a folder of tables", _is_named("MappedTables")),
    "np.ndarray": (
        "an array",
        lambda value: hasattr(value, "__array__") or isinstance(value, (list, int, float)),
    ),
}
_ALIASES: Final = {"Source": "str | Path | ir.Model | onnx.ModelProto"}


def _split(text: str, mark: str) -> list[str]:
    """Split at a mark that stands in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "[") - (sign == "]")
        if sign == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


@functools.cache
def _union(annotation: str) -> tuple[tuple[str, str], ...] | None:
    """Return the members of an annotation: outer type, and what is in its brackets; None for unknown ones."""
    members: list[tuple[str, str]] = []
    for part in _split(_ALIASES.get(annotation, annotation), "|"):
        outer, _, inner = part.partition("[")
        if outer not in _KINDS:
            return None
        members.append((outer, inner.removesuffix("]")))
    return tuple(members)


def _fits(value: object, annotation: str) -> bool:
    members = _union(annotation)
    return members is None or any(
        _KINDS[outer][1](value) and _holds(value, inner) for outer, inner in members
    )


def _holds(value: object, inner: str) -> bool:
    """Say whether what a container holds fits too; an iterator is left alone: it can be read only once."""
    if not inner:
        return True
    first, *others = _split(inner, ",")
    if isinstance(value, Mapping):
        keys_and_values: Mapping[object, object] = value  # pyright: ignore[reportUnknownVariableType]  checked here
        return not others or all(_fits(k, first) and _fits(v, others[0]) for k, v in keys_and_values.items())
    if isinstance(value, tuple) and others and others != ["..."]:  # tuple[A, B]: each of its own type
        entries = cast("tuple[object, ...]", value)
        return len(entries) == 1 + len(others) and all(map(_fits, entries, (first, *others)))
    if isinstance(value, (list, tuple, Set)):
        return all(_fits(entry, first) for entry in cast("Iterable[object]", value))
    return True


def _words(annotation: str) -> str:
    members = _union(annotation) or ()
    words = [_KINDS[outer][0] + (f" ({outer}[{inner}])" if inner else "") for outer, inner in members]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def require_types(owner: str, annotations: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Raise UserError for a value of another type than its annotation says, or that no file can be named."""
    for name, value in values.items():
        annotation = annotations.get(name)
        if not isinstance(annotation, str):
            continue
        if not _fits(value, annotation):
            raise UserError(f"{name} of {owner} must be {_words(annotation)}, got {shown(value)}")
        if "Path" in _split(_ALIASES.get(annotation, annotation), "|") and isinstance(
            value, (str, os.PathLike)
        ):
            _require_name(f"{name} of {owner}", os.fspath(value))  # pyright: ignore[reportUnknownArgumentType]  of whatever kind


def _require_name(what: str, path: str | bytes) -> None:
    try:
        text = os.fsencode(path)
    except UnicodeEncodeError as e:
        raise UserError(f"{what} cannot be the name of a file: it holds half a character") from e
    if b"\0" in text:
        raise UserError(f"{what} cannot be the name of a file: there is a zero byte in it")
    if any(len(part) > _LONGEST_NAME for part in text.split(os.sep.encode())):
        raise UserError(f"{what} is too long for the name of a file")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function's arguments held against its signature before it runs.

    What Python itself refuses (an unknown or missing argument) stays a TypeError of Python's.
    """
    signature = inspect.signature(function)
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def called(*arguments: P.args, **keywords: P.kwargs) -> R:
        bound = signature.bind(*arguments, **keywords)
        require_types(owner, annotations, bound.arguments)
        return function(*arguments, **keywords)

    return called
