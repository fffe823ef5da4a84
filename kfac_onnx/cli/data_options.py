"""Options of the verbs that read data: which column fills which input, and vocabularies of ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import click

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["chosen_columns", "chosen_vocabularies", "columns_option", "data_options"]

P = ParamSpec("P")
R = TypeVar("R")

_COLUMNS: Final = "kfac_onnx.columns"
_VOCABULARIES: Final = "kfac_onnx.vocabularies"


def _keep_columns(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> None:
    ctx.meta[_COLUMNS] = ",".join(words)


def _keep_vocabularies(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> None:
    pairs: dict[str, str | None] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise UserError(
                f"--vocabulary wants INPUT=FILE, not '{word}'", help="INPUT=none takes the ids as they are"
            )
        if name in pairs:
            raise UserError(f"--vocabulary names the input '{name}' twice")
        pairs[name] = None if path == "none" else path
    ctx.meta[_VOCABULARIES] = pairs


def columns_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--columns`; `chosen_columns` reads it."""
    return click.option(
        "--columns",
        metavar="COLUMN=INPUT,...",
        multiple=True,
        expose_value=False,
        callback=_keep_columns,
        help="Which column fills which input, where names differ: 'user_id=users,history=items{pad=0}'; "
        "lists as bags: 'tags=values+offsets'.",
    )(function)


def data_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--columns` and `--vocabulary`."""
    function = click.option(
        "--vocabulary",
        metavar="INPUT=FILE",
        multiple=True,
        expose_value=False,
        callback=_keep_vocabularies,
        help="Make rows of ids by a file of `kfac-onnx vocabulary build`; those beside the model are used "
        "unasked, INPUT=none leaves one out.",
    )(function)
    return columns_option(function)


def chosen_columns(ctx: click.Context) -> str:
    """Return what `--columns` says."""
    return str(ctx.meta.get(_COLUMNS, ""))


def chosen_vocabularies(ctx: click.Context) -> dict[str, str | None]:
    """Return the file of each input that `--vocabulary` names; None for one that has none."""
    return dict(ctx.meta.get(_VOCABULARIES, {}))
