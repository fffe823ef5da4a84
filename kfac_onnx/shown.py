"""Text from files as people may safely see it: nothing in it acts on a terminal, and no line is endless.

Names, documentation and error messages of a model are whatever somebody wrote there, escape sequences
included.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["safe", "safe_line"]

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
