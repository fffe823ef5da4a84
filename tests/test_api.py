"""What users call: `transform` takes its options, and the garbage collector is as it was afterwards."""

from __future__ import annotations

import gc
import inspect
from dataclasses import fields
from typing import Any

import pytest

import kfac_onnx as kx
from kfac_onnx.api import TransformOptions, collector_paused
from kfac_onnx.errors import UserError
from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac
from kfac_onnx.passes.rules import METHODS
from kfac_onnx.passes.standard import BLOCK, PLAIN
from kfac_onnx.pipeline.options import options_of
from kfac_onnx.pipeline.pipeline import parse_pipeline


def fails() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
        raise KeyError


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_as_it_was(running: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if running else gc.disable)()
        with pytest.raises(KeyError):
            fails()
        assert gc.isenabled() is running
    finally:
        (gc.enable if before else gc.disable)()


def test_transform_takes_what_its_options_are() -> None:
    parameters = list(inspect.signature(kx.transform).parameters.values())
    assert [parameter.name for parameter in parameters[1:]] == [f.name for f in fields(TransformOptions)]
    with pytest.raises(TypeError, match=r"^transform\(\) has no argument 'prest'; did you mean 'preset'\?$"):
        kx.transform("model.onnx", prest="half")  # pyright: ignore[reportCallIssue]


def test_the_block_s_options_are_those_of_its_pass() -> None:
    own = {"preset", "lr", "shape", "grad_scale", "allow_fallback", "only", "rate", "table_decay"}
    assert {*BLOCK} == {option.field for option in options_of(InsertEmbeddingKfac)} - own


@pytest.mark.parametrize("preset", PLAIN)
@pytest.mark.parametrize("rest", METHODS)
def test_plain_pipelines(preset: str, rest: str) -> None:
    text = TransformOptions(preset=preset, lr=0.25, rest=rest, rest_lr=0.5).text
    tables, others = (item for item in parse_pipeline(text).passes if item.name == "insert-optimizer")
    settings: list[Any] = [
        (getattr(item, "method"), getattr(item, "lr"), getattr(item, "parameters"))  # noqa: B009  of one pass
        for item in (tables, others)
    ]
    assert settings == [(preset.removeprefix("plain-"), 0.25, "tables"), (rest, 0.5, "rest")]


@pytest.mark.parametrize("name", BLOCK)
def test_a_plain_preset_has_no_block(name: str) -> None:
    with pytest.raises(UserError) as caught:
        TransformOptions(preset="plain-sgd", **{name: 1})  # pyright: ignore[reportArgumentType]
    assert caught.value.message == f"preset 'plain-sgd' has no K-FAC block, so {name} cannot be set"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "halve"}, "unknown preset 'halve'; did you mean 'half'?"),
        ({"rest": "adan"}, "unknown optimizer 'adan'; did you mean 'adam'?"),
    ],
)
def test_unknown_names_list_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TransformOptions(**options)
    assert caught.value.message == message
