"""Damages to what a transformed model says of itself, and to what users type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from mutation_parts import ODD_NUMBERS, Graph, Random, odd_text

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["METADATA", "damaged_text"]


def _odd_json(rng: Random) -> Any:
    return rng.choice(
        (
            None,
            True,
            0,
            -1,
            2**70,
            1e308,
            float("nan"),
            [],
            {},
            [[]],
            "\ud800",
            odd_text(rng),
            {"x": [1]},
            "parameter",
        )
    )


def _edit_json(rng: Random, value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if rng.random() < 0.05:
            return {**value, odd_text(rng): _odd_json(rng)}
        return {**value, key: _edit_json(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return [*value, value[index]]
            case _:
                return [*value[:index], _edit_json(rng, value[index], depth + 1), *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(ODD_NUMBERS)
    if isinstance(value, str) and rng.random() < 0.4:
        return value[:-1] if rng.random() < 0.5 else odd_text(rng)
    return _odd_json(rng)


def edit_entry(rng: Random, model: ModelProto) -> None:
    """Change one value inside the JSON of an entry."""
    entries = [item for item in model.metadata_props if item.key.startswith("kfac.")]
    if not entries:
        model.metadata_props.add(key="kfac.step", value=json.dumps(_odd_json(rng)))
        return
    entry = rng.choice(entries)
    try:
        data = json.loads(entry.value)
    except (ValueError, RecursionError):
        entry.value = odd_text(rng)
        return
    entry.value = json.dumps(_edit_json(rng, data))


def break_entry(rng: Random, model: ModelProto) -> None:
    """Make an entry something that is not JSON, or JSON without end."""
    entries = [item for item in model.metadata_props if item.key.startswith("kfac.")]
    if not entries:
        model.metadata_props.add(key="kfac.sites", value=odd_text(rng))
        return
    rng.choice(entries).value = rng.choice(
        (odd_text(rng), "[" * 100_000, '{"a":' * 5000, "NaN", "1" * 5000, "{}", "[]", "null", '"x"')
    )


def drop_entry(rng: Random, model: ModelProto) -> None:
    entries = model.metadata_props
    if entries:
        del entries[rng.randrange(len(entries))]


def double_entry(rng: Random, model: ModelProto) -> None:
    if model.metadata_props:
        model.metadata_props.add().CopyFrom(rng.choice(model.metadata_props))


def swap_entries(rng: Random, model: ModelProto) -> None:
    if len(model.metadata_props) > 1:
        first, second = rng.sample(list(model.metadata_props), 2)
        first.value, second.value = second.value, first.value


def odd_marks(rng: Random, model: ModelProto) -> None:
    """Break the marks on nodes: phase, site, pass."""
    marked = [node for node in model.graph.node if node.metadata_props]
    if marked:
        rng.choice(rng.choice(marked).metadata_props).value = rng.choice(
            (odd_text(rng), "commit", "gradients", "refresh", "undo", "select")
        )


METADATA: Final[tuple[Graph, ...]] = (
    edit_entry,
    edit_entry,
    edit_entry,
    edit_entry,
    break_entry,
    drop_entry,
    double_entry,
    swap_entries,
    odd_marks,
)


def damaged_text(rng: Random, text: str) -> str:
    """Return a pipeline or a name with a few characters changed, repeated or put in."""
    pieces = (
        "{",
        "}",
        "[",
        "]",
        ",",
        "=",
        '"',
        "\\",
        "\x00",
        "\x1b[2J",
        "é",
        "\u202e",
        " ",
        "\n",
        "1e999",
        "nan",
        "-1",
    )
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:at] + rng.choice(pieces) + text[at:]
            case 1:
                text = text[:at] + text[at + rng.choice((1, 5)) :]
            case 2:
                text = text[:at] + text[at : at + 20] * rng.choice((2, 30)) + text[at:]
            case _:
                text = text[:at] + rng.choice(pieces) * rng.choice((1, 100, 3000)) + text[at:]
    return text
