"""Partition: which nodes run when, what crosses, and models that cannot be split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import pytest
from preset_names import INVARIANT

from kfac_onnx import metadata, transform
from kfac_onnx.errors import VerifyError
from kfac_onnx.metadata import State, Step
from kfac_onnx.step.plan import Plan, Slot, Stage, extract, partition

if TYPE_CHECKING:
    from types import ModuleType


GRAPHS = Path(__file__).parents[1] / "data" / "graphs"


def stage(plan: Plan, slot: Slot) -> Stage:
    return next(item for item in plan.stages if item.slot == slot)


def operators(item: Stage) -> list[str]:
    return [node.op_type for node in item.model.graph.node]


def reductions(item: Stage) -> set[tuple[str, str]]:
    return {
        (node.op_type, attribute.s.decode())
        for function in item.model.functions
        for node in function.node
        for attribute in node.attribute
        if attribute.name == "reduction"
    }


def test_stages_of_the_toy(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    assert [item.name for item in plan.stages] == [
        "gradients", "refresh", "precondition", "commit", "undo",
    ]  # fmt: skip
    assert [item.one_thread for item in plan.stages] == [False, True, False, True, True]  # a small root
    assert "InputFactorUpdate" in operators(stage(plan, Slot.PRECONDITION))
    assert operators(stage(plan, Slot.COMMIT)) == ["ApplyRows"]
    assert operators(stage(plan, Slot.UNDO)) == ["WriteRows"]
    assert not any("Where" in operators(item) for item in plan.stages)


def test_every_stage_is_a_valid_model(toy: ModuleType) -> None:
    for item in partition(toy.whole_step(renormalize_below=0.9)).stages:
        model = onnx.ModelProto()
        model.CopyFrom(item.model)
        for value in (*model.graph.input, *model.graph.output):
            if not value.type.WhichOneof("value"):  # filled in by whoever loads it
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            value.type.tensor_type.shape.SetInParent()
        onnx.checker.check_model(model)


def test_what_crosses(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    commit = stage(plan, Slot.COMMIT)
    assert set(commit.inputs) == {"emb.weight", "row_ids", "update", "kfac/lr"}
    assert commit.outputs == ("emb.weight/written",)
    assert commit.writes == {"emb.weight/written": "emb.weight"}
    assert stage(plan, Slot.UNDO).writes == {"A/undone": "A"}
    assert "A/before" in stage(plan, Slot.GRADIENTS).outputs
    assert "ids_shape" not in stage(plan, Slot.GRADIENTS).outputs
    produced: set[str] = set()
    given = {*plan.source.inputs}
    for item in plan.stages:
        assert set(item.inputs) <= given | produced, item.name
        produced |= set(item.outputs)


def test_candidates_skip_the_select(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    assert plan.candidates["G"] == "G/new"
    assert plan.candidates["emb.weight"] == "emb.weight/written"
    assert plan.versions["A/undone"] == plan.versions["A/counted"] == plan.versions["A"] == "A"


def test_one_thread_stages_get_sequential_scatters(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    assert reductions(stage(plan, Slot.COMMIT)) == {("ScatterND", "add")}
    assert ("ScatterElements", "add") in reductions(stage(plan, Slot.PRECONDITION))
    safe = partition(toy.whole_step(), sequential=False)
    assert reductions(stage(safe, Slot.COMMIT)) == {("ScatterElements", "add")}
    for item in plan.stages:
        if not item.one_thread:
            assert ("ScatterND", "add") not in reductions(item), item.name


def test_a_branch_becomes_a_stage_with_a_condition(toy: ModuleType) -> None:
    refresh = stage(partition(toy.whole_step()), Slot.REFRESH)
    assert refresh.condition == "refresh"
    assert refresh.outputs == ("root/now", "residual", "G/hat", "damping_g")
    assert refresh.otherwise == {"root/now": "root", "residual": "zero"}
    assert operators(refresh)[-1] == "FactorInverseRoot"


def test_what_only_the_refresh_needs_runs_with_it(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    assert operators(stage(plan, Slot.REFRESH))[:3] == ["FactorDebias", "FactorTrace", "DampingRelative"]
    assert operators(stage(plan, Slot.GRADIENTS)).count("DampingRelative") == 1  # of A, for every step
    watched = partition(toy.whole_step(), watch=["damping_g"])
    assert operators(stage(watched, Slot.REFRESH)) == ["FactorInverseRoot"]
    assert operators(stage(watched, Slot.GRADIENTS)).count("DampingRelative") == 2


@pytest.mark.parametrize("preset", INVARIANT)
def test_steps_without_a_refresh_do_no_work_for_one(preset: str) -> None:
    plan = partition(transform(GRAPHS / "ortart_legcore__twotower.onnx", preset=preset))
    refresh, rest = stage(plan, Slot.REFRESH), [s for s in plan.stages if s.slot != Slot.REFRESH]
    alone = {"FactorDebias", "FactorTrace", "FactorInverseRoot"}
    assert alone <= set(operators(refresh))
    assert not alone.intersection(name for item in rest for name in operators(item))


def test_the_optimizer_of_the_rest_does_not_wait_for_the_counts(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    assert "Momentum" in operators(stage(plan, Slot.GRADIENTS))
    assert "PreconditionRows" in operators(stage(plan, Slot.PRECONDITION))


def test_renormalizing_comes_last_in_a_kept_step(toy: ModuleType) -> None:
    plan = partition(toy.whole_step(renormalize_below=0.9))
    item = stage(plan, Slot.RENORMALIZE)
    assert item.condition == "renormalize"
    assert item.inputs == ("A/counted", "A.scale/new")
    assert item.writes == {"A/renormalized": "A"}
    assert [other.name for other in plan.stages][-3:] == ["commit", "renormalize", "undo"]


def test_plain_steps_have_two_stages(toy: ModuleType) -> None:
    plan = partition(toy.whole_step(kfac=False))
    assert [item.name for item in plan.stages] == ["gradients", "commit"]
    assert "Momentum" in operators(plan.stages[0])


def test_watched_values_are_kept(toy: ModuleType) -> None:
    plan = partition(toy.whole_step(kfac=False), watch=["h", "p"])
    assert {"h", "p"} <= set(plan.stages[0].outputs)
    assert "h" not in partition(toy.whole_step(kfac=False)).stages[0].outputs


def test_the_model_is_not_changed(toy: ModuleType) -> None:
    model = toy.whole_step(with_values=True)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    partition(model)
    extract(model, ["loss"])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_names_of_dimensions_do_not_cross(toy: ModuleType) -> None:
    plan = partition(toy.whole_step())
    for item in plan.stages:
        for value in item.model.graph.input:
            names = [dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param]
            assert not names or value.name in ("ids", "y")


def test_parameters_are_inputs_and_small_constants_are_copied(toy: ModuleType) -> None:
    plan = partition(toy.whole_step(with_values=True))
    assert set(plan.initial) == {"emb.weight", "readout", "kfac/lr", "kfac/rest_lr"}
    gradients = stage(plan, Slot.GRADIENTS)
    assert "emb.weight" in gradients.inputs
    assert {tensor.name for tensor in gradients.model.graph.initializer} >= {"axis0", "two"}
    assert not {tensor.name for tensor in gradients.model.graph.initializer} & set(plan.initial)


# --- small models in text form ---------------------------------------------------------------------


def small(text: str, states: list[State], phases: dict[str, str], **step: Any) -> ir.Model:
    """Read a graph; `phases` gives the phase of the node that makes a value."""
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 18]>\n' + text)
    for node in model.graph:
        for output in node.outputs:
            if output.name in phases:
                node.metadata_props["kfac.phase"] = phases[output.name]
    metadata.write(model, "state", states)
    metadata.write(model, "step", Step("loss", "ok", ("x",), (), **step))
    return model


def in_place(name: str, *aliases: str) -> State:
    return State(
        name, aliases[-1], (4,), "float32", "zeros", "commit", "in-place", aliases[-1], "factor", None,  # type: ignore[arg-type]
        (name, *aliases),
    )  # fmt: skip


HEAD = """g (float[n] x, float[4] W, int64[k, 1] i) => (float loss, bool ok, float[4] W2) {
  loss = ReduceSum <keepdims = 0> (x)
  bad = IsNaN(loss)
  ok = Not(bad)
"""


def test_reads_in_a_writing_stage_run_before_it() -> None:
    text = HEAD + "  old = ReduceMax(W)\n  u = Mul(x, old)\n  W2 = ScatterND(W, i, u)\n}"
    phases = {"old": "commit", "u": "commit", "W2": "commit"}
    plan = partition(small(text, [in_place("W", "W2")], phases))
    assert [item.name for item in plan.stages] == ["gradients", "commit-read", "commit"]
    assert operators(plan.stages[1]) == ["ReduceMax"]
    assert operators(plan.stages[2]) == ["Mul", "ScatterND"]
    assert plan.stages[2].inputs.count("W") == 1


def test_reading_a_table_after_it_is_written_is_an_error() -> None:
    text = HEAD + "  W2 = ScatterND(W, i, x)\n  y = Sub(W2, W)\n}"
    model = small(text, [in_place("W", "W2")], {"W2": "count", "y": "precondition"})
    with pytest.raises(VerifyError, match="reads 'W' after it is overwritten in place"):
        partition(model, watch=["y"])


def test_a_node_before_what_it_reads_is_an_error() -> None:
    text = HEAD + "  W2 = ScatterND(W, i, x)\n  y = Neg(W2)\n}"
    with pytest.raises(
        VerifyError, match="of phase precondition reads a value that is made later, in stage commit"
    ):
        partition(small(text, [in_place("W", "W2")], {"W2": "commit", "y": "precondition"}), watch=["y"])


def test_gradient_nodes_that_need_the_counts_move_behind_them() -> None:
    text = HEAD + "  W2 = ScatterND(W, i, x)\n  y = Neg(W2)\n}"
    plan = partition(small(text, [in_place("W", "W2")], {"W2": "count"}), watch=["y"])
    assert [item.name for item in plan.stages] == ["gradients", "count", "refresh-read"]


def test_dead_nodes_are_left_out() -> None:
    text = HEAD + "  W2 = ScatterND(W, i, x)\n  y = Neg(x)\n}"
    plan = partition(small(text, [in_place("W", "W2")], {"W2": "commit"}))
    assert "Neg" not in [name for item in plan.stages for name in operators(item)]


def test_states_that_share_a_candidate_get_one_each() -> None:
    text = """g (float[n] x, float a, float b) => (float loss, bool ok, float a2, float b2) {
      loss = ReduceSum <keepdims = 0> (x)
      bad = IsNaN(loss)
      ok = Not(bad)
      new = Add(a, loss)
      a2 = Where(ok, new, a)
      b2 = Where(ok, new, b)
    }"""
    states = [
        State(name, f"{name}2", (), "float32", 0.0, "gradients", "double", "new", "counter")  # type: ignore[arg-type]
        for name in ("a", "b")
    ]
    plan = partition(small(text, states, {"a2": "select", "b2": "select"}))
    assert plan.candidates == {"a": "new", "b": "kfac/partition/b/candidate"}
    assert set(plan.stages[0].outputs) == {"loss", "ok", "new", "kfac/partition/b/candidate"}


def test_the_undo_knows_that_the_step_is_skipped() -> None:
    text = HEAD + (
        "  old = Gather(W, i)\n  W1 = ScatterND(W, i, x)\n  now = Gather(W1, i)\n"
        "  v = Where(ok, now, old)\n  W2 = ScatterND(W1, i, v)\n}"
    )
    phases = {"W1": "count", "now": "precondition", "v": "undo", "W2": "undo"}
    plan = partition(small(text, [in_place("W", "W1", "W2")], phases))
    undo = stage(plan, Slot.UNDO)
    assert operators(undo) == ["ScatterND"]
    assert set(undo.inputs) == {"W1", "i", "old"}


IFS = (
    HEAD
    + """  c = Cast <to = 9> (loss)
  y, z = If (c) <
    then_branch = t () => (float[n] p, float q) { p0 = Neg(x)  p = Neg(p0)  q = Neg(loss) },
    else_branch = e () => (float[n] p, float q) { p = Identity(x)  q = Constant <value_float = 3.0> () }
  >
  y2 = If (c) <
    then_branch = t () => (float[n] p) { p0 = Abs(y)  p = Abs(p0) },
    else_branch = e () => (float[n] p) { p = Identity(y) }
  >
  W2 = ScatterND(W, i, y2)
}"""
)


def test_branches_of_one_condition_are_merged() -> None:
    model = small(IFS, [in_place("W", "W2")], {"y": "refresh", "y2": "refresh", "W2": "commit"})
    plan = partition(model, watch=["z"])
    assert [item.name for item in plan.stages] == ["gradients", "refresh", "commit"]
    refresh = plan.stages[1]
    assert operators(refresh) == ["Neg", "Neg", "Neg", "Abs", "Abs"]
    assert set(refresh.outputs) == {"y2", "z"}
    assert refresh.otherwise == {"y2": "y"} or refresh.otherwise == {"y2": "x"}
    assert refresh.fixed["z"] == 3.0


def test_an_else_branch_must_not_compute() -> None:
    text = IFS.replace("q = Constant <value_float = 3.0> ()", "q = Abs(loss)")
    model = small(text, [in_place("W", "W2")], {"y": "refresh", "y2": "refresh", "W2": "commit"})
    with pytest.raises(VerifyError, match="the else-branch of 'z' computes something"):
        partition(model, watch=["z"])


def test_a_model_without_a_step(toy: ModuleType) -> None:
    model = toy.whole_step()
    del model.metadata_props["kfac.step"]
    with pytest.raises(VerifyError, match=r"^the model has no kfac\.step entry$"):
        partition(model)


# --- extract --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "plan"])
def test_extract_keeps_the_ancestors_only(toy: ModuleType, source: str) -> None:
    model = toy.whole_step(with_values=True, dropout=True)
    taken = extract(model if source == "model" else partition(model), ["p"])
    assert [node.op_type for node in taken.graph.node] == ["Add", "Gather", "Dropout", "Mul", "ReduceSum"]
    assert {value.name for value in taken.graph.input} == {"ids", "emb.weight", "readout"}
    assert [value.name for value in taken.graph.output] == ["p"]
    assert not taken.functions


def test_extract_turns_dropout_off_for_inference(toy: ModuleType) -> None:
    model = toy.whole_step(dropout=True)

    def inputs(*, inference: bool) -> list[str]:
        taken = extract(model, ["h"], inference=inference)
        return next(list(node.input) for node in taken.graph.node if node.op_type == "Dropout")

    assert inputs(inference=True) == ["h0"]
    assert inputs(inference=False) == ["h0", "half", "true"]
    assert {t.name for t in extract(model, ["h"]).graph.initializer} == {"zero_i"}


def test_extract_of_an_unknown_value(toy: ModuleType) -> None:
    with pytest.raises(KeyError, match="nothing"):
        extract(toy.whole_step(), ["nothing"])
