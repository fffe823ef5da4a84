"""Between two refreshes, gradients and precondition in one session instead of two.

A second session costs what its start and the host's work around it cost, whatever is computed. Where nothing
is due between the two, both can run at once, on these terms:

- what is due is known before the step: it depends on counters alone, so that the step before can compute it,
  from the counters that it leaves (`foresee`);
- counts are written in the session that also reads what they were. So everything that reads the old counts
  must come before the write by the data: ONNX Runtime then cannot order them otherwise;
- what they were is among the outputs, so that a host can take the write back.

Every value that crosses from stage to stage stays an output, so that ONNX Runtime fuses nothing across and
the numbers are those of the long way, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import onnx
from onnx import numpy_helper

from kfac_onnx.metadata import Phase
from kfac_onnx.step.protos import Item, build_model, free_names, rename
from kfac_onnx.step.slots import Slot, prune
from kfac_onnx.step.stage import Stage, stage_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kfac_onnx.step.protos import Source

__all__ = ["Counted", "ShortCut", "foresee", "short_cut"]

MOST_NODES: Final = 4_000
"""In a larger graph a session's start is nothing beside its work, and opening one more takes long."""


@dataclass(frozen=True)
class Counted:
    """Counts that the whole step writes in place: their `State.input`, the rows, and what was there.

    `ids` int64[N] and `before` float32[N] are outputs of the stage.
    """

    state: str
    ids: str
    before: str


@dataclass(frozen=True)
class ShortCut:
    """`whole` may run instead of the stages up to precondition where nothing is due.

    `due` are the outputs, bool[], by which a step that is kept says what the next one has to do.
    """

    whole: Stage
    due: tuple[str, ...]
    counted: tuple[Counted, ...]


def foresee(
    source: Source, items: Sequence[Item], candidates: Mapping[str, str]
) -> tuple[Source, list[Item], tuple[str, ...]]:
    """Return nodes that compute, from the states after a step, what will be due in the next one.

    The names of these flags come last, in the order of the conditions; the source has their types. There are
    none where no refresh has a condition, or where one depends on more than the scalars that a step keeps.
    """
    conditions = dict.fromkeys(
        item.node.input[0]
        for item in items
        if item.node.op_type == "If" and item.phase == Phase.REFRESH and item.node.input[0]
    )
    needed = prune(items, conditions)
    made = {name for item in needed for name in item.makes}
    leaves = {name for item in needed for name in item.reads} - made
    makers = {name for item in items for name in item.makes}
    names = {name: f"kfac/next/{name}" for name in made}
    for name in leaves:
        if name in candidates and candidates[name] in makers and _is_scalar(source, name):
            names[name] = candidates[name]
        elif name not in source.initializers or name in source.inputs:
            return source, [], ()
    if len(items) > MOST_NODES or not made.issuperset(conditions):
        return source, [], ()
    added: list[Item] = []
    for item in needed:
        node = onnx.NodeProto()
        node.CopyFrom(item.node)
        node.name = f"kfac/next/{node.name}"
        rename(node, names)
        added.append(Item(node, free_names(node), tuple(names[name] for name in item.makes), item.phase))
    types = dict(source.types)
    for name in made & types.keys():
        types[names[name]] = onnx.ValueInfoProto()
        types[names[name]].CopyFrom(types[name])
        types[names[name]].name = names[name]
    return replace(source, types=types), added, tuple(names[name] for name in conditions)


def _is_scalar(source: Source, name: str) -> bool:
    known = source.types.get(name)
    kind = None if known is None else known.type.tensor_type
    return kind is not None and kind.HasField("shape") and not kind.shape.dim


def short_cut(
    source: Source,
    items: Sequence[Item],
    slots: Sequence[Slot],
    stages: Sequence[Stage],
    versions: Mapping[str, str],
    as_inputs: Collection[str],
    due: tuple[str, ...],
) -> ShortCut | None:
    """Return the short cut through these stages, or None where its terms do not hold."""
    early = [stage for stage in stages if stage.slot <= Slot.PRECONDITION]
    kinds = [stage.slot for stage in early if stage.condition is None]
    refreshes = [stage for stage in early if stage.condition is not None]
    if kinds != [Slot.GRADIENTS, Slot.PRECONDITION] or not refreshes or not due:
        return None
    members = [item for item, slot in zip(items, slots, strict=True) if slot in kinds]
    conditions = {stage.condition for stage in refreshes}
    outputs = [
        name for stage in early if stage.condition is None for name in stage.outputs if name not in conditions
    ]
    counted = _counted(items, slots, members, outputs, versions)
    if counted is None:
        return None
    names = {name: other for stage in refreshes for name, other in stage.otherwise.items()}
    fixed = {name: array for stage in refreshes for name, array in stage.fixed.items()}
    nodes: list[onnx.NodeProto] = []
    for item in prune(members, outputs):
        node = item.node
        if names.keys() & set(item.reads):
            node = onnx.NodeProto()
            node.CopyFrom(item.node)
            rename(node, names)
        nodes.append(node)
    extra = [numpy_helper.from_array(array, name) for name, array in fixed.items()]
    model = build_model(source, nodes, outputs, name="whole", as_inputs=as_inputs, extra=extra)
    return ShortCut(stage_of(Slot.WHOLE, model, versions, lone=False), due, counted)


def _counted(
    items: Sequence[Item],
    slots: Sequence[Slot],
    members: Sequence[Item],
    outputs: Collection[str],
    versions: Mapping[str, str],
) -> tuple[Counted, ...] | None:
    """Return what is written in place; None where it could not be taken back, or be read too late."""
    makers = {name: item for item in members for name in item.makes}
    undo = {
        versions[item.makes[0]]: item
        for item, slot in zip(items, slots, strict=True)
        if slot == Slot.UNDO and item.makes[0] in versions
    }
    found: list[Counted] = []
    for writer in members:
        for name in writer.makes:
            state = versions.get(name)
            if state is None:
                continue
            taken_back = undo.get(state)
            if taken_back is None or taken_back.node.op_type != "WriteRows":
                return None
            _, ids, before = taken_back.node.input
            old = {read for read in writer.reads if versions.get(read) == state}
            ahead = _ancestors(writer, makers)
            readers = [item for item in members if item is not writer and old.intersection(item.reads)]
            if not {ids, before} <= set(outputs) or any(id(item) not in ahead for item in readers):
                return None
            found.append(Counted(state, ids, before))
    return tuple(found)


def _ancestors(item: Item, makers: Mapping[str, Item]) -> set[int]:
    """Return the identities of the nodes that a node's inputs depend on."""
    found: set[int] = set()
    pending = [item]
    while pending:
        for name in pending.pop().reads:
            maker = makers.get(name)
            if maker is not None and id(maker) not in found:
                found.add(id(maker))
                pending.append(maker)
    return found
