"""A verb's settings in a file: `--config run.toml` reads them, `--print-config` writes what would run.

The file is TOML (https://toml.io/en/v1.0.0): options by their names, without dashes before them, and the
model.
What stands on the command line comes before the file, and the file before the defaults. A value that is the
default counts as not given, so that a file with everything in it can be used with any model.
"""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any, Final, cast

import click

from kfac_onnx.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["ConfiguredCommand", "config_options", "settings_of", "settings_text"]

_SETTINGS: Final = "kfac_onnx.settings"
_NO_SETTINGS: Final = ("config", "print_config", "as_json", "quiet", "verbose", "help")
"""Parameters that say how to print, and not what is run."""
_KINDS: Final[dict[type[object], str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a table",
}


def _key(parameter: click.Parameter) -> str:
    """Return the name that a parameter has in a file: `--rest-lr` is `rest-lr`."""
    return max(parameter.opts, key=len).lstrip("-")


def _settable(command: click.Command) -> dict[str, click.Parameter]:
    return {_key(item): item for item in command.params if item.name not in _NO_SETTINGS}


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--config` and `--print-config`; for a `ConfiguredCommand`."""
    function = click.option(
        "--print-config",
        is_flag=True,
        help="Print all settings as TOML, as they would be used, and do nothing else.",
    )(function)
    return click.option(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="Take settings from a TOML file: options by name, 'model' too; the command line comes first.",
    )(function)


def _read(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    try:
        with click.open_file(path, "rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{path}'") from e
    except OSError as e:
        raise UserError(f"'{path}' cannot be read: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"'{path}' is no TOML: {first_line(e)}") from e
    known = _settable(ctx.command)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise UserError(
                f"unknown setting '{key}' in '{path}'{did_you_mean(key, known)}",
                help=f"the settings are: {', '.join(known)}",
            )
        values[str(known[key].name)] = _checked(known[key], value, f"'{key}' in '{path}'")
    ctx.default_map = values


def _checked(parameter: click.Parameter, value: object, what: str) -> object:
    """Return a value in the type of its option; raises UserError for one of another."""
    if isinstance(parameter, click.Option) and parameter.multiple:
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values):
            raise UserError(f"{what} must be a list of texts")
        return values
    if isinstance(parameter, click.Option) and parameter.is_bool_flag:
        wanted: type[object] = bool
    else:
        wanted = {"integer": int, "integer range": int, "float": float}.get(parameter.type.name, str)
    kind = type(value)
    if kind is not wanted and not (wanted is float and kind is int):
        got = _KINDS.get(kind, "a date or time")
        raise UserError(f"{what} must be {_KINDS[wanted]}, got {got}")
    return value


class ConfiguredCommand(click.Command):
    """A command that knows all of its settings: those of the command line, of a file and the defaults."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and keep every setting as it was written."""
        words = list(args)
        rest = super().parse_args(ctx, args)
        given, _, _ = self.make_parser(ctx).parse_args(args=words)
        values: dict[str, object] = {}
        for parameter in self.params:
            value, _ = parameter.consume_value(ctx, given)
            if isinstance(value, (list, tuple)):
                value = [str(item) for item in cast("Iterable[object]", value)]
            # What is not set is a sentinel of click's.
            values[str(parameter.name)] = value if isinstance(value, (str, int, float, list)) else None
            if isinstance(value, str):  # words of the command line, in the type of their option
                values[str(parameter.name)] = parameter.type_cast_value(ctx, value)
        ctx.meta[_SETTINGS] = values
        return rest


def settings_of(ctx: click.Context) -> dict[str, object]:
    """Return every setting of a `ConfiguredCommand` by its name in a file; None where it has no value."""
    values: dict[str, object] = ctx.meta[_SETTINGS]
    settings: dict[str, object] = {}
    for key, parameter in _settable(ctx.command).items():
        value = values[str(parameter.name)]
        if value is None and isinstance(parameter, click.Option):
            value = list[str]() if parameter.multiple else False if parameter.is_bool_flag else None
        settings[key] = value
    return settings


def settings_text(ctx: click.Context) -> str:
    """Return the settings as TOML: those without a value as comments that say what they are."""
    known = _settable(ctx.command)
    lines: list[str] = []
    for key, value in settings_of(ctx).items():
        parameter = known[key]
        if value is None:
            text = parameter.help or "" if isinstance(parameter, click.Option) else ""
            lines.append(f"# {key} =  # {' '.join(text.split())}".rstrip())
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case list():
            return f"[{', '.join(map(_toml, cast('list[object]', value)))}]"
        case str():  # a basic string has JSON's escapes, and DEL as one
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case _:
            return repr(value)
