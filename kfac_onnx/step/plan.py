"""Split a whole training step into the sub-models that a host runs one after the other.

The whole graph is functional: each state comes in under one name and leaves under another, and
`Where(ok, new, old)` nodes keep a skipped step out of the state. A host that decides itself whether to
keep a step drops those nodes, and a host that binds one buffer as a state's input and output must not let
a session read a table that the same session writes (docs/architecture.md). Hence these stages:

| stage        | runs                         | what it may do                                        |
|--------------|------------------------------|-------------------------------------------------------|
| forward      | always, if the loss is outside | predictions; the host then feeds their gradients    |
| gradients    | always                       | reads tables; all that needs nothing of what follows  |
| count-read   | always                       | reads that must come before the counts are written    |
| count        | always, one thread           | writes counts, if a refresh reads them                |
| refresh-read | always                       | what the refresh needs from the counts                |
| refresh      | if its condition holds       | then-branches of the phase's `If` nodes, merged, and  |
|              |                              | what only they need; small roots in one thread        |
| precondition | always                       | writes counts; what needs them or roots: updates, the |
|              |                              | finite flag                                           |
| commit       | if the step is kept          | one thread; writes tables (`commit-read` before it)   |
| renormalize  | kept, if its condition holds | then-branches, merged; writes counts                  |
| undo         | if the step is skipped       | one thread; restores the counts (`undo-read` before)  |

Empty stages do not exist, and gradients and precondition become one where nothing lies between. Between two
refreshes a host may run both in one session: see `partition_short_cut`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx

from kfac_onnx import metadata
from kfac_onnx.errors import VerifyError
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.metadata import Parameter, Phase, State, Step
from kfac_onnx.step.branches import Branch, merge_branches
from kfac_onnx.step.protos import (
    FROZEN_BYTES,
    Item,
    Source,
    build_model,
    free_names,
    read_source,
    with_functions,
)
from kfac_onnx.step.short_cut import ShortCut, foresee, short_cut
from kfac_onnx.step.slots import (
    Slot,
    assign_slots,
    check_hazards,
    count_late,
    drop_selects,
    first_half,
    postponed,
    prune,
)
from kfac_onnx.step.stage import Stage, stage_of
from kfac_onnx.step.unneeded import spare

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_ir as ir

__all__ = ["Plan", "Slot", "Stage", "extract", "partition"]

ALONE: Final = 128 * 128
"""A root of so many entries takes one thread no longer than two (measured at D = 64 and 128)."""


@dataclass(frozen=True)
class Plan:
    """A training step in stages.

    `candidates` maps each `State.input` to the value that is the state after a kept step, `versions` each
    value name that is an in-place state's buffer to that `State.input`, `frozen` holds large initializers
    that stages take as inputs, `initial` the parameters' values that the model brings along, and `source` is
    the whole model without those. `short`, where there is one, may take the place of the stages up to
    precondition.
    """

    stages: tuple[Stage, ...]
    step: Step
    states: tuple[State, ...]
    candidates: Mapping[str, str]
    versions: Mapping[str, str]
    frozen: Mapping[str, ir.TensorProtocol]
    initial: Mapping[str, ir.TensorProtocol]
    source: Source
    short: ShortCut | None = None


def _states(model: ir.Model, source: Source) -> tuple[State, ...]:
    """Return the model's states, and trained parameters that no step changes as states that stay.

    Those are the parameters of a drop-in graph: whatever optimizer comes after it changes them.
    """
    states = metadata.read_list(model, "state", State)
    known = {state.input for state in states}
    present = {*source.inputs, *source.initializers}
    for item in metadata.read_list(model, "parameters", Parameter):
        if item.name not in known and item.name in present:
            kind = source.types[item.name].type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            shape = tuple(dim.dim_value for dim in kind.shape.dim)
            states.append(
                State(
                    input=item.name,
                    output=item.name,
                    shape=shape,
                    dtype=dtype,
                    initial="parameter",
                    phase=Phase.COMMIT,
                    update="in-place",
                    candidate=item.name,
                    role="parameter",
                    parameter=item.name,
                )
            )
    return tuple(states)


@blames_the_graph
def partition(model: ir.Model, *, sequential: bool = True, watch: Iterable[str] = ()) -> Plan:
    """Split a whole-step model into the stages of this module's table.

    Args:
        model: a model with `kfac.state` and `kfac.step`; it is not changed.
        sequential: exchange the `ai.kfac` bodies of one-thread stages for the sequential variant.
        watch: further values that a host wants to read after the stage that makes them.

    Raises:
        VerifyError: a pass left phases that cannot be run in order.

    """
    step = metadata.read(model, "step", Step)
    if step is None:
        message = "the model has no kfac.step entry"
        raise VerifyError(message)
    source = read_source(model)
    states = _states(model, source)
    items, stands_for = drop_selects(source.items, step.ok)
    candidates = {state.input: stands_for.get(state.candidate, state.candidate) for state in states}
    versions: dict[str, str] = {}
    for state in states:
        if state.update == "in-place":
            names = (state.input, *state.aliases, candidates[state.input])
            versions.update(dict.fromkeys(names, state.input))
    roots = {*step.ends, step.ok, *candidates.values(), *versions, *watch}
    roots.update(name for check in step.root_checks for name in (check.root, check.residual))
    roots = {stands_for.get(name, name) for name in roots}
    checked = {name for check in step.root_checks for name in (check.factor, check.damping)}
    checked = {stands_for.get(name, name) for name in checked}
    items = prune(spare(source, items, roots | checked | versions.keys()), roots | checked)
    items, candidates = _own_candidates(items, states, candidates)
    roots.update(candidates.values())
    source, ahead, due = foresee(source, items, candidates)
    items += ahead
    roots.update(due)
    slots = assign_slots(items, versions)
    check_hazards(items, slots, versions)
    slots = count_late(items, slots, versions)
    if not any(Slot.GRADIENTS < slot < Slot.PRECONDITION for slot in slots):
        slots = [Slot.GRADIENTS if slot == Slot.PRECONDITION else slot for slot in slots]
    if step.predictions:
        slots = first_half(items, slots, step.predictions)
    later = postponed(items, slots, versions, roots)
    roots |= checked
    for index in later:
        slots[index] = Slot.REFRESH
    as_inputs = {*source.inputs, *(state.input for state in states)}
    one_thread = _one_thread_source(source) if sequential else source
    stages: list[Stage] = []
    for slot in Slot:
        members = [item for item, own in zip(items, slots, strict=True) if own == slot]
        outside = {name for item, own in zip(items, slots, strict=True) if own != slot for name in item.reads}
        lone = slot in (Slot.COUNT, Slot.COMMIT, Slot.UNDO)
        if members and slot in (Slot.RENORMALIZE, Slot.REFRESH):
            branches = merge_branches([item for item in members if item.node.op_type == "If"])
            for branch in branches:
                ahead = [items[index] for index, condition in later.items() if condition == branch.condition]
                branch.precede(ahead[::-1])
                stages.append(_branch_stage(source, branch, slot, outside | roots, as_inputs, versions))
        elif members:
            makes = [name for item in members for name in item.makes]
            outputs = [name for name in makes if name in outside or name in roots]
            own = one_thread if lone else source
            nodes = [item.node for item in members]
            built = build_model(own, nodes, outputs, name=slot.name.lower(), as_inputs=as_inputs)
            stages.append(stage_of(slot, built, versions, lone=lone))
    short = short_cut(source, items, slots, stages, versions, as_inputs, due)
    used = {name for item in source.items for name in item.reads} - as_inputs
    frozen = {name: t for name, t in source.initializers.items() if name in used and t.nbytes > FROZEN_BYTES}
    initial = {name: tensor for name, tensor in source.initializers.items() if name in as_inputs}
    rest = {name: tensor for name, tensor in source.initializers.items() if name not in initial}
    lean = dataclasses.replace(source, initializers=rest)
    return Plan(tuple(stages), step, states, candidates, versions, frozen, initial, lean, short)


def _one_thread_source(source: Source) -> Source:
    if not any(domain == "ai.kfac" for domain, _ in source.functions):
        return source
    from kfac_onnx import dialect

    return with_functions(source, dialect.functions("sequential"))


def _own_candidates(
    items: list[Item], states: Sequence[State], candidates: dict[str, str]
) -> tuple[list[Item], dict[str, str]]:
    """Give each double state a candidate of its own: a copy where two share one or where it is an input."""
    made = {name: item for item in items for name in item.makes}
    taken: set[str] = set()
    owned = dict(candidates)
    for state in states:
        if state.update == "in-place" or candidates[state.input] == state.input:
            continue
        name = candidates[state.input]
        if name in taken or name not in made:
            copy = f"kfac/partition/{state.input}/candidate"
            node = onnx.helper.make_node("Identity", [name], [copy], name=copy)
            phase = Phase.PRECONDITION.value if name in made else Phase.GRADIENTS.value
            items.append(Item(node, (name,), (copy,), phase))
            name = copy
        taken.add(name)
        owned[state.input] = name
    return items, owned


def _branch_stage(
    source: Source,
    branch: Branch,
    slot: Slot,
    wanted: set[str],
    as_inputs: set[str],
    versions: Mapping[str, str],
) -> Stage:
    outputs = [name for name in branch.outputs if name in wanted]
    built = build_model(
        source, branch.nodes, outputs, name=slot.name.lower(), as_inputs=as_inputs, extra=branch.initializers
    )
    stage = stage_of(slot, built, versions, lone=False)
    return Stage(
        slot=slot,
        model=built,
        inputs=stage.inputs,
        outputs=stage.outputs,
        one_thread=slot == Slot.REFRESH and _is_small(source, outputs),
        condition=branch.condition,
        otherwise={name: other for name, other in branch.otherwise.items() if name in outputs},
        fixed={name: array for name, array in branch.fixed.items() if name in outputs},
        writes=stage.writes,
    )


def _is_small(source: Source, names: Sequence[str]) -> bool:
    """Return whether no value is larger than what a second thread is worth waking for (ALONE entries)."""
    for name in names:
        known = source.types.get(name)
        dims = [] if known is None else [dim.dim_value for dim in known.type.tensor_type.shape.dim]
        if not all(dims) or math.prod(dims) > ALONE:
            return False
    return True


def extract(model: ir.Model | Plan, outputs: Sequence[str], *, inference: bool = True) -> onnx.ModelProto:
    """Return the part of a model that leads to these values, with parameters and batch as inputs.

    With `inference`, `Dropout` passes its input through. Parameters have no values in the result: they
    are inputs, whoever runs it binds them.

    Raises:
        KeyError: no node and no input makes one of the values.

    """
    source = model.source if isinstance(model, Plan) else read_source(model)
    states = model.states if isinstance(model, Plan) else _states(model, source)
    as_inputs = {*source.inputs, *(state.input for state in states)}
    known = {name for item in source.items for name in item.makes} | as_inputs | {*source.initializers}
    for name in outputs:
        if name not in known:
            raise KeyError(name)
    items: list[Item] = []
    for item in prune(source.items, outputs):
        node = item.node
        if inference and node.op_type == "Dropout" and node.domain in ("", "ai.onnx"):
            node = onnx.NodeProto()
            node.CopyFrom(item.node)
            del node.input[1:]
        items.append(Item(node, free_names(node), item.makes, item.phase))
    parts = [item.node for item in prune(items, outputs)]
    return build_model(source, parts, outputs, name="forward", as_inputs=as_inputs)
