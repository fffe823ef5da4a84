"""The short cut of a step: what it holds, and the graphs that have none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from preset_names import COUNTING, SQUARING

from kfac_onnx import transform
from kfac_onnx.step import short_cut as partition_short_cut
from kfac_onnx.step.plan import Slot, partition
from kfac_onnx.step.short_cut import Counted

if TYPE_CHECKING:
    from types import ModuleType

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"


def test_it_makes_what_the_stages_make_but_for_the_refresh(toy: ModuleType) -> None:
    plan = partition(toy.whole_step(ordered=True))
    assert plan.short is not None
    assert plan.short.due == ("kfac/next/refresh",)
    assert plan.short.counted == (Counted("A", "row_ids", "A/before"),)
    stages = {stage.slot: stage for stage in plan.stages}
    made = {*stages[Slot.GRADIENTS].outputs, *stages[Slot.PRECONDITION].outputs}
    assert set(plan.short.whole.outputs) == made - {"refresh"} >= set(plan.short.due)
    assert plan.short.whole.writes == {"A/counted": "A"}
    names = {name for node in plan.short.whole.model.graph.node for name in (*node.input, *node.output)}
    assert "root/now" not in names  # the root stays the one that it was
    assert "root" in plan.short.whole.inputs
    assert not {"refresh", "early", "due"} & names


def test_what_is_due_next_is_computed_from_the_counter_after_the_step(toy: ModuleType) -> None:
    plan = partition(toy.whole_step(ordered=True))
    gradients = next(stage for stage in plan.stages if stage.slot == Slot.GRADIENTS)
    assert "kfac/next/refresh" in gradients.outputs
    nodes = [node for node in gradients.model.graph.node if node.name.startswith("kfac/next/")]
    assert [(node.op_type, list(node.input)) for node in nodes] == [
        ("Add", ["t/new", "one_i"]),
        ("Mod", ["kfac/next/t/new", "three"]),
        ("Equal", ["kfac/next/t3", "zero_i"]),
        ("LessOrEqual", ["kfac/next/t/new", "two_i"]),
        ("Or", ["kfac/next/due", "kfac/next/early"]),
    ]


def test_none_where_old_counts_could_be_read_after_the_write(toy: ModuleType) -> None:
    assert partition(toy.whole_step(ordered=False)).short is None


def test_none_where_a_batch_decides_what_is_due(toy: ModuleType) -> None:
    assert partition(toy.whole_step(ordered=True, due_by="n_i")).short is None


def test_none_where_nothing_lies_between(toy: ModuleType) -> None:
    assert partition(toy.whole_step(kfac=False)).short is None


def test_none_in_large_graphs(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_short_cut, "MOST_NODES", 10)
    assert partition(toy.whole_step(ordered=True)).short is None


@pytest.mark.parametrize("preset", SQUARING)
def test_rows_merge_in_a_stage_of_one_thread_and_leave_no_short_cut(preset: str) -> None:
    plan = partition(transform(GRAPHS / "torchjoint_in__nplm.onnx", preset=preset))
    (merging,) = [stage for stage in plan.stages if stage.name == "count"]
    assert plan.short is None
    assert [node.op_type for node in merging.model.graph.node] == ["MergeLookups"]
    assert merging.one_thread


@pytest.mark.parametrize("preset", COUNTING)
@pytest.mark.parametrize("name", ["torchjoint_in__nplm", "ortart_dyncore__twotower"])
def test_every_preset_that_counts_has_one_on_real_graphs(name: str, preset: str) -> None:
    plan = partition(transform(GRAPHS / f"{name}.onnx", preset=preset))
    assert plan.short is not None
    counts = [state.input for state in plan.states if state.update == "in-place" and state.role == "factor"]
    written = [item.state for item in plan.short.counted]
    assert sorted(written) == sorted(counts)
    (due,) = [value for value in plan.short.whole.model.graph.output if value.name in plan.short.due]
    assert due.type.tensor_type.elem_type == onnx.TensorProto.BOOL
    assert due.type.tensor_type.HasField("shape")
    assert not due.type.tensor_type.shape.dim
