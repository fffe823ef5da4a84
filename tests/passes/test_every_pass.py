"""What holds for every pass: it counts everything, keeps nothing to itself, and leaves a sound model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from golden_models import Part, golden_files, parts_of

from kfac_onnx.api import TransformOptions
from kfac_onnx.canonical.pipelines import CANONICAL
from kfac_onnx.disk.models import load_model
from kfac_onnx.graph.verifier import problems_of
from kfac_onnx.pipeline.log import Log
from kfac_onnx.pipeline.pipeline import Trace, parse_pipeline
from kfac_onnx.pipeline.registry import BUILT_IN
from kfac_onnx.readers import read_forward_graph, read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
NAMES = [
    "ortart_dyncore__nplm",
    "ortart_leg14loss__nplm_pad0",
    "torchjoint_in__gpt_tied",
    "torchjoint_in__dlrm_offsets_mean",
    "torchjoint_in__lookup_transpose",
]
PIPELINES = {
    "half": TransformOptions(preset="half").text,
    "adaptive": TransformOptions(preset="adaptive", rest="momentum", target="cuda").text,
    "r1.7": TransformOptions(preset="r1.7", rest="sgd", grad_scale=8.0).text,
    "plain-adagrad": TransformOptions(preset="plain-adagrad", rest="adagrad").text,
    "dense": TransformOptions(preset="half", shape="dense").text,
    "clipped": "find-embeddings,clip-gradients{norm=1,value=0.1},insert-embedding-kfac,close-step,dce,lower",
    "layers": "find-embeddings,classify,insert-layer-kfac,insert-optimizer{parameters=all},close-step,dce,lower",
    "muon": "find-embeddings,classify,insert-muon,insert-optimizer{method=adamw,parameters=all},close-step,dce,lower",
}


PARTS = [part for path in golden_files() for part in parts_of(path)]
RAW = [
    *NAMES[2:],
    "fwd_dyncore__nplm",
    "jax2onnx__nplm_take",
    "tf2onnx_sgd__nplm",
    "traininginfo_dyncore__twotower_adam",
]


def changes_and_bytes(model: ir.Model, text: str, model_bytes: Callable[[ir.Model], bytes]) -> None:
    """Run passes one by one; each counts changes just if the written model is another one."""
    before, log = model_bytes(model), Log()
    for item in parse_pipeline(text):
        changes = item.run(model, log)
        after = model_bytes(model)
        assert (after != before) == bool(changes), f"{item}: {changes}"
        before = after


def test_every_pass_is_run() -> None:
    assert {item.name for part in PARTS for item in part.pipeline} == set(BUILT_IN)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_pass_counts_what_it_changes(
    part: Part, tmp_path: Path, model_bytes: Callable[[ir.Model], bytes]
) -> None:
    changes_and_bytes(load_model(part.write(tmp_path)), str(part.pipeline), model_bytes)


@pytest.mark.parametrize("name", RAW)
def test_the_canonical_passes_count_what_they_change(
    name: str, model_bytes: Callable[[ir.Model], bytes]
) -> None:
    text = CANONICAL.replace("lower-training-operators", "lower-training-operators{keep=[Gradient]}")
    changes_and_bytes(load_model(GRAPHS / f"{name}.onnx"), text, model_bytes)


@pytest.mark.parametrize("name", RAW)
def test_the_canonical_passes_leave_a_sound_model(name: str) -> None:
    read = read_forward_graph if name.startswith("fwd") else read_training_graph
    model = read(GRAPHS / f"{name}.onnx", trace=Trace(verify=True))
    again = parse_pipeline(model.metadata_props["kfac.reading"])  # its text is a pipeline
    assert {item.name for item in again} >= {item.name for item in parse_pipeline(CANONICAL)}


@pytest.mark.parametrize("pipeline", list(PIPELINES))
@pytest.mark.parametrize("name", NAMES)
def test_bytes_differ_exactly_when_changes_are_counted(
    name: str, pipeline: str, model_bytes: Callable[[ir.Model], bytes]
) -> None:
    model = read_training_graph(GRAPHS / f"{name}.onnx")
    before = model_bytes(model)
    for item in parse_pipeline(PIPELINES[pipeline]):
        changes = item.run(model, Log())
        after = model_bytes(model)
        assert (after != before) == bool(changes), str(item)
        assert problems_of(model) == [], str(item)
        before = after


@pytest.mark.parametrize("pipeline", list(PIPELINES))
def test_a_pass_keeps_nothing_to_itself(pipeline: str, model_bytes: Callable[[ir.Model], bytes]) -> None:
    passes = parse_pipeline(PIPELINES[pipeline])
    made: list[bytes] = []
    for name in (NAMES[0], NAMES[2], NAMES[0]):  # the same objects, with another model in between
        model = read_training_graph(GRAPHS / f"{name}.onnx")
        passes.run(model)
        made.append(model_bytes(model))
    assert made[0] == made[2]


def test_the_text_in_the_file_makes_the_file_again(model_bytes: Callable[[ir.Model], bytes]) -> None:
    first = read_training_graph(GRAPHS / f"{NAMES[0]}.onnx")
    parse_pipeline(PIPELINES["half"]).run(first)
    second = read_training_graph(GRAPHS / f"{NAMES[0]}.onnx")
    parse_pipeline(first.metadata_props["kfac.pipeline"]).run(second)
    assert model_bytes(first) == model_bytes(second)
