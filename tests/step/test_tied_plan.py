"""A step never writes a table that it still reads, also where lookups and a projection share the table."""

from __future__ import annotations

import pytest
from corpus_cases import Case, marked
from corpus_table import ROWS

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.step.plan import Plan, Slot, partition

TIED = [
    row.name for row in ROWS.values() if row.verdict == "trained" and any(t.tied for t in row.tables.values())
]


def check(plan: Plan) -> None:
    """Tables are written in the commit stage alone, by nodes that take them; nobody reads them later."""
    for state in [state for state in plan.states if state.role == "parameter"]:
        versions = {name for name, owner in plan.versions.items() if owner == state.input}
        if state.update == "double":  # another buffer than the one that is read
            assert plan.candidates[state.input] != state.input
            assert not versions
            assert all(state.input not in stage.outputs for stage in plan.stages)
            continue
        (writer,) = [stage for stage in plan.stages if state.input in stage.writes.values()]
        assert writer.slot == Slot.COMMIT
        reading = [node for node in writer.model.graph.node if versions & set(node.input)]
        assert all(versions & set(node.output) for node in reading), f"commit reads {state.input}"
        for stage in plan.stages:
            assert stage.slot < Slot.COMMIT or stage is writer or not versions & set(stage.inputs)


@pytest.mark.parametrize("tied", ["lookup", "both"])
@pytest.mark.parametrize("preset", ["half", "adaptive"])
@pytest.mark.parametrize("name", TIED)
def test_no_stage_reads_a_table_that_is_written(name: str, preset: str, tied: str) -> None:
    model = transform(Case(name).path, preset=preset, tied=tied)
    plan = partition(model)
    check(plan)
    (table,) = [item for item, entry in ROWS[name].tables.items() if entry.tied]
    (state,) = [state for state in plan.states if state.input == table]
    assert (state.role, state.update) == ("parameter", "double")
    readers = [stage for stage in plan.stages if table in stage.inputs]
    assert {stage.slot for stage in readers} <= {Slot.GRADIENTS, Slot.PRECONDITION}
    (writer,) = [stage for stage in plan.stages if plan.candidates[table] in stage.outputs]
    assert writer.slot in (Slot.PRECONDITION, Slot.GRADIENTS)


@pytest.mark.parametrize("name", TIED[:1])
def test_the_buffers_of_a_tied_table_are_two(name: str) -> None:
    case, graph = marked(name)
    feed = case.feed()
    model = transform(case.path, tied="both")
    with TrainingSession(model, parameters=graph.initial(case)) as session:
        (table,) = [item for item, entry in ROWS[name].tables.items() if entry.tied]
        assert session.describe()["states"][table] == "two buffers"
        before = session.parameters[table]
        session.step({item.name: feed[item.name] for item in session.batch_inputs})
        assert abs(session.parameters[table] - before).max() > 0
