"""A session has the bodies of its device, whatever a file says of its pipeline; what it cannot read it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = "ortart_legcore__twotower"


def adding(session: kx.TrainingSession) -> set[str]:
    """Return the operators that add rows where more than one thread runs."""
    return {
        node.op_type
        for stage in session._plan.stages
        if not stage.one_thread
        for function in stage.model.functions
        for node in function.node
        for attribute in node.attribute
        if attribute.name == "reduction" and attribute.s == b"add"
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_text_of_the_pipeline_decides_nothing(graph_case: Callable[..., Any], target: str) -> None:
    case = graph_case(GRAPH, preset="half", target=target)
    with case.open() as session:
        bodies, loss = adding(session), session.step(case.batches[0])["loss"]
        states = session.states
    assert "ScatterND" not in bodies
    text = case.model.metadata_props["kfac.pipeline"]
    case.model.metadata_props["kfac.pipeline"] = text.replace("lower{", "lower{of-tomorrow=1,")
    with case.open() as session:
        assert adding(session) == bodies
        assert session.step(case.batches[0])["loss"] == loss
        for name, array in session.states.items():
            np.testing.assert_array_equal(array, states[name])


def test_the_cuda_bodies_are_seen_by_this_test(graph_case: Callable[..., Any]) -> None:
    case = graph_case(GRAPH, preset="half", target="cuda")
    step = metadata.read(case.model, "step", metadata.Step)
    assert step is not None
    assert step.target == "cuda"
    entry = json.loads(case.model.metadata_props["kfac.step"])
    case.model.metadata_props["kfac.step"] = json.dumps({**entry, "target": "cpu"})  # a lie
    with case.open() as session:
        assert "ScatterND" in adding(session)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_file_that_does_not_say_gets_the_bodies_of_the_device(
    graph_case: Callable[..., Any], target: str
) -> None:
    case = graph_case(GRAPH, preset="half", target=target)
    entry = json.loads(case.model.metadata_props["kfac.step"])
    del entry["target"]
    case.model.metadata_props["kfac.step"] = json.dumps(entry)
    with case.open() as session:
        assert "ScatterND" not in adding(session)
        assert session.step(case.batches[0])["skipped"] is False


def test_a_target_of_another_version_is_refused(graph_case: Callable[..., Any]) -> None:
    case = graph_case(GRAPH)
    entry = json.loads(case.model.metadata_props["kfac.step"])
    case.model.metadata_props["kfac.step"] = json.dumps({**entry, "target": "npu"})
    with pytest.raises(UserError) as caught:
        case.open()
    assert caught.value.message == (
        "the entry 'kfac.step' of the model's metadata is damaged: 'target' must be one of cpu, cuda"
    )


def test_each_target_is_written(graph_case: Callable[..., Any]) -> None:
    for target in ("cpu", "cuda"):
        step = metadata.read(graph_case(GRAPH, target=target).model, "step", metadata.Step)
        assert step is not None
        assert step.target == target
