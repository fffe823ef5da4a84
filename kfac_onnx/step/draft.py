"""The training step while passes are still adding to it.

Every inserting pass registers its states, learning rates and finite flags here; they are kept in the
model's metadata (`kfac.draft`, `kfac.draft_states`), so that passes run in any order and in separate runs
of the tool. The pass `close-step` assembles the step from them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.values import static_shape
from kfac_onnx.metadata import LearningRate, Phase, RootCheck, State, StepSettings

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from kfac_onnx.graph.emit import Emitter, Out

__all__ = ["DOMAIN", "EARLY_REFRESHES", "GUARD", "Draft", "Renormalization", "Undo"]

DOMAIN = "ai.kfac"
GUARD = "kfac.guard"
"""Node metadata: `index` or `index:fallback`: the input that a skipped step replaces by zeros or a value."""

EARLY_REFRESHES: Final = (1, 2, 4, 8)
"""Committed steps at which the inverse (root) of G is recomputed besides every `refresh_every`-th."""

FLOAT, DOUBLE, BOOL = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class Undo:
    """How a skipped step restores a vector that was written in place: `before` goes back to its `ids`.

    `after` names the entries as they were written; null as long as nothing has read them.
    """

    state: str
    ids: str
    before: str
    after: str | None = None


@dataclass(frozen=True)
class Renormalization:
    """A vector under a running scale: where `now` is true it is multiplied by `factor`, the scale's value."""

    state: str
    now: str
    factor: str


@dataclass(frozen=True)
class _Record:
    """The entry `kfac.draft`: everything but the states, all values by name."""

    flags: tuple[str, ...] = ()
    learning_rates: tuple[LearningRate, ...] = ()
    root_checks: tuple[RootCheck, ...] = ()
    undo: tuple[Undo, ...] = ()
    renormalizations: tuple[Renormalization, ...] = ()
    step_number: str | None = None
    due: dict[str, str] = field(default_factory=dict[str, str])
    """Whether this is a step of a schedule, by its period."""
    shape: Literal["rows", "dense"] = "rows"
    settings: StepSettings = field(default_factory=StepSettings)


