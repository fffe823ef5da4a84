"""Reading a pipeline's text: `find-embeddings,lower{target=cpu},dce`.

```
pipeline = [pass {"," pass}]
pass     = NAME ["{" [option {"," option}] "}"]
option   = NAME "=" (word | "[" [word {"," word}] "]")
word     = BARE | JSON string in double quotes
```
Blanks between tokens mean nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import UserError
from kfac_onnx.pipeline.options import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Call", "read_calls"]

_TOKEN: Final = re.compile(
    r'\s*(?:(?P<mark>[,={}\[\]])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<bare>[^\s,={}\[\]"]+))'
)


@dataclass(frozen=True)
class Call:
    """One pass as written: its name and its options in order, not yet checked against the pass."""

    name: str
    options: tuple[tuple[str, Text | tuple[Text, ...]], ...]


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._tokens(text))
        self.next = 0

    def _tokens(self, text: str) -> Iterator[_Token]:
        at = 0
        end = len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                raise self.error("a quote that is never closed", at)
            kind = match.lastgroup or ""
            yield _Token(kind, match.group(kind), match.start(kind))
            at = match.end()

    def error(self, found: str, at: int) -> UserError:
        return UserError(
            f"the pipeline has {found} at character {at + 1}",
            path=f"{self.text[:at]} >>> {self.text[at:]}",
            help="a pipeline reads like: find-embeddings,lower{target=cpu},dce",
        )

    def peek(self, mark: str) -> bool:
        if self.next >= len(self.tokens):
            return False
        token = self.tokens[self.next]
        return token.kind == "mark" and token.text == mark

    def take(self, mark: str) -> bool:
        found = self.peek(mark)
        self.next += found
        return found

    def expect(self, mark: str, why: str) -> None:
        if not self.take(mark):
            raise self.unexpected(why)

    def unexpected(self, wanted: str) -> UserError:
        if self.next >= len(self.tokens):
            return self.error(f"an end where {wanted} should be", len(self.text))
        token = self.tokens[self.next]
        return self.error(f"'{token.text}' where {wanted} should be", token.at)

    def name(self, wanted: str) -> str:
        if self.next < len(self.tokens) and self.tokens[self.next].kind == "bare":
            self.next += 1
            return self.tokens[self.next - 1].text
        raise self.unexpected(wanted)

    def word(self) -> Text:
        if self.next < len(self.tokens) and self.tokens[self.next].kind == "quoted":
            token = self.tokens[self.next]
            try:
                text = json.loads(token.text)
            except json.JSONDecodeError as e:
                raise self.error("a string that JSON cannot read", token.at) from e
            self.next += 1
            return Text(text, quoted=True)
        return Text(self.name("a value"))


def read_calls(text: str) -> list[Call]:
    """Return the passes that a pipeline's text names, in order.

    Raises UserError where the text is not of the form above, pointing at the character.
    """
    reader = _Reader(text)
    calls: list[Call] = []
    while reader.next < len(reader.tokens):
        if calls:
            reader.expect(",", "a comma")
        calls.append(_call(reader))
    return calls


def _call(reader: _Reader) -> Call:
    name = reader.name("the name of a pass")
    options: list[tuple[str, Text | tuple[Text, ...]]] = []
    if reader.take("{"):
        while not reader.take("}"):
            if options:
                reader.expect(",", "a comma or a closing brace")
            key = reader.name("the name of an option")
            reader.expect("=", "an equals sign")
            options.append((key, _list(reader) if reader.take("[") else reader.word()))
    return Call(name, tuple(options))


def _list(reader: _Reader) -> tuple[Text, ...]:
    items: list[Text] = []
    while not reader.take("]"):
        if items:
            reader.expect(",", "a comma or a closing bracket")
        items.append(reader.word())
    return tuple(items)
