"""The nodes of one table's factors: the counts A, the second moment G, and G's inverse root.

With ids u and rows g of the M lookups of a step:

    A ← average of counts,   G ← average of gᵀg/M,   root = (G + damping_g·I)^e, as of the last refresh

With `tied=both` the positions of the table's projections are lookups too: see `projections`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.fisher.projections import emit_positions
from kfac_onnx.fisher.sampling import rows_for_g
from kfac_onnx.graph.rewriter import Emitter, Out
from kfac_onnx.metadata import Phase, RootCheck, Site
from kfac_onnx.step.draft import BOOL, DOUBLE, FLOAT, INT64, Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.fisher.presets import Preset
    from kfac_onnx.metadata import Projection

__all__ = ["TableFactors"]

RENORMALIZE_BELOW = 2.0**-20
PLAIN_DECAY = 0.5
"""Below this decay the running scale of A would vanish at once: A is averaged over the whole vocabulary."""


def renormalization_states(settings: dict[str, object]) -> list[dict[str, str]]:
    """Return the entries of the draft's settings that name a running scale and the vector under it."""
    entries = settings.setdefault("renormalize", [])
    if not isinstance(entries, list):
        raise TypeError("kfac.draft: 'renormalize' is not a list")
    return entries  # pyright: ignore[reportUnknownVariableType]  JSON written by this module


