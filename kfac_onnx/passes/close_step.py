"""The pass that makes a whole training step of what the inserting passes left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.metadata import Carried, IdCheck, Loss, Parameter, Phase, State, Step
from kfac_onnx.passes.find_embeddings import values_by_name
from kfac_onnx.passes.insertion.writing import drop_gradient
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import BOOL, FLOAT, GUARD, Draft

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["CloseStep"]


@register
@dataclass(frozen=True, kw_only=True)
class CloseStep(Pass):
    """Add the finite flag, keep skipped steps out of every state, and declare states and inputs.

    Reads   what the inserting passes drafted (`kfac.draft`, `kfac.draft_states`).
    Adds    output kfac/ok bool, and one output per state: its value after the step
    Writes  `kfac.state` with the outputs' names, and `kfac.step`.
    Where anything is not finite, nothing of the step is kept.
    """

    name: ClassVar[str] = "close-step"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError when the graph has no loss, since then no step can be judged.
        """
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        loss = metadata.read(model, "loss", Loss)
        if loss is None or (loss.value is None and not loss.predictions):
            raise UserError(
                "the graph has no loss: it lies outside, with whoever runs the graph",
                context=self.name,
                help="export the model together with its loss, or name a scalar output: --loss NAME",
            )
        if draft.shape != "dense":
            for name in metadata.read_strings(model, "orphans"):
                drop_gradient(draft, name)
        for name in loss.predictions if loss.value is None else [loss.value]:
            value = draft.value(name)
            if value.dtype is None or value.dtype.is_floating_point():
                draft.flag(value, phase=Phase.PRECONDITION)
        self._carry(model, draft)
        ok = self._finite(draft, emitter)
        self._guard(model, draft, emitter, ok)
        restored = self._undo(draft, emitter, ok)
        finals = self._renormalize(draft, emitter, ok, restored)
        states = [self._output(state, draft, emitter, ok, finals) for state in draft.states]
        emitter.metadata("state", states)
        emitter.metadata("step", self._step(model, draft, loss, ok, states))
        for key in ("kfac.draft", "kfac.draft_states"):
            emitter.count(edited=int(model.metadata_props.pop(key, None) is not None))
        log.count("states", len(states))
        return emitter.changes

    def _carry(self, model: ir.Model, draft: Draft) -> None:
        """Declare the state that the graph itself changes, such as running statistics."""
        states = {state.input for state in draft.states}
        for pair in metadata.read_list(model, "carried", Carried):
            if pair.input in states:
                continue
            old, new = draft.parameter(pair.input), draft.value(pair.output)
            if new.dtype is None or new.dtype.is_floating_point():
                draft.flag(new)
            draft.keep(old, new, Phase.GRADIENTS)
            draft.states[-1] = replace(draft.states[-1], output=pair.output, role="statistic", parameter=None)

    def _finite(self, draft: Draft, emitter: Emitter) -> ir.Value:
        """Emit the flag of the step; what is known before counts and roots are is summed there."""
        emit = emitter.derive(phase=Phase.PRECONDITION)
        flags = [draft.value(name) for name in draft.flags]
        late = _after_counts_and_roots(draft.model)
        early = [flag for flag in flags if flag not in late]
        if 1 < len(early) < len(flags):
            first = emit.node("Sum", early, name="finite", dtype=FLOAT, shape=[])
            flags = [first, *(flag for flag in flags if flag in late)]
        total = emit.node("Sum", flags, name="finite", dtype=FLOAT, shape=[])
        broken = emit.node("IsNaN", [total], name="broken", dtype=BOOL, shape=[])
        ok = emit.node("Not", [broken], name="kfac/ok", dtype=BOOL, shape=[], exact_name=True)
        emitter.output(ok)
        return ok

    def _guard(self, model: ir.Model, draft: Draft, emitter: Emitter, ok: ir.Value) -> None:
        """In a skipped step, rows that would be written become zeros or the rows that were there."""
        for node in list(model.graph):
            guard = node.metadata_props.pop(GUARD, None)
            if guard is None:
                continue
            index, _, name = guard.partition(":")
            new = node.inputs[int(index)]
            if new is None or new.dtype is None:
                raise AssertionError("only typed inputs are guarded")
            emit = emitter.derive(site=node.metadata_props.get("kfac.site"), phase=Phase.SELECT, before=node)
            old = draft.value(name) if name else emit.constant(np.zeros((), new.dtype.numpy()), "nothing")
            chosen = emit.node("Where", [ok, new, old], name="kept", dtype=new.dtype, shape=new.shape)
            emitter.replace_input(node, int(index), chosen)
            # `ok` is made at the end of the graph; what depends on it moves behind it.
            self._move_to_end(model, [chosen.producer(), node])

    def _move_to_end(self, model: ir.Model, nodes: list[ir.Node | None]) -> None:
        moved = [node for node in nodes if node is not None]
        model.graph.remove(moved)
        model.graph.extend(moved)

    def _undo(self, draft: Draft, emitter: Emitter, ok: ir.Value) -> dict[str, ir.Value]:
        """Write back what the count phase changed, exactly; return the restored vectors by state."""
        restored: dict[str, ir.Value] = {}
        states = {state.input: state for state in draft.states}
        for entry in draft.undo.values():
            if entry.after is None:
                raise AssertionError(f"nothing reads '{entry.state}' after it is written")
            state = states[entry.state]
            emit = emitter.derive(site=state.parameter, phase=Phase.UNDO)
            after, before = draft.value(entry.after), draft.value(entry.before)
            chosen = emit.node(
                "Where", [ok, after, before], name="counts", dtype=after.dtype, shape=after.shape
            )
            with draft.at(emit):
                (value,) = draft.op(
                    "WriteRows",
                    [draft.value(state.candidate), draft.value(entry.ids), chosen],
                    [Out("restored", after.dtype, state.shape)],
                    Phase.UNDO,
                )
            restored[state.input] = value
        return restored

    def _renormalize(
        self, draft: Draft, emitter: Emitter, ok: ir.Value, restored: dict[str, ir.Value]
    ) -> dict[str, list[ir.Value]]:
        """Fold a running scale into its vector when it has become small; return each vector's last values."""
        finals = {name: [value] for name, value in restored.items()}
        states = {state.input: state for state in draft.states}
        for entry in draft.renormalizations.values():
            state = states[entry.state]
            emit = emitter.derive(site=state.parameter, phase=Phase.RENORMALIZE)
            vector = finals[state.input][-1] if state.input in finals else draft.value(state.candidate)
            due = emit.node(
                "And",
                [ok, draft.value(entry.now)],
                name="renormalize",
                phase=Phase.PRECONDITION,
                dtype=BOOL,
                shape=[],
            )
            then, other = emit.branch("renormalize"), emit.branch("keep")
            dtype = vector.dtype
            scaled = then.node(
                "Mul", [vector, draft.value(entry.factor)], name="scaled", dtype=dtype, shape=state.shape
            )
            then.graph.outputs.append(scaled)
            same = other.node("Identity", [vector], name="same", dtype=dtype, shape=state.shape)
            other.graph.outputs.append(same)
            attributes = {"then_branch": then.graph, "else_branch": other.graph}
            value = emit.node(
                "If", [due], attributes=attributes, name="renormalized", dtype=dtype, shape=state.shape
            )
            finals.setdefault(state.input, []).append(value)
        return finals

    def _output(
        self, state: State, draft: Draft, emitter: Emitter, ok: ir.Value, finals: dict[str, list[ir.Value]]
    ) -> State:
        if not state.candidate:
            raise AssertionError(f"state '{state.input}' was never given a new value")
        candidate = draft.value(state.candidate)
        aliases = [*state.aliases, *(str(value.name) for value in finals.get(state.input, []))]
        own = state.output  # the exporter's name of the new value, in a graph that keeps its optimizer
        if own:
            candidate.name = emitter.unique_name(f"{own}.candidate")
            draft.remember(candidate)
            state = replace(state, candidate=str(candidate.name))
        name = own or emitter.unique_name(f"{state.input}.next")
        emit = emitter.derive(site=state.parameter, phase=Phase.SELECT)
        if state.update == "in-place":
            value = finals[state.input][-1] if state.input in finals else candidate
            last = value.producer()
            if last is not None and value.name is not None:
                aliases.remove(value.name) if value.name in aliases else None
                self._rename(value, name, draft)
            aliases.append(name)
            chosen = value
            kept = name if value is candidate else state.candidate
        else:
            old = draft.value(state.input)
            chosen = emit.node(
                "Where",
                [ok, candidate, old],
                name=f"{state.input}.next",
                dtype=candidate.dtype,
                shape=state.shape,
            )
            self._rename(chosen, name, draft)
            kept = state.candidate
        if own:
            outputs = draft.model.graph.outputs
            for index, value in enumerate(outputs):
                if value is candidate:
                    outputs[index] = chosen
            emitter.count(edited=1)
        else:
            emitter.output(chosen)
        return replace(
            state, output=name, candidate=kept, aliases=tuple(dict.fromkeys(aliases)) if aliases else ()
        )

    def _rename(self, value: ir.Value, name: str, draft: Draft) -> None:
        value.name = name
        draft.remember(value)

    def _step(self, model: ir.Model, draft: Draft, loss: Loss, ok: ir.Value, states: list[State]) -> Step:
        taken = {state.input for state in states} | {rate.input for rate in draft.rates}
        taken.update(item.name for item in metadata.read_list(model, "parameters", Parameter))
        others = [str(value.name) for value in model.graph.inputs if value.name not in taken]
        held = model.graph.initializers
        return Step(
            loss=loss.value,
            predictions=loss.predictions if loss.value is None else {},
            ok=str(ok.name),
            batch=tuple(name for name in others if name not in held),
            constants=tuple(name for name in others if name in held),
            learning_rates=tuple(draft.rates),
            id_checks=tuple(metadata.read_list(model, "id_checks", IdCheck)),
            root_checks=tuple(draft.roots),
            shape=draft.shape,
            settings=draft.settings,
        )


def _after_counts_and_roots(model: ir.Model) -> set[ir.Value]:
    """Return the values that depend on what the count or the refresh phase makes."""
    late: set[ir.Value] = set()
    for node in model.graph:
        own = node.metadata_props.get("kfac.phase") in (Phase.COUNT, Phase.REFRESH)
        if own or any(value in late for value in node.inputs if value is not None):
            late.update(node.outputs)
    return late
