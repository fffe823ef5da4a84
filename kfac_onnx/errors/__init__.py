"""Errors as sentences: one class per reaction of the command line.

`UserError` is the user's input (exit code 1, no traceback), `VerifyError` a pass that left a broken
model behind (exit code 3), everything else is a bug.

Text from files is shown so that nothing in it acts on a terminal and no line is endless (`safe`): names,
documentation and messages of a model are whatever somebody wrote there, escape sequences included.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["NoGradientsError", "UserError", "VerifyError", "did_you_mean", "first_line", "safe", "safe_line"]


class UserError(Exception):
    """Something the user gave us cannot be used; says what, where, why and what to do next.

    `message` is one whole sentence in the user's own names and without a final stop. The other
    parts are optional and each becomes one line: `place` (file, node), `path` (how we got there),
    `tried` (one line per rule), `context` (the pass that ran) and `help` (the remedy). In the text of the
    error each stays one line, whatever the names in it hold.
    """

    def __init__(
        self,
        message: str,
        *,
        place: str | None = None,
        path: str | None = None,
        tried: Iterable[str] = (),
        context: str | None = None,
        help: str | None = None,  # noqa: A002  the printed label of this line
    ) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.path = path
        self.tried = tuple(tried)
        self.context = context
        self.help = help

    def __str__(self) -> str:
        lines = [self.message]
        if self.place is not None:
            lines.append(f"  --> {self.place}")
        if self.path is not None:
            lines.append(f"  path: {self.path}")
        lines.extend(f"  tried: {line}" for line in self.tried)
        if self.context is not None:
            lines.append(f"  in:   {self.context}")
        if self.help is not None:
            lines.append(f"  help: {self.help}")
        return "\n".join(map(safe_line, lines))


class NoGradientsError(UserError):
    """The graph can be read, but it does not say which values are the gradients of its parameters."""


class VerifyError(Exception):
    """A pass left a model that breaks an invariant: a bug of the pass, never the user's fault."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'decay'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, for a sentence that quotes it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


_RAW: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and newline, marks that turn the direction of text, lone surrogates."""
_LONGEST: Final = 4000
"""Characters of one line of an error."""


def safe(text: str) -> str:
    r"""Return text with control characters written out, such as `\x1b`; tabs and newlines stay."""
    return _RAW.sub(_escaped, text)


def safe_line(text: str) -> str:
    r"""Return text as one line of bounded length: newlines and tabs are written out as well."""
    line = safe(text).replace("\n", "\\n").replace("\t", "\\t")
    if len(line) <= _LONGEST:
        return line
    left, right = line[: _LONGEST // 2], line[-_LONGEST // 4 :]
    return f"{left} [{len(line) - len(left) - len(right)} more characters] {right}"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