class TableFactors:
    """Emits the factors of one site and their root."""

    def __init__(
        self,
        site: Site,
        preset: Preset,
        draft: Draft,
        scale: ir.Value | None,
        projections: Sequence[Projection] = (),
    ) -> None:
        self.site = site
        self.preset = preset
        self.draft = draft
        self.emit: Emitter = draft.emitter.derive(site=site.parameter)
        self.scale = scale
        if site.ids is None or site.rows is None:
            raise AssertionError("find-embeddings marks the ids and rows of every site")
        self.ids = draft.value(site.ids)
        self.rows = draft.value(site.rows)
        self.mask = None if site.keep is None else draft.value(site.keep)
        self.V, self.D = site.vocab_size, site.embedding_dim
        self.counts = self.ids  # set by the input factor
        self.decay_a = preset.input_decay if preset.input_decay is not None else 0.0
        with draft.at(self.emit):
            self.positions = [emit_positions(item, site, draft, self.emit) for item in projections]

    def _name(self, what: str) -> str:
        return f"kfac/{self.site.parameter}/{what}"

    def _lookups(self) -> ir.Value:
        """Return M, the number of lookups that count."""
        counted = self._looked_up()
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        if not self.positions:
            return counted
        numbers = [counted, *(item.number for item in self.positions)]
        return emit.node("Sum", numbers, name="lookups", dtype=FLOAT, shape=[])

    def _looked_up(self) -> ir.Value:
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        if self.mask is not None:
            return emit.node(
                "ReduceSum", [self.mask], attributes={"keepdims": 0}, name="lookups", dtype=FLOAT, shape=[]
            )
        size = emit.node("Size", [self.ids], name="lookups", dtype=INT64, shape=[])
        return emit.node("Cast", [size], attributes={"to": FLOAT}, name="lookups", dtype=FLOAT, shape=[])

    # --- the input factor: counts -----------------------------------------------------------------

    def _input_factor(self, lookups: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Update A; return gain (a_u = gain·Ã_u) and total_a, the sum of a over the vocabulary."""
        preset, draft = self.preset, self.draft
        initial = "ones" if preset.start_input == 1.0 else "zeros"
        factor = draft.state(
            self._name("A"), FLOAT, [self.V], initial, "factor", parameter=self.site.parameter
        )
        self.counts = factor
        if self.decay_a < PLAIN_DECAY or self.positions:
            return self._plain_input_factor(factor, lookups)
        scale = self._counter("A.scale", DOUBLE, 1.0)
        total = self._counter("A.total", DOUBLE, preset.start_input * self.V)
        count = self._counter("A.count", INT64, 0.0)
        outs = [
            Out("A.scale", DOUBLE, []),
            Out("A.total", DOUBLE, []),
            Out("A.count", INT64, []),
            Out("increment", FLOAT, []),
            Out("gain", FLOAT, []),
            Out("total_a", FLOAT, []),
        ]
        new_scale, new_total, new_count, increment, gain, total_a = draft.op(
            "InputFactorDecay",
            [scale, total, count, lookups],
            outs,
            Phase.GRADIENTS,
            decay=self.decay_a,
            debias=int(preset.debias),
            normalize=int(preset.normalize_counts),
        )
        draft.keep(total, new_total, Phase.GRADIENTS)
        draft.keep(count, new_count, Phase.GRADIENTS)
        self._renormalized(scale, new_scale, factor)
        kept = self.emit.node(
            "GatherElements",
            [factor, self.ids],
            name="A.before",
            phase=Phase.GRADIENTS,
            dtype=FLOAT,
            shape=[None],
        )
        draft.remember(kept)
        increments = self._increments(increment, kept)
        (counted,) = draft.op(
            "InputFactorUpdate", [factor, self.ids, increments], [Out("A", FLOAT, [self.V])], Phase.COUNT
        )
        draft.write(factor, counted, Phase.COUNT)
        undo = draft.settings.setdefault("undo", [])
        undo.append({"state": factor.name, "ids": self.ids.name, "before": kept.name})
        self.counts = counted
        return gain, total_a

    def _plain_input_factor(self, factor: ir.Value, lookups: ir.Value) -> tuple[ir.Value, ir.Value]:
        preset, draft = self.preset, self.draft
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        one = emit.constant(np.float32(1.0), "one")
        divisor = (
            lookups
            if preset.normalize_counts
            else emit.node("Min", [lookups, one], name="any", dtype=FLOAT, shape=[])
        )
        ids, weights = self._with_positions(self.ids, self._per_lookup(one))
        (averaged,) = draft.op(
            "InputFactorAverage",
            [factor, ids, weights, divisor],
            [Out("A", FLOAT, [self.V])],
            Phase.GRADIENTS,
            decay=self.decay_a,
        )
        draft.keep(factor, averaged, Phase.GRADIENTS)
        self.counts = averaged
        gain = one
        if preset.debias:
            count = self._counter("A.count", INT64, 0.0)
            any_lookup = emit.node(
                "Cast", [lookups], attributes={"to": BOOL}, name="any", dtype=BOOL, shape=[]
            )
            step = emit.node(
                "Cast", [any_lookup], attributes={"to": INT64}, name="any", dtype=INT64, shape=[]
            )
            new_count = emit.node("Add", [count, step], name="A.count", dtype=INT64, shape=[])
            draft.keep(count, new_count, Phase.GRADIENTS)
            # As the operator rounds the decay to float32, so does the correction; the rest is exact enough.
            one64 = emit.constant(np.float64(1.0), "one64")
            n = emit.node("Cast", [new_count], attributes={"to": DOUBLE}, name="n", dtype=DOUBLE, shape=[])
            n = emit.node("Max", [n, one64], name="n", dtype=DOUBLE, shape=[])
            rho = emit.constant(np.float64(np.float32(self.decay_a)), "decay_a")
            power = emit.node("Pow", [rho, n], name="bias", dtype=DOUBLE, shape=[])
            seen = emit.node("Sub", [one64, power], name="bias", dtype=DOUBLE, shape=[])
            seen = emit.node("Reciprocal", [seen], name="gain", dtype=DOUBLE, shape=[])
            gain = emit.node("Cast", [seen], attributes={"to": FLOAT}, name="gain", dtype=FLOAT, shape=[])
        total = emit.node(
            "ReduceSum", [averaged], attributes={"keepdims": 0}, name="total_a", dtype=FLOAT, shape=[]
        )
        return gain, emit.node("Mul", [total, gain], name="total_a", dtype=FLOAT, shape=[])

    def _with_positions(self, ids: ir.Value, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Add the soft counts of every projection: all V rows with a weight each."""
        if not self.positions:
            return ids, weights
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        bounds = [emit.constant(np.asarray(value, np.int64), "bound") for value in (0, self.V, 1)]
        every = emit.node("Range", bounds, name="every_row", dtype=INT64, shape=[self.V])
        soft = [item.counts for item in self.positions]
        along = {"axis": 0}
        ids = emit.node(
            "Concat", [ids, *[every] * len(soft)], attributes=along, name="ids", dtype=INT64, shape=[None]
        )
        weights = emit.node(
            "Concat", [weights, *soft], attributes=along, name="increments", dtype=FLOAT, shape=[None]
        )
        return ids, weights

    def _per_lookup(self, scalar: ir.Value) -> ir.Value:
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        if self.mask is not None:
            return emit.node("Mul", [self.mask, scalar], name="increments", dtype=FLOAT, shape=[None])
        shape = emit.node("Shape", [self.ids], name="ids_shape", dtype=INT64, shape=[1])
        return emit.node("Expand", [scalar, shape], name="increments", dtype=FLOAT, shape=[None])

    def _increments(self, scalar: ir.Value, before: ir.Value) -> ir.Value:
        """Return the increment of each lookup plus 0·before: counts written in place are read before that."""
        emit = self.emit.derive(phase=Phase.COUNT)
        zero = emit.constant(np.float32(0.0), "zero")
        increment = scalar if self.mask is None else self._per_lookup(scalar)
        nothing = emit.node("Mul", [before, zero], name="nothing", dtype=FLOAT, shape=[None])
        return emit.node("Add", [nothing, increment], name="increments", dtype=FLOAT, shape=[None])

    def _counter(self, what: str, dtype: ir.DataType, initial: float) -> ir.Value:
        return self.draft.state(
            self._name(what), dtype, [], initial, "counter", parameter=self.site.parameter
        )

    def _renormalized(self, old: ir.Value, new: ir.Value, vector: ir.Value) -> None:
        """Keep a running scale; where it becomes small, the vector takes it in and it starts again at 1."""
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        least = emit.constant(np.float64(RENORMALIZE_BELOW), "renormalize_below")
        one = emit.constant(np.float64(1.0), "one64")
        due = emit.node("Less", [new, least], name="renormalize_now", dtype=BOOL, shape=[])
        kept = emit.node("Where", [due, one, new], name="scale_kept", dtype=DOUBLE, shape=[])
        factor = emit.node(
            "Cast", [new], attributes={"to": FLOAT}, name="scale_float32", dtype=FLOAT, shape=[]
        )
        self.draft.keep(old, kept, Phase.GRADIENTS)
        self.draft.remember(due, factor)
        entries = renormalization_states(self.draft.settings)
        entries.append({"state": str(vector.name), "now": str(due.name), "factor": str(factor.name)})

    # --- the output factor and its root -------------------------------------------------------------

    def _output_factor(self, lookups: ir.Value) -> ir.Value:
        preset, draft = self.preset, self.draft
        old = draft.state(
            self._name("G"),
            FLOAT,
            [self.D, self.D],
            preset.start_output,
            "factor",
            parameter=self.site.parameter,
        )
        count = self._counter("G.count", INT64, 0.0)
        scale = self.scale if self.scale is not None else self.emit.constant(np.float32(1.0), "one")
        square = [self.D, self.D]
        rows = self.rows
        if self.positions:
            emit = self.emit.derive(phase=Phase.GRADIENTS)
            parts = [rows, *(item.rows for item in self.positions)]
            rows = emit.node(
                "Concat", parts, attributes={"axis": 0}, name="rows", dtype=FLOAT, shape=[None, self.D]
            )
        if preset.partial_statistics:
            rows, lookups = rows_for_g(rows, self._kept(), lookups, count, preset, draft, self.emit)
        new, new_count = draft.op(
            "OutputFactorUpdate",
            [old, count, rows, lookups, scale],
            [Out("G", FLOAT, square), Out("G.count", INT64, [])],
            Phase.GRADIENTS,
            decay=preset.output_decay,
        )
        draft.keep(old, new, Phase.GRADIENTS)
        draft.keep(count, new_count, Phase.GRADIENTS)
        draft.flag(new)  # Σ|G|: kept with a trace beyond float32, G would make each refresh from then on fail
        if not preset.debias:
            return new
        outs = [Out("G.debiased", FLOAT, square)]
        (ghat,) = draft.op("FactorDebias", [new, new_count], outs, Phase.GRADIENTS, decay=preset.output_decay)
        return ghat

    def _kept(self) -> ir.Value | None:
        """Return, for each row that G may take, whether it counts (not 0); None where all do."""
        if self.mask is None and not self.positions:
            return None
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        parts = [self._per_lookup(emit.constant(np.float32(1.0), "one"))]
        for item in self.positions:
            shape = emit.node(
                "Shape", [item.rows], attributes={"end": 1}, name="size", dtype=INT64, shape=[1]
            )
            parts.append(emit.node("Expand", [item.number, shape], name="kept", dtype=FLOAT, shape=[None]))
        return emit.node("Concat", parts, attributes={"axis": 0}, name="kept", dtype=FLOAT, shape=[None])

    def _dampings(self, total_a: ir.Value, ghat: ir.Value) -> tuple[ir.Value, ir.Value]:
        draft, value = self.draft, self.preset.damping.value
        outs = [Out("damping_a", FLOAT, []), Out("damping_g", FLOAT, [])]
        if self.preset.damping.kind == "pi":
            damping_a, damping_g = draft.op(
                "DampingPi",
                [total_a, ghat],
                outs,
                Phase.GRADIENTS,
                damping=value,
                vocab_size=self.V,
                pi=1,
            )
            return damping_a, damping_g
        (trace,) = draft.op("FactorTrace", [ghat], [Out("trace", FLOAT, [])], Phase.GRADIENTS)
        (damping_a,) = draft.op(
            "DampingRelative", [total_a], outs[:1], Phase.GRADIENTS, rho=value, size=self.V
        )
        (damping_g,) = draft.op("DampingRelative", [trace], outs[1:], Phase.GRADIENTS, rho=value, size=self.D)
        return damping_a, damping_g

    def _root(self, ghat: ir.Value, damping_g: ir.Value) -> ir.Value:
        preset, draft, emit = self.preset, self.draft, self.emit
        square = [self.D, self.D]
        old = draft.state(
            self._name("root"), FLOAT, square, "identity", "root", parameter=self.site.parameter
        )
        now = draft.due(preset.refresh_every)
        then, other = emit.branch("refresh"), emit.branch("keep")
        inputs = [ghat, damping_g, old]
        outs = [Out("root", FLOAT, square), Out("residual", FLOAT, [])]
        if preset.uses_root:
            attributes = {"iterations": preset.iterations(self.D)}
            made = then.node(
                "FactorInverseRoot",
                inputs,
                domain="ai.kfac",
                attributes=attributes,
                phase=Phase.REFRESH,
                outputs=outs,
            )
        else:
            made = then.node("FactorInverse", inputs, domain="ai.kfac", phase=Phase.REFRESH, outputs=outs)
        then.graph.outputs.extend(made)
        zero = emit.constant(np.float32(0.0), "no_residual")
        other.graph.outputs.append(other.node("Identity", [old], name="root", dtype=FLOAT, shape=square))
        other.graph.outputs.append(other.node("Identity", [zero], name="residual", dtype=FLOAT, shape=[]))
        root, residual = emit.node(
            "If",
            [now],
            attributes={"then_branch": then.graph, "else_branch": other.graph},
            phase=Phase.REFRESH,
            outputs=outs,
        )
        draft.remember(root, residual)
        draft.keep(old, root, Phase.REFRESH)
        draft.flag(root)
        draft.roots.append(
            RootCheck(
                parameter=self.site.parameter,
                root=str(root.name),
                factor=str(ghat.name),
                damping=str(damping_g.name),
                residual=str(residual.name),
                exponent=preset.exponent,
                tolerance=preset.tolerance(self.D),
            )
        )
        return root

    def _active(self, root: ir.Value, ghat: ir.Value, lookups: ir.Value) -> ir.Value:
        """Return the root, or zeros where the table must not move: no lookup, or trace(G) = 0.

        Without a dense part nothing is needed if G takes all rows: then there are none, or all are zero.
        """
        if self.site.dense is None and not self.preset.partial_statistics:
            return root
        emit = self.emit.derive(phase=Phase.PRECONDITION)
        flat, start, end, step = (
            emit.constant(np.asarray([value], np.int64), "entry")
            for value in (-1, 0, self.D * self.D, self.D + 1)
        )
        entries = emit.node("Reshape", [ghat, flat], name="entries", dtype=FLOAT, shape=[self.D * self.D])
        diagonal = emit.node(
            "Slice", [entries, start, end, start, step], name="diagonal", dtype=FLOAT, shape=[self.D]
        )
        trace = emit.node(
            "ReduceSum", [diagonal], attributes={"keepdims": 0}, name="trace", dtype=FLOAT, shape=[]
        )
        least = emit.node("Min", [trace, lookups], name="active", dtype=FLOAT, shape=[])
        nothing = emit.constant(np.float32(0.0), "nothing")
        active = emit.node("Greater", [least, nothing], name="active", dtype=BOOL, shape=[])
        return emit.node("Where", [active, root, nothing], name="active_root", dtype=FLOAT, shape=root.shape)
