"""How commands print: JSON for programs, tables for people, both on stdout.

A terminal that cannot show a sign gets one that is near, or its number: printing never fails for that.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

import click

from kfac_onnx.errors import safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from kfac_onnx.metadata import Account, Refusal

__all__ = [
    "console",
    "discard_output",
    "print_accounts",
    "print_json",
    "print_refusals",
    "print_table",
    "say",
    "show_every_sign",
]

_UNLIMITED = 10_000
_CLASSES: Final = {
    "table": "embedding tables",
    "other": "other trained parameters",
    "merged": "that an exporter may have merged",
    "refused": "refused",
    "frozen": "frozen",
}
"""The classes of tensors as they are counted in a line."""
_NOT_SHOWN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What JSON leaves as it is, and a terminal may act on; inside of JSON strings an escape means the same."""


_NEAR = {
    "–": "-",
    "—": "-",
    "×": "x",
    "·": ".",
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "±": "+-",
    "√": "sqrt",
}
"""What stands for signs of our own texts where a terminal does not have them."""


def _near_sign(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    near = "".join(_NEAR.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs)
    return near, error.end


def show_every_sign() -> None:
    """Let stdout and stderr write what their encoding lacks as a sign that is near, or as its number."""
    codecs.register_error("kfac-onnx", _near_sign)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="kfac-onnx")


def discard_output() -> None:
    """Send what stdout still holds to nowhere, so that Python does not fail over it again when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(text: str, *, err: bool = False) -> None:
    """Print lines on stdout or stderr; what a file says in them cannot act on the terminal."""
    click.echo(safe(text), err=err)


def print_json(data: object) -> None:
    """Print JSON data, readable and in a stable order; numbers that are not finite become null."""
    from kfac_onnx.disk.json_lines import plain_json

    text = json.dumps(plain_json(data), indent=2, ensure_ascii=False, allow_nan=False)
    if not (sys.stdout.encoding or "utf-8").lower().startswith("utf"):
        text = json.dumps(plain_json(data), indent=2, allow_nan=False)
    click.echo(_NOT_SHOWN.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def console(*, stderr: bool = False) -> Console:
    """Return a rich console; where it is not a terminal nothing is cut or coloured."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = shutil.get_terminal_size().columns if stream.isatty() else _UNLIMITED
    return Console(file=stream, width=width, highlight=False, soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; a column whose name ends in a blank is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.endswith(" ")
        table.add_column(column.rstrip(), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("—" if cell is None else safe(str(cell))) for cell in row))
    console().print(table)


def print_accounts(accounts: Iterable[Account]) -> None:
    """Print how many tensors are in each class, and those of which more is to be said; refusals are apart."""
    accounts = list(accounts)
    if not accounts:
        return
    numbers = Counter(item.kind for item in accounts)
    counts = [(numbers[kind], words) for kind, words in _CLASSES.items() if numbers[kind]]
    say("tensors: " + ", ".join(f"{n} {words.removesuffix('s') if n == 1 else words}" for n, words in counts))
    for item in accounts:
        if item.kind in ("frozen", "merged") or item.reason.startswith("no table"):
            say(f"{item.kind}: {item.name} ({item.reason})")


def print_refusals(refused: Iterable[Refusal]) -> None:
    """Print each refusal as a few lines: its sentences are too long for a table."""
    for item in refused:
        say(f"refused: {item.parameter}")
        say(f"  why:  {item.reason}")
        say(f"  path: {item.path}")
        say(f"  help: {item.remedy}")
