"""Split a whole training step into the sub-models that a host runs one after the other.

The whole graph is functional: each state comes in under one name and leaves under another, and
`Where(ok, new, old)` nodes keep a skipped step out of the state. A host that decides itself whether to
keep a step drops those nodes, and a host that binds one buffer as a state's input and output must not let
a session read a table that the same session writes (DESIGN section 8). Hence these stages:

| stage        | runs                         | what it may do                                        |
|--------------|------------------------------|-------------------------------------------------------|
| gradients    | always                       | reads tables                                          |
| count-read   | always                       | reads that must come before the counts are written    |
| count        | always, one thread           | writes counts                                         |
| refresh-read | always                       | what the refresh needs from the counts                |
| refresh      | if its condition holds       | then-branches of the phase's `If` nodes, merged       |
| precondition | always                       | updates, the finite flag                              |
| commit       | if the step is kept          | one thread; writes tables (`commit-read` before it)   |
| renormalize  | kept, if its condition holds | then-branches, merged; writes counts                  |
| undo         | if the step is skipped       | one thread; restores the counts (`undo-read` before)  |

Empty stages do not exist, and gradients and precondition become one where nothing lies between.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import onnx

from kfac_onnx import metadata
from kfac_onnx.errors import VerifyError
from kfac_onnx.metadata import Parameter, Phase, State, Step
from kfac_onnx.passes.partition_branches import Branch, merge_branches
from kfac_onnx.passes.partition_graph import (
    FROZEN_BYTES,
    Item,
    Source,
    build_model,
    free_names,
    read_source,
    rename,
    with_functions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir

__all__ = ["Plan", "Slot", "Stage", "extract", "partition"]


class Slot(enum.IntEnum):
    """The stages in the order in which they run."""

    GRADIENTS = 0
    COUNT_READ = 1
    COUNT = 2
    REFRESH_READ = 3
    REFRESH = 4
    PRECONDITION = 5
    COMMIT_READ = 6
    COMMIT = 7
    RENORMALIZE = 8
    UNDO_READ = 9
    UNDO = 10


_PHASE_SLOT: Final = {
    Phase.GRADIENTS: Slot.GRADIENTS,
    Phase.RENORMALIZE: Slot.GRADIENTS,
    Phase.COUNT: Slot.COUNT,
    Phase.REFRESH: Slot.GRADIENTS,
    Phase.PRECONDITION: Slot.PRECONDITION,
    Phase.COMMIT: Slot.COMMIT,
    Phase.UNDO: Slot.UNDO,
}
_BRANCH_SLOT: Final = {Phase.RENORMALIZE: Slot.RENORMALIZE, Phase.REFRESH: Slot.REFRESH}
_PLAIN: Final = (Slot.GRADIENTS, Slot.COUNT_READ, Slot.REFRESH_READ, Slot.PRECONDITION)
_BEFORE: Final = {Slot.COUNT: Slot.COUNT_READ, Slot.COMMIT: Slot.COMMIT_READ, Slot.UNDO: Slot.UNDO_READ}


@dataclass(frozen=True)
class Stage:
    """One sub-model.

    `condition` names the bool scalar that must hold for the stage to run; where it does not, each output is
    the value named in `otherwise` or the array in `fixed`. `writes` maps an output to the `State.input` of
    the in-place state whose buffer it is.
    """

    slot: Slot
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    one_thread: bool
    condition: str | None = None
    otherwise: Mapping[str, str] = field(default_factory=dict[str, str])
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict[str, "np.ndarray"])
    writes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        """The stage's name for people, such as `count-read`."""
        return self.slot.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Plan:
    """A training step in stages.

    `candidates` maps each `State.input` to the value that is the state after a kept step, `versions` each
    value name that is an in-place state's buffer to that `State.input`, `frozen` holds large initializers
    that stages take as inputs, `initial` the parameters' values that the model brings along, and `source` is
    the whole model without those.
    """

    stages: tuple[Stage, ...]
    step: Step
    states: tuple[State, ...]
    candidates: Mapping[str, str]
    versions: Mapping[str, str]
    frozen: Mapping[str, ir.TensorProtocol]
    initial: Mapping[str, ir.TensorProtocol]
    source: Source


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


