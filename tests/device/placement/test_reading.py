"""Reading what onnxruntime wrote down: recorded profiles and an optimized model (tests/data/placement)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfac_onnx.device.placement import read_optimized, read_profile
from kfac_onnx.device.placement.records import CPU, CUDA, is_inserted
from kfac_onnx.errors import UserError

DATA = Path(__file__).parents[2] / "data" / "placement"


def test_a_profile_of_the_cpu() -> None:
    found = read_profile(DATA / "profile_cpu.json", "all", CPU)
    assert found.by_provider(inserted=False) == {CPU: 1}
    assert set(found.by_provider(inserted=True)) == {CPU}
    assert found.copies == ()
    assert found.measured
    operators = {node.operator for node in found.nodes if node.inserted}
    assert operators == {"MergeRows", "AddRows"}
    names = [node.name for node in found.nodes]
    assert len(names) == len(set(names))  # two runs, each node once


def test_a_profile_of_the_cuda_provider() -> None:
    found = read_profile(DATA / "profile_cuda.json", "all", CUDA, "1.31.1")
    away = {node.op_type: node.provider for node in found.nodes if node.provider == CPU}
    assert away == {"Unique": CPU, "Concat": CPU}
    assert [node.op_type for node in found.nodes if not node.inserted] == ["Relu"]
    assert {copy.direction for copy in found.copies} == {"to device"}
    assert len(found.copies) == 2  # unique ids and their places come back from the host
    assert found.onnxruntime == "1.31.1"


def test_the_same_profile_with_a_node_moved(tmp_path: Path) -> None:
    """The provider of each event is what counts."""
    events = json.loads((DATA / "profile_cuda.json").read_text())
    for event in events:
        if event["args"].get("op_name") == "Relu":
            event["args"]["provider"] = CPU
    (tmp_path / "moved.json").write_text(json.dumps(events))
    found = read_profile(tmp_path / "moved.json", "all", CUDA)
    assert found.by_provider(inserted=False) == {CPU: 1}


def test_an_optimized_model_shows_the_copies() -> None:
    found = read_optimized(DATA / "optimized_cuda.onnx", "all", CUDA)
    assert {(copy.value, copy.direction) for copy in found.copies} == {
        ("_inlfunc_MergeRows_inverse", "to device"),
        ("unique", "to device"),
    }
    assert {copy.because for copy in found.own_copies} == {("_inlfunc_MergeRows_n0",)}
    assert found.user_copies == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a profile of onnxruntime"),
        ('{"a": 1}', "is no profile of onnxruntime: it holds no list of events"),
    ],
)
def test_files_that_are_no_profiles(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_profile(tmp_path / "bad.json", "all", CUDA)


def test_other_events_are_passed_over(tmp_path: Path) -> None:
    events = [{"cat": "Session", "name": "run"}, 3, {"cat": "Node", "name": "a_fence_before", "args": {}}]
    (tmp_path / "empty.json").write_text(json.dumps(events))
    assert read_profile(tmp_path / "empty.json", "all", CUDA).nodes == ()


def test_whose_a_node_is_by_its_name() -> None:
    assert is_inserted("kfac/insert-embedding-kfac/w/G")
    assert is_inserted("_inlfunc_AddRows_n3")
    assert is_inserted("_inlfunc_AddRows_token_7_n3")
    assert not is_inserted("_inlfunc_SoftmaxCrossEntropyLoss_n3")
    assert not is_inserted("node_Gather_7")
