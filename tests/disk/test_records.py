"""Dataclasses from JSON: every declared type is checked, and what a sound writer wrote comes back."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from kfac_onnx.disk.records import RecordError, build, names_of, parse
from kfac_onnx.metadata import LearningRate, Phase, State, Step, StepSettings


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    ids: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    size: int
    on: bool
    colour: Colour
    kind: Literal["a", "b"]
    initial: str | float
    items: tuple[Inner, ...] = ()
    sizes: tuple[int, ...] = ()
    links: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    anything: dict[str, Any] = field(default_factory=dict[str, Any])


SOUND = {
    "name": "n",
    "size": 3,
    "on": True,
    "colour": "blue",
    "kind": "b",
    "initial": 0.5,
    "items": [{"ids": None}, {"ids": "i", "weight": 2}],
    "sizes": [1, 2],
    "links": {"a": None, "b": "c"},
    "anything": {"x": [1, {"y": None}]},
}


def test_sound_data_come_back() -> None:
    made = build(Outer, SOUND)
    assert made.items == (Inner(None, 1.0), Inner("i", 2.0))
    assert isinstance(made.items[1].weight, float)
    assert (made.colour, made.sizes, made.links) == (Colour.BLUE, (1, 2), {"a": None, "b": "c"})
    assert build(Outer, json.loads(json.dumps(dataclasses.asdict(made)))) == made
    assert build(Outer, SOUND | {"of a newer version": 1}) == made
    assert names_of(Inner) == ("ids", "weight")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 3}, "'name' must be a text"),
        ({"name": None}, "'name' must be a text"),
        ({"name": "\ud800"}, "'name' is no valid text"),
        ({"size": "3"}, "'size' must be a whole number"),
        ({"size": 3.0}, "'size' must be a whole number"),
        ({"size": True}, "'size' must be a number"),
        ({"size": 2**63}, "'size' is too large"),
        ({"on": 1}, "'on' must be a bool"),
        ({"colour": "green"}, "'colour' must be one of red, blue"),
        ({"colour": []}, "'colour' must be one of red, blue"),
        ({"kind": "c"}, "'kind' must be one of a, b"),
        ({"kind": {}}, "'kind' must be one of a, b"),
        ({"initial": None}, "'initial' must be a text"),
        ({"initial": float("nan")}, "'initial' must be a text"),
        ({"items": {}}, "'items' must be a list"),
        ({"items": [3]}, "items[0] is no object"),
        ({"items": [{"ids": None}, {}]}, "'items[1].ids' is missing"),
        ({"items": [{"ids": None, "weight": 10**400}]}, "'items[0].weight' must be a finite number"),
        ({"items": [{"ids": None, "weight": float("inf")}]}, "'items[0].weight' must be a finite number"),
        ({"sizes": [1, None]}, "'sizes[1]' must be a whole number"),
        ({"links": []}, "'links' must be an object"),
        ({"links": {"a": 1}}, "'links.a' must be a text"),
    ],
)
def test_every_field_is_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError) as caught:
        build(Outer, SOUND | changes)
    assert str(caught.value) == said


@pytest.mark.parametrize("name", ["name", "size", "on", "colour", "kind", "initial"])
def test_what_has_no_default_must_be_there(name: str) -> None:
    with pytest.raises(RecordError, match=f"'{name}' is missing"):
        build(Outer, {key: value for key, value in SOUND.items() if key != name})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 50_000, "1" * 5000, "nul\0"])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(RecordError):
        parse(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"g_rows": {}}, "'settings.g_rows' must be a whole number"),
        ({"g_every": "2"}, "'settings.g_every' must be a whole number"),
        ({"tied": ["both"]}, "'settings.tied' must be a text"),
    ],
)
def test_settings_that_are_read_again_have_their_types(settings: dict[str, object], said: str) -> None:
    data = {"loss": None, "ok": "ok", "batch": [], "learning_rates": [], "settings": settings}
    with pytest.raises(RecordError) as caught:
        build(Step, data)
    assert str(caught.value) == said
    data["settings"] = {"preset": "half", "mine": {"g_rows": {}}}
    assert build(Step, data).settings == StepSettings(preset="half")


def test_the_records_of_models_come_back() -> None:
    state = State("i", "o", (2, 3), "float32", 0.5, Phase.COUNT, "double", "c", "factor", aliases=("i", "o"))
    assert build(State, json.loads(json.dumps(dataclasses.asdict(state)))) == state
    step = Step("loss", "ok", ("ids",), (LearningRate("lr", 0.01),), settings=StepSettings(preset="half"))
    assert build(Step, json.loads(json.dumps(dataclasses.asdict(step)))) == step