def _drop_selects(items: Iterable[Item], ok: str) -> tuple[list[Item], dict[str, str]]:
    """Remove the nodes that look at `ok`, which the host decides; return the rest and what outputs stood for.

    A `select` node stands for its new value. In the undo phase `ok` is false, so a `Where(ok, a, b)` there
    stands for b: an undo must also be possible when the step stopped before `a` was made.
    """
    kept: list[Item] = []
    stands_for: dict[str, str] = {}
    for item in items:
        if item.phase == Phase.UNDO and item.node.op_type == "Where" and item.node.input[0] == ok:
            old = item.node.input[2]
            stands_for[item.makes[0]] = stands_for.get(old, old)
            continue
        if item.phase == Phase.SELECT:
            if item.node.op_type not in ("Where", "Identity") or len(item.makes) != 1:
                message = f"node '{item.node.name}' of phase select is a {item.node.op_type}, not a Where"
                raise VerifyError(message)
            new = item.node.input[1 if item.node.op_type == "Where" else 0]
            stands_for[item.makes[0]] = stands_for.get(new, new)
            continue
        if any(name in stands_for for name in item.reads):
            node = onnx.NodeProto()
            node.CopyFrom(item.node)
            rename(node, stands_for)
            item = Item(node, free_names(node), item.makes, item.phase)
        kept.append(item)
    return kept, stands_for


def _prune(items: Sequence[Item], roots: Iterable[str]) -> list[Item]:
    """Keep the nodes that some root needs, in order."""
    needed = set(roots)
    kept: list[Item] = []
    for item in reversed(items):
        if needed.intersection(item.makes):
            kept.append(item)
            needed.update(item.reads)
    return kept[::-1]


def _is_branch(item: Item) -> bool:
    return item.node.op_type == "If" and item.phase in _BRANCH_SLOT


def _writes_of(item: Item, versions: Mapping[str, str]) -> set[str]:
    """Return the in-place states that a node writes: it reads one version and makes the next."""
    return {versions[name] for name in item.makes if name in versions}


def _assign(items: Sequence[Item], versions: Mapping[str, str]) -> list[Slot]:
    """Give each node the earliest stage that its phase and inputs allow, with reads before writes."""
    slots: list[Slot] = []
    made: dict[str, int] = {}
    for index, item in enumerate(items):
        phase = Phase(item.phase)
        slot = _BRANCH_SLOT[phase] if _is_branch(item) else _PHASE_SLOT[phase]
        before = (slots[made[name]] for name in item.reads if name in made)
        if slot < Slot.UNDO_READ:  # a kept step passes the undone version through untouched
            before = (
                slots[made[name]]
                for name in item.reads
                if name in made and not (name in versions and slots[made[name]] >= Slot.UNDO_READ)
            )
        latest = max(before, default=Slot.GRADIENTS)
        if latest > slot:
            later = [plain for plain in _PLAIN if plain >= latest]
            if _is_branch(item) or slot not in _PLAIN or not later:
                message = (
                    f"node '{item.node.name}' ({item.node.op_type}) of phase {phase.value} reads a value"
                    f" that is made later, in stage {latest.name.lower()}"
                )
                raise VerifyError(message)
            slot = later[0]
        slots.append(slot)
        made.update(dict.fromkeys(item.makes, index))
    _split_reads(items, slots, made, versions)
    _sink(items, slots, versions)
    return slots


def _split_reads(
    items: Sequence[Item], slots: list[Slot], made: Mapping[str, int], versions: Mapping[str, str]
) -> None:
    """Move what reads a state, in a stage that writes that state, into a stage of its own before it."""
    for stage, before in _BEFORE.items():
        members = [index for index, slot in enumerate(slots) if slot == stage]
        written = {state for index in members for state in _writes_of(items[index], versions)}
        for index in reversed(members):
            item = items[index]
            seen = {versions[name] for name in item.reads if name in versions}
            if (seen & written) - _writes_of(item, versions) or slots[index] == before:
                slots[index] = before
                for name in item.reads:
                    if name in made and slots[made[name]] == stage:
                        if _writes_of(items[made[name]], versions):
                            message = f"node '{item.node.name}' reads '{name}' in the stage that writes it"
                            raise VerifyError(message)
                        slots[made[name]] = before


def _sink(items: Sequence[Item], slots: list[Slot], versions: Mapping[str, str]) -> None:
    """Move nodes of the two in-between stages down to precondition where nobody before needs them."""
    first_use: dict[str, Slot] = {}
    for index in range(len(items) - 1, -1, -1):
        item = items[index]
        if slots[index] in (Slot.COUNT_READ, Slot.REFRESH_READ):
            users = min(
                (first_use.get(name, Slot.PRECONDITION) for name in item.makes), default=Slot.PRECONDITION
            )
            if users >= Slot.PRECONDITION and not any(name in versions for name in item.reads):
                slots[index] = Slot.PRECONDITION
        for name in item.reads:
            first_use[name] = min(first_use.get(name, slots[index]), slots[index])


