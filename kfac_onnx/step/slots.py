"""Which stage each node of a training step runs in.

A node's phase says when it may run at the earliest; what it reads, and the rule that no stage reads a state
that it writes, say the rest. See `partition` for the table of stages.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import onnx

from kfac_onnx.errors import VerifyError
from kfac_onnx.metadata import Phase
from kfac_onnx.step.protos import Item, free_names, rename

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "Slot",
    "assign_slots",
    "check_hazards",
    "count_late",
    "drop_selects",
    "first_half",
    "postponed",
    "prune",
]


class Slot(enum.IntEnum):
    """The stages in the order in which they run; the last one stands in for others."""

    FORWARD = 0
    GRADIENTS = 1
    COUNT_READ = 2
    COUNT = 3
    REFRESH_READ = 4
    REFRESH = 5
    PRECONDITION = 6
    COMMIT_READ = 7
    COMMIT = 8
    RENORMALIZE = 9
    UNDO_READ = 10
    UNDO = 11
    WHOLE = 12


_PHASE_SLOT: Final = {
    Phase.GRADIENTS: Slot.GRADIENTS,
    Phase.RENORMALIZE: Slot.GRADIENTS,
    Phase.COUNT: Slot.COUNT,
    Phase.REFRESH: Slot.GRADIENTS,
    Phase.PRECONDITION: Slot.GRADIENTS,  # or PRECONDITION, where it reads what came between
    Phase.COMMIT: Slot.COMMIT,
    Phase.UNDO: Slot.UNDO,
}
_BRANCH_SLOT: Final = {Phase.RENORMALIZE: Slot.RENORMALIZE, Phase.REFRESH: Slot.REFRESH}
_PLAIN: Final = (Slot.GRADIENTS, Slot.COUNT_READ, Slot.REFRESH_READ, Slot.PRECONDITION)
_BEFORE: Final = {Slot.COUNT: Slot.COUNT_READ, Slot.COMMIT: Slot.COMMIT_READ, Slot.UNDO: Slot.UNDO_READ}


def drop_selects(items: Iterable[Item], ok: str) -> tuple[list[Item], dict[str, str]]:
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


def prune(items: Sequence[Item], roots: Iterable[str]) -> list[Item]:
    """Keep the nodes that some root needs, in order."""
    needed = set(roots)
    kept: list[Item] = []
    for item in reversed(items):
        if needed.intersection(item.makes):
            kept.append(item)
            needed.update(item.reads)
    return kept[::-1]


def first_half(items: Sequence[Item], slots: Sequence[Slot], predictions: Iterable[str]) -> list[Slot]:
    """Move what the predictions need from the gradients into a stage of its own before them."""
    needed = set(predictions)
    moved = list(slots)
    for index in range(len(items) - 1, -1, -1):
        if needed.intersection(items[index].makes):
            moved[index] = Slot.FORWARD
            needed.update(items[index].reads)
    return moved


def postponed(
    items: Sequence[Item], slots: Sequence[Slot], versions: Mapping[str, str], wanted: Iterable[str]
) -> dict[int, str]:
    """Return the nodes of the gradients that only one condition's refresh needs, by index: that condition.

    They can run with the refresh; what reads an in-place state cannot. `wanted` are the values that must be
    there in every step.
    """
    readers: dict[str, set[str]] = {}
    always = ""
    for name in wanted:
        readers.setdefault(name, set()).add(always)
    found: dict[int, str] = {}
    for index in range(len(items) - 1, -1, -1):
        item, slot = items[index], slots[index]
        seen = {reader for name in item.makes for reader in readers.get(name, set())}
        reader = always
        if slot == Slot.GRADIENTS and len(seen) == 1 and not any(name in versions for name in item.reads):
            reader = next(iter(seen))
            if reader != always:
                found[index] = reader
        elif slot == Slot.REFRESH and _is_branch(item):
            condition = item.node.input[0]
            readers.setdefault(condition, set()).add(always)
            other = next(part.g for part in item.node.attribute if part.name == "else_branch")
            for name in (name for node in other.node for name in free_names(node)):
                readers.setdefault(name, set()).add(always)
            reader = condition
        for name in item.reads:
            readers.setdefault(name, set()).add(reader)
    return found


def count_late(items: Sequence[Item], slots: Sequence[Slot], versions: Mapping[str, str]) -> list[Slot]:
    """Count together with what reads the counts, which saves a stage, where that is right.

    It is where nothing in between reads the new counts, nothing at work then reads the old ones, and the
    operators that count are right with several threads.
    """
    counting = [item for item, slot in zip(items, slots, strict=True) if slot == Slot.COUNT]
    made = {name for item in counting for name in item.makes}
    between = (Slot.REFRESH_READ, Slot.REFRESH)
    read = {name for item, slot in zip(items, slots, strict=True) if slot in between for name in item.reads}
    merged = [Slot.PRECONDITION if slot == Slot.COUNT else slot for slot in slots]
    if made & read or any(_adds_rows(item.node.op_type) for item in counting):
        return list(slots)
    try:
        check_hazards(items, merged, versions)
    except VerifyError:
        return list(slots)
    return merged


def _adds_rows(op_type: str) -> bool:
    """Return whether an operator adds rows that may repeat, which the CPU does well in one thread alone."""
    return op_type.startswith("Scatter") or op_type == "MergeLookups"


def _is_branch(item: Item) -> bool:
    return item.node.op_type == "If" and item.phase in _BRANCH_SLOT


def _writes_of(item: Item, versions: Mapping[str, str]) -> set[str]:
    """Return the in-place states that a node writes: it reads one version and makes the next."""
    return {versions[name] for name in item.makes if name in versions}


def assign_slots(items: Sequence[Item], versions: Mapping[str, str]) -> list[Slot]:
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
            first = Slot.PRECONDITION if phase is Phase.PRECONDITION else latest
            later = [plain for plain in _PLAIN if plain >= max(latest, first)]
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


def check_hazards(items: Sequence[Item], slots: Sequence[Slot], versions: Mapping[str, str]) -> None:
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
