"""Typed options of a pass, and their one text form.

An option is a dataclass field made by `opt`. Its type is `int`, `float`, `bool`, `str`,
`Literal[...]` of strings, `tuple[str, ...]`, or one of these `| None`. In text:

| type              | text                                                      |
|-------------------|-----------------------------------------------------------|
| `int`, `float`    | what `int()` / `float()` accept, finite                   |
| `bool`            | `true` or `false`                                         |
| `str`, `Literal`  | bare, or a JSON string in double quotes where it must be  |
| `tuple[str, ...]` | `[a,b]`                                                   |
| `None`            | `none`                                                    |
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, TypeVar

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.errors.arguments import plain, shown

__all__ = [
    "Option",
    "OptionValue",
    "Text",
    "check_value",
    "format_value",
    "opt",
    "options_of",
    "plain_value",
    "read_value",
]

T = TypeVar("T")

OptionValue = int | float | bool | str | tuple[str, ...] | None

_Kind = Literal["int", "float", "bool", "str", "strings"]
_KINDS: Final[dict[Any, _Kind]] = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    tuple[str, ...]: "strings",
}

_BARE: Final = re.compile(r"[^\s,={}\[\]\"]+")
"""What a string may be made of to stand without quotes."""


_LARGEST: Final = {"int": 2**63 - 1, "float": 3.4028235e38}
"""The largest numbers of the types that options become constants of: int64 and, rounded up, float32."""


@dataclass(frozen=True)
class Text:
    """One value as it stood in the pipeline's text: a word, or `quoted` where it was a JSON string."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Option:
    """One option of a pass: everything that the parser, the range check and the help need.

    `field` is the dataclass field (`snake_case`), `name` its text form (`kebab-case`), `kind` the
    type without `None`.
    """

    field: str
    name: str
    kind: _Kind
    optional: bool
    default: OptionValue
    help: str
    lo: float | None = None
    hi: float | None = None
    choices: tuple[str, ...] | None = None

    @property
    def accepts(self) -> str:
        """What a value of this option must be, in words: `a number from 0 to 1`."""
        noun = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "a name",
            "strings": "a list of names in brackets",
        }[self.kind]
        if self.choices is not None:
            noun = "one of " + ", ".join(self.choices)
        if self.lo is not None and self.hi is not None:
            noun += f" from {self.lo:.10g} to {self.hi:.10g}"
        elif self.lo is not None:
            noun += f", at least {self.lo:.10g}"
        elif self.hi is not None:
            noun += f", at most {self.hi:.10g}"
        return f"{noun}, or none" if self.optional else noun


def opt(
    default: T,
    help: str,  # noqa: A002  the name this text has in every command line
    *,
    lo: float | None = None,
    hi: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> T:
    """Return a dataclass field that is an option of a pass.

    `default` is its value when the text does not name it, `help` one line, `lo` and `hi` the closed
    range of a number, `choices` the words a string may be (a `Literal` type says that by itself).
    """
    return dataclasses.field(  # pyright: ignore[reportReturnType]  as dataclasses.field itself is typed
        default=default, metadata={"help": help, "lo": lo, "hi": hi, "choices": choices}
    )


@cache
def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """Return the options of a pass class in the order of its fields.

    Raises TypeError for a field whose type has no text form: a mistake in the pass.
    """
    hints = typing.get_type_hints(cls)
    return tuple(_option(cls, field, hints[field.name]) for field in dataclasses.fields(cls))


def _option(cls: type[Any], field: dataclasses.Field[Any], hint: Any) -> Option:
    if "help" not in field.metadata or field.default is dataclasses.MISSING:
        raise TypeError(f"{cls.__name__}.{field.name} must be declared with opt(default, help)")
    choices: tuple[str, ...] | None = field.metadata["choices"]
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0] if len(members) == 1 else None
    kind: _Kind
    if typing.get_origin(hint) is Literal and all(isinstance(word, str) for word in typing.get_args(hint)):
        kind, choices = "str", typing.get_args(hint)
    elif hint in _KINDS:
        kind = _KINDS[hint]
    else:
        raise TypeError(f"{cls.__name__}.{field.name}: an option cannot have the type {hint}")
    return Option(
        field=field.name,
        name=field.name.replace("_", "-"),
        kind=kind,
        optional=optional,
        default=field.default,
        help=field.metadata["help"],
        lo=field.metadata["lo"],
        hi=field.metadata["hi"],
        choices=choices,
    )


def format_value(value: OptionValue) -> str:
    """Return a value's text form; `read_value` of it is the value again."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) is not None and value != "none"
        return value if bare else json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return repr(value)


def read_value(option: Option, value: Text | tuple[Text, ...], *, owner: str) -> OptionValue:
    """Return the typed value of one option's text; `owner` is the pass, for the message.

    Raises UserError when the text is not what the option accepts.
    """
    if option.optional and value == Text("none"):
        return None
    result = _convert(option, value)
    if result is None:
        shown = (
            format_value(tuple(item.text for item in value)) if isinstance(value, tuple) else repr(value.text)
        )
        near = did_you_mean(value.text, option.choices) if option.choices and isinstance(value, Text) else ""
        raise UserError(
            f"option '{option.name}' of pass '{owner}' cannot be {shown}: it is {option.accepts}{near}"
        )
    check_value(option, result, owner=owner)
    return result


def _convert(option: Option, value: Text | tuple[Text, ...]) -> OptionValue:
    if isinstance(value, tuple):
        return tuple(item.text for item in value) if option.kind == "strings" else None
    if option.kind == "strings":
        return None
    if option.kind == "str":
        return value.text if option.choices is None or value.text in option.choices else None
    if value.quoted:
        return None
    if option.kind == "bool":
        return {"true": True, "false": False}.get(value.text)
    try:
        return int(value.text) if option.kind == "int" else float(value.text)
    except ValueError:
        return None


def plain_value(value: Any) -> Any:
    """Return a scalar of NumPy's as Python's, a list as a tuple, and everything else as it is."""
    value = plain(value)
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]  checked next


def check_value(option: Option, value: object, *, owner: str) -> None:
    """Raise UserError when a value, given in text or in Python, is not what the option accepts."""
    if value is None and option.optional:
        return
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "strings": (tuple,),
    }
    fits = isinstance(value, kinds[option.kind])
    if option.kind != "bool" and isinstance(value, bool):
        fits = False
    if fits and isinstance(value, (int, float)) and not isinstance(value, bool):
        fits = (
            (isinstance(value, int) or math.isfinite(value))  # an int may be too large for a float
            and (option.lo is None or value >= option.lo)
            and (option.hi is None or value <= option.hi)
        )
        largest = _LARGEST[option.kind]
        if fits and not -largest - (option.kind == "int") <= value <= largest:
            what = "whole number" if option.kind == "int" else "number"
            raise UserError(
                f"option '{option.name}' of pass '{owner}' cannot be {shown(value)}:"
                f" the largest {what} of a model is {_LARGEST[option.kind]}"
            )
    if fits and option.choices is not None and option.kind == "str":
        fits = value in option.choices
    if not fits:
        raise UserError(
            f"option '{option.name}' of pass '{owner}' cannot be {shown(value)}: it is {option.accepts}"
        )