class Draft:
    """Reads and extends the draft that a model carries, through one pass's emitter."""

    def __init__(self, model: ir.Model, emitter: Emitter, values: dict[str, ir.Value]) -> None:
        self.model = model
        self.outer = emitter
        """The pass's own emitter, without a site: for what all tables share."""
        self.emitter = emitter
        self.values = values
        self.states = metadata.read_list(model, "draft_states", State)
        self._places = {state.input: index for index, state in enumerate(self.states)}
        record = metadata.read(model, "draft", _Record) or _Record()
        self.flags = list(record.flags)
        self.rates = list(record.learning_rates)
        self.roots = list(record.root_checks)
        self.undo = {entry.state: entry for entry in record.undo}
        self.renormalizations = {entry.state: entry for entry in record.renormalizations}
        self.shape: Literal["rows", "dense"] = record.shape
        self.settings = record.settings
        self._step_number = record.step_number
        self._due = dict(record.due)

    def save(self) -> None:
        """Write the draft back into the model's metadata."""
        self.emitter.metadata("draft_states", self.states)
        record = _Record(
            flags=tuple(self.flags),
            learning_rates=tuple(self.rates),
            root_checks=tuple(self.roots),
            undo=tuple(self.undo.values()),
            renormalizations=tuple(self.renormalizations.values()),
            step_number=self._step_number,
            due=self._due,
            shape=self.shape,
            settings=self.settings,
        )
        self.emitter.metadata("draft", record)

    @contextmanager
    def at(self, emitter: Emitter) -> Generator[None]:
        """Add nodes through another emitter, for one site."""
        outer, self.emitter = self.emitter, emitter
        try:
            yield
        finally:
            self.emitter = outer

    def value(self, name: str) -> ir.Value:
        """Return a value of the main graph by name."""
        return self.values[name]

    def remember(self, *values: ir.Value) -> None:
        """Make new values known by name."""
        self.values.update((str(value.name), value) for value in values)

    def parameter(self, name: str) -> ir.Value:
        """Return a trained parameter as an input of the step; its value, if it has one, stays its default."""
        value = self.values[name]
        if not value.is_graph_input():
            self.model.graph.inputs.append(value)
            self.emitter.count(edited=1)
        return value

    def state(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        initial: str | float,
        role: Literal["factor", "root", "counter", "optimizer", "scratch"],
        *,
        parameter: str | None = None,
    ) -> ir.Value:
        """Add a state input; `keep` or `write` says later what it becomes."""
        value = self.emitter.input(name, dtype, shape)
        self.remember(value)
        self._places[name] = len(self.states)
        self.states.append(
            State(
                input=name,
                output="",
                shape=tuple(shape),
                dtype=dtype.numpy().name,
                initial=initial,
                phase=Phase.PRECONDITION,
                update="double",
                candidate="",
                role=role,
                parameter=parameter,
            )
        )
        return value

    def keep(self, old: ir.Value, new: ir.Value, phase: Phase) -> None:
        """Say that `new` is the state `old` after a kept step, held in two buffers."""
        self._settle(old, new, phase, "double", ())

    def write(self, old: ir.Value, new: ir.Value, phase: Phase) -> None:
        """Say that `new` is the state `old` after a kept step, written in place."""
        self._settle(old, new, phase, "in-place", (str(old.name), str(new.name)))

    def _settle(
        self,
        old: ir.Value,
        new: ir.Value,
        phase: Phase,
        update: Literal["in-place", "double"],
        aliases: tuple[str, ...],
    ) -> None:
        self.remember(new)
        place = self._places.setdefault(str(old.name), len(self.states))
        if place < len(self.states):
            self.states[place] = replace(
                self.states[place], candidate=str(new.name), phase=phase, update=update, aliases=aliases
            )
            return
        self.states.append(
            State(
                input=str(old.name),
                output="",
                shape=_fixed_shape(old),
                dtype="float32" if old.dtype is None else old.dtype.numpy().name,
                initial="parameter",
                phase=phase,
                update=update,
                candidate=str(new.name),
                role="parameter",
                parameter=str(old.name),
                aliases=aliases,
            )
        )

    def flag(self, *values: ir.Value, phase: Phase = Phase.PRECONDITION) -> None:
        """Let the step be kept only if these tensors are finite."""
        for value in values:
            found = self.emitter.node(
                "AllFinite", [value], domain=DOMAIN, name="finite", phase=phase, dtype=FLOAT, shape=[]
            )
            self.remember(found)
            self.flags.append(str(found.name))

    def set_optimizer(self, parameters: str, method: str) -> None:
        """Say, for reports, which optimizer some parameters got (`rest`, `tables`, `all`, `hidden`)."""
        optimizer = self.settings.optimizer | {parameters: method}
        self.settings = replace(self.settings, optimizer=optimizer)

    def set_decay(self, table: str, decay: float) -> None:
        """Say, for reports, how a table decays."""
        self.settings = replace(self.settings, table_decay=self.settings.table_decay | {table: decay})

    def learning_rate(self, name: str, default: float) -> ir.Value:
        """Return the learning-rate input of this name, made on first use."""
        if name in self.values:
            return self.values[name]
        value = self.emitter.input(name, FLOAT, [])
        self.emitter.default(value, np.float32(default))
        self.remember(value)
        self.rates.append(LearningRate(name, default))
        return value

    def step_number(self) -> ir.Value:
        """Return t, the number of the step being made (int64 scalar, 1 first)."""
        if self._step_number is not None:
            return self.values[self._step_number]
        with self.at(self.outer):
            old = self.state("kfac/t", INT64, [], 0.0, "counter")
            one = self.emitter.constant(np.asarray(1, np.int64), "one")
            new = self.emitter.node("Add", [old, one], name="t", phase=Phase.GRADIENTS, dtype=INT64, shape=[])
            self.keep(old, new, Phase.GRADIENTS)
        self._step_number = str(new.name)
        return new

    def due(self, every: int) -> ir.Value:
        """Return whether this is a step of a schedule: steps 1, 2, 4, 8 and multiples of `every`."""
        shared = self._due.get(str(every))
        if shared is not None:
            return self.values[shared]
        t, emit = self.step_number(), self.outer.derive(phase=Phase.GRADIENTS)
        after = max(EARLY_REFRESHES) + 1
        early = emit.constant(np.isin(np.arange(after + 1), EARLY_REFRESHES), "early_refreshes")
        late = emit.constant(np.asarray(after, np.int64), "after_early_refreshes")
        period = emit.constant(np.asarray(every, np.int64), "every")
        zero = emit.constant(np.asarray(0, np.int64), "zero")
        place = emit.node("Min", [t, late], name="early", dtype=INT64, shape=[])
        hit = emit.node("Gather", [early, place], name="early", dtype=BOOL, shape=[])
        rest = emit.node("Mod", [t, period], name="since_due", dtype=INT64, shape=[])
        due = emit.node("Equal", [rest, zero], name="due", dtype=BOOL, shape=[])
        now = emit.node("Or", [hit, due], name="due_now", dtype=BOOL, shape=[])
        self.remember(now)
        self._due[str(every)] = str(now.name)
        return now

    def guard(self, node: ir.Node, index: int, fallback: ir.Value | None = None) -> None:
        """Mark an input of a writing node: in a skipped step it is `fallback`, or zeros."""
        node.metadata_props[GUARD] = str(index) if fallback is None else f"{index}:{fallback.name}"

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[Out],
        phase: Phase,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add an `ai.kfac` operator and return its outputs."""
        made = self.emitter.node(
            op_type, inputs, domain=DOMAIN, attributes=attributes, phase=phase, outputs=list(outputs)
        )
        self.remember(*made)
        return made


def _fixed_shape(parameter: ir.Value) -> tuple[int, ...]:
    """Return the shape of a trained parameter.

    Raises UserError where the graph leaves a dimension open: no buffer could hold it.
    """
    shape = static_shape(parameter)
    if shape is None:
        raise UserError(
            f"the parameter '{parameter.name}' has dimensions without a number",
            help="export the graph with its weights, or with inputs of fixed shapes",
        )
    return shape