def _check_hazards(items: Sequence[Item], slots: Sequence[Slot], versions: Mapping[str, str]) -> None:
    """Raise if a version of an in-place state is read after, or in the stage where, it is overwritten."""
    overwritten: dict[str, tuple[Slot, int]] = {}
    for index, item in enumerate(items):
        written = _writes_of(item, versions)
        for name in item.reads:
            if versions.get(name) in written:
                overwritten[name] = (slots[index], index)
    for index, item in enumerate(items):
        for name in item.reads:
            slot, writer = overwritten.get(name, (None, -1))
            if slot is None or writer == index:
                continue
            exclusive = slot in (Slot.COMMIT, Slot.RENORMALIZE) and slots[index] >= Slot.UNDO_READ
            if slots[index] >= slot and not exclusive:
                message = f"node '{item.node.name}' reads '{name}' after it is overwritten in place"
                raise VerifyError(message)


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
    items, stands_for = _drop_selects(source.items, step.ok)
    candidates = {state.input: stands_for.get(state.candidate, state.candidate) for state in states}
    versions: dict[str, str] = {}
    for state in states:
        if state.update == "in-place":
            names = (state.input, *state.aliases, candidates[state.input])
            versions.update(dict.fromkeys(names, state.input))
    roots = {step.loss, step.ok, *candidates.values(), *versions, *watch}
    for check in step.root_checks:
        roots.update((check.root, check.factor, check.damping, check.residual))
    roots = {stands_for.get(name, name) for name in roots}
    items = _prune(items, roots)
    items, candidates = _own_candidates(items, states, candidates)
    roots.update(candidates.values())
    slots = _assign(items, versions)
    _check_hazards(items, slots, versions)
    if not any(Slot.GRADIENTS < slot < Slot.PRECONDITION for slot in slots):
        slots = [Slot.GRADIENTS if slot == Slot.PRECONDITION else slot for slot in slots]
    as_inputs = {*source.inputs, *(state.input for state in states)}
    one_thread = _one_thread_source(source) if sequential else source
    stages: list[Stage] = []
    for slot in Slot:
        members = [item for item, own in zip(items, slots, strict=True) if own == slot]
        outside = {name for item, own in zip(items, slots, strict=True) if own != slot for name in item.reads}
        lone = slot in (Slot.COUNT, Slot.COMMIT, Slot.UNDO)
        if members and slot in (Slot.RENORMALIZE, Slot.REFRESH):
            stages.extend(
                _branch_stage(source, branch, slot, outside | roots, as_inputs, versions)
                for branch in merge_branches(members)
            )
        elif members:
            makes = [name for item in members for name in item.makes]
            outputs = [name for name in makes if name in outside or name in roots]
            own = one_thread if lone else source
            nodes = [item.node for item in members]
            built = build_model(own, nodes, outputs, name=slot.name.lower(), as_inputs=as_inputs)
            stages.append(_stage(slot, built, versions, lone=lone))
    used = {name for item in source.items for name in item.reads} - as_inputs
    frozen = {name: t for name, t in source.initializers.items() if name in used and t.nbytes > FROZEN_BYTES}
    initial = {name: tensor for name, tensor in source.initializers.items() if name in as_inputs}
    rest = {name: tensor for name, tensor in source.initializers.items() if name not in initial}
    lean = dataclasses.replace(source, initializers=rest)
    return Plan(tuple(stages), step, states, candidates, versions, frozen, initial, lean)


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


def _stage(slot: Slot, model: onnx.ModelProto, versions: Mapping[str, str], *, lone: bool) -> Stage:
    outputs = tuple(value.name for value in model.graph.output)
    return Stage(
        slot=slot,
        model=model,
        inputs=tuple(value.name for value in model.graph.input),
        outputs=outputs,
        one_thread=lone,
        writes={name: versions[name] for name in outputs if name in versions},
    )


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
    stage = _stage(slot, built, versions, lone=False)
    return Stage(
        slot=slot,
        model=built,
        inputs=stage.inputs,
        outputs=stage.outputs,
        one_thread=False,
        condition=branch.condition,
        otherwise={name: other for name, other in branch.otherwise.items() if name in outputs},
        fixed={name: array for name, array in branch.fixed.items() if name in outputs},
        writes=stage.writes,
    )


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
    for item in _prune(source.items, outputs):
        node = item.node
        if inference and node.op_type == "Dropout" and node.domain in ("", "ai.onnx"):
            node = onnx.NodeProto()
            node.CopyFrom(item.node)
            del node.input[1:]
        items.append(Item(node, free_names(node), item.makes, item.phase))
    parts = [item.node for item in _prune(items, outputs)]
    return build_model(source, parts, outputs, name="forward", as_inputs=as_inputs)
