"""Damages to the bytes of a file, and to the fields of its protocol buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mutation_parts import Random

__all__ = ["damaged_bytes"]


def _flip_bits(rng: Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_bytes(rng: Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 16))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _truncate(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _cut_out(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 100))]


def _repeat_part(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice((1, 8, 300))]


def _insert(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 32)))


def _splice(rng: Random, data: bytearray) -> None:
    """Put a part of the file over another part."""
    start, source, size = (rng.randrange(len(data)) for _ in range(3))
    data[start : start + size] = data[source : source + rng.randrange(1, size + 2)]


def _long_number(rng: Random, data: bytearray) -> None:
    """Write a varint of the largest size somewhere: as a length it points far behind the end."""
    start = rng.randrange(len(data))
    data[start : start + 1] = b"\xff" * rng.choice((4, 9, 12)) + b"\x01"


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise IndexError


def _fields(data: bytes) -> list[tuple[int, int, int]] | None:
    """Return (start, start of the content, end) of each field of a message; None if it is none."""
    at, found = 0, []
    try:
        while at < len(data):
            start = at
            tag, at = _varint(data, at)
            kind = tag & 7
            if not tag >> 3 or kind in (3, 4, 6, 7):
                return None
            body = at
            if kind == 0:
                _, at = _varint(data, at)
            elif kind == 2:
                size, body = _varint(data, at)
                at = body + size
            else:
                at += 8 if kind == 1 else 4
            if at > len(data):
                return None
            found.append((start, body, at))
    except IndexError:
        return None
    return found


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _edit_fields(rng: Random, data: bytes, depth: int = 0) -> bytes:
    """Double, drop, move or retag a field of a message, at a random depth."""
    fields = _fields(data)
    if not fields:
        return data
    start, body, end = rng.choice(fields)
    tag, after_tag = _varint(data, start)
    if tag & 7 == 2 and depth < 8 and rng.random() < 0.75 and _fields(data[body:end]):
        inner = _edit_fields(rng, data[body:end], depth + 1)
        return data[:start] + _number(tag) + _number(len(inner)) + inner + data[end:]
    field = data[start:end]
    match rng.randrange(4):
        case 0:
            return data[:end] + field * rng.choice((1, 1, 50)) + data[end:]
        case 1:
            return data[:start] + data[end:]
        case 2:
            rest = data[:start] + data[end:]
            other = rng.choice(_fields(rest) or [(0, 0, 0)])[0]
            return rest[:other] + field + rest[other:]
        case _:
            return data[:start] + _number(rng.randrange(1, 30) << 3 | tag & 7) + data[after_tag:]


def _nest(rng: Random, data: bytearray) -> None:
    """Append a graph within a node within a graph, deeper than any parser should follow.

    Fields of a message that come twice are merged, so this is added to the model's own graph.
    """
    body = b"\x12\x04leaf"  # GraphProto.name
    for _ in range(rng.choice((10, 24, 30, 33, 34, 50, 500, 5000))):
        attribute = b"\x0a\x04body\x32" + _number(len(body)) + body + b"\xa0\x01\x05"  # name, g, type = GRAPH
        node = (
            b"\x12\x01x\x22\x04Loop\x2a" + _number(len(attribute)) + attribute
        )  # output, op_type, attribute
        body = b"\x0a" + _number(len(node)) + node  # GraphProto.node
    data += b"\x3a" + _number(len(body)) + body  # ModelProto.graph


def _fields_edited(rng: Random, data: bytearray) -> None:
    data[:] = _edit_fields(rng, bytes(data))


BYTES: Final = (
    _flip_bits,
    _set_bytes,
    _truncate,
    _cut_out,
    _repeat_part,
    _insert,
    _splice,
    _long_number,
    _nest,
    *(_fields_edited,) * 8,
)


def damaged_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Return a damaged copy of a file, and what was done."""
    copy = bytearray(data)
    names = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice(BYTES)
        if copy:
            change(rng, copy)
        names.append(change.__name__.strip("_"))
    return bytes(copy), "+".join(names)
