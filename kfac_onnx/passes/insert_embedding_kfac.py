"""The pass that gives every embedding table its K-FAC block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.fisher import EmbeddingKFACFB, EmbeddingKFACMultiIndepFB, LayerCollection
from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.fisher.projections import emit_positions
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.metadata import Parameter, Phase, Refusal, Site, StepSettings
from kfac_onnx.passes.find_embeddings import values_by_name
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET, TABLE_DECAY
from kfac_onnx.passes.insertion.host_optimizer import close_updates, host_update_of, replace_source
from kfac_onnx.passes.insertion.interface import drop_tensors, replace_rows, row_gradient_of
from kfac_onnx.passes.insertion.loss_divisor import squared_divisor
from kfac_onnx.passes.insertion.penalty import with_penalty
from kfac_onnx.passes.insertion.table_decay import with_decay
from kfac_onnx.passes.insertion.writing import drop_gradient, from_rows, takes_steps, to_rows, write_table
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.patterns import chosen
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import FLOAT, Draft

if TYPE_CHECKING:
    from collections.abc import Collection

    from kfac_onnx.fisher.blocks import FisherBlock
    from kfac_onnx.fisher.presets import Preset
    from kfac_onnx.fisher.row_scales import RowUpdate
    from kfac_onnx.pipeline.log import Log

__all__ = ["InsertEmbeddingKfac"]

_STEADY: Final = " or ".join(name for name, preset in PRESETS.items() if not preset.diverges_on_tied)
"""Presets that hold on tied tables."""


@register
@dataclass(frozen=True, kw_only=True)
class InsertEmbeddingKfac(Pass):
    """Insert the factors, the inverse root and the preconditioned update of every embedding table.

    Reads   the sites left by `find-embeddings`.
    Adds    state kfac/<table>/A      float64[V]     debiased average of lookup counts per row
            state kfac/<table>/G      float32[D, D]  average of gᵀg / M over lookups, g = dL/d(row)
            state kfac/<table>/root   float32[D, D]  (G + damping)^exponent as of the last refresh
    Shape   `rows` updates each table in place and removes its dense gradient; `dense` replaces the
            gradient output (a tensor, or rows and their ids) by the preconditioned one, under its own name.
    Decay   `table-decay`: W ← W·(1 − lr·decay) in each step, which a row makes up when it is looked up:
            docs/mathematics.md
    Source  Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671), sections 5 and 6.3;
            docs/mathematics.md has every preset's formulas.
    """

    name: ClassVar[str] = "insert-embedding-kfac"
    preset: str = opt(DEFAULT_PRESET, "named settings of the block", choices=tuple(PRESETS))
    only: tuple[str, ...] = opt((), "patterns of the tables that get it; all that have no optimizer if none")
    lr: float | None = opt(None, "learning rate of the tables; the preset's own if none", lo=0.0)
    rate: str | None = opt(None, "name of the learning-rate input; kfac/lr if none")
    damping: float | None = opt(
        None, "damping, λ (pi) or ρ (relative); the preset's if none", lo=1e-30, hi=1e6
    )
    decay_a: float | None = opt(
        None, "weight kept from the old counts at each update; the preset's if none", lo=0.0, hi=0.9999999
    )
    decay_g: float | None = opt(
        None, "weight kept from the old G at each update; the preset's if none", lo=0.0, hi=0.9999999
    )
    refresh_every: int | None = opt(
        None, "committed steps between refreshes of the root; the preset's if none", lo=1
    )
    g_rows: int | None = opt(
        None,
        "rows of a batch that G takes, evenly spread; the preset's if none",
        lo=1,
    )
    g_every: int = opt(1, "committed steps between updates of G (steps 1, 2, 4 and 8 are too)", lo=1)
    grad_scale: float | None = opt(
        None,
        "examples that a mean loss divides by, for presets that need it; found in the graph if none",
        lo=1e-30,
        hi=1e6,
    )
    shape: Literal["rows", "dense"] = opt("rows", "update tables in place, or replace their gradients")
    uses: Literal["stack", "multi-indep"] = opt(
        "stack", "several uses of a table: rows of one batch, or U independent blocks (damping λ/U, c = U)"
    )
    tied: Literal["auto", "lookup", "both", "refuse"] = opt(
        "auto",
        "tables that are a projection too: statistics of both sides where they can be had, "
        "of the lookups, of both sides, or refuse them",
    )
    penalty: Literal["all", "rows", "refuse"] = opt(
        "all", "a penalty on a table: its gradient on all rows, decay of the looked-up rows alone, or refuse"
    )
    table_decay: float = opt(0.0, TABLE_DECAY, lo=0.0, hi=1.0)
    allow_fallback: tuple[str, ...] = opt((), "refused tables that the ordinary optimizer may train")

    def settings(self) -> Preset:
        """Return the preset with this pass's options in place."""
        preset = PRESETS[self.preset]
        if self.damping is not None:
            preset = replace(preset, damping=preset.damping.with_value(self.damping))
        if self.decay_a is not None:
            preset = preset.with_input_decay(self.decay_a)
        if self.decay_g is not None:
            preset = replace(preset, output=replace(preset.output, decay=self.decay_g))
        if self.refresh_every is not None:
            preset = replace(preset, refresh_every=self.refresh_every)
        rows = preset.sample.rows if self.g_rows is None else self.g_rows
        return replace(preset, sample=replace(preset.sample, rows=rows, every=self.g_every))

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError for a pattern that matches no table, a table that was refused and is not in
        `allow-fallback`, when there is no table at all, where a preset needs the divisor of the loss and it
        is unknown, and for an option that means nothing for the preset or the shape.
        """
        preset = self.settings()
        if self.grad_scale is not None and not preset.per_example:
            takers = " or ".join(name for name, other in PRESETS.items() if other.per_example)
            raise UserError(
                f"grad-scale has no meaning for preset '{preset.name}', whose update does not depend on it",
                help=f"leave it out, or take preset {takers}",
            )
        if self.shape == "dense" and self.table_decay:
            raise UserError(
                "table-decay belongs to the step of a table, and shape=dense leaves that to the host",
                context=self.name,
                help="let the optimizer that takes the gradients decay, or set shape=rows",
            )
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        done = {state.parameter for state in draft.states if state.role == "parameter"}
        sites, refused = self._trained_sites(model, done)
        if len(sites) < len(metadata.read_list(model, "sites", Site)):
            emitter.metadata("sites", sites)
            emitter.metadata("refused", refused)
        sites = self._chosen(model, [site for site in sites if site.parameter not in done])
        scale: ir.Value | None = None
        if preset.per_example:
            subject = f"preset {self.preset}"
            scale = squared_divisor(
                model, emitter, draft, divisor=self.grad_scale, subject=subject, context=self.name
            )
        collection = LayerCollection(preset=preset, draft=draft, in_place=self.shape == "rows")
        for site in sites:
            self._insert(site, preset, collection, scale, log)
        if self.shape == "dense":
            drop_tensors(draft)
            close_updates(draft)
        draft.shape = self.shape
        if sites:
            draft.settings = StepSettings(
                preset=preset.name,
                uses=self.uses,
                tied=self.tied,
                g_rows=preset.sample.rows,
                g_every=preset.sample.every,
                optimizer=draft.settings.optimizer,
                table_decay=draft.settings.table_decay,
            )
        draft.save()
        return emitter.changes

    def _insert(
        self, site: Site, preset: Preset, collection: LayerCollection, scale: ir.Value | None, log: Log
    ) -> None:
        draft = collection.draft
        rate: ir.Value | None = None
        if self.shape == "rows":
            rate = draft.learning_rate(self.rate or "kfac/lr", preset.lr if self.lr is None else self.lr)
        block = self._block(site, collection, scale)
        with draft.at(draft.emitter.derive(site=site.parameter)):
            dense: ir.Value | None = None
            if site.dense is not None:
                emit = draft.emitter.derive(phase=Phase.PRECONDITION)
                dense = to_rows(emit, draft.value(site.dense), site)
                self._say_tied(site, preset, log)
            result = block.update(dense, rate if takes_steps(site, draft) else None)
            if site.penalty is not None:
                result = with_penalty(site, result, self.penalty, draft)
                self._say_penalty(site, log)
            if rate is not None:
                drop_gradient(draft, site.gradient)
                if self.table_decay:
                    draft.set_decay(site.parameter, self.table_decay)
                if self.table_decay and not result.dense:
                    result, rate = with_decay(site, result, rate, self.table_decay, draft)
                write_table(site, result, rate, draft, decay=self.table_decay)
            else:
                self._hand_out(site, result, draft)
        log.count("tables")

    def _say_tied(self, site: Site, preset: Preset, log: Log) -> None:
        """Say what is not as good as it could be about a tied table."""
        use, name = site.dense_uses[0], site.parameter
        if self.tied == "auto" and not site.projections:
            log.info(
                f"'{name}' is tied to {use.op} '{use.output}', whose part of the gradient is no product of "
                "two tensors: statistics are of the lookups alone"
            )
        if preset.diverges_on_tied:
            log.warning(
                f"'{name}' is tied to {use.op} '{use.output}', and preset '{preset.name}' can diverge on "
                f"tied tables, as its steps follow the size of gradients: use preset {_STEADY}"
            )

    def _say_penalty(self, site: Site, log: Log) -> None:
        what = "looked-up rows" if self.penalty == "rows" else f"all {site.vocab_size} rows"
        names = ", ".join(f"{use.op} '{use.output}'" for use in site.penalties)
        cost = "" if self.penalty == "rows" else ", which every step then reads and writes"
        log.warning(
            f"the penalty of '{site.parameter}' ({names}) goes past the block: plain gradient descent on "
            f"{what}{cost}"
        )

    def _block(self, site: Site, collection: LayerCollection, scale: ir.Value | None) -> FisherBlock:
        """Register a table's block, whose factors take in the lookups of the step."""
        draft = collection.draft
        if site.ids is None or site.rows is None:
            raise AssertionError("find-embeddings marks the ids and rows of every site")
        both = () if self.tied == "lookup" else site.projections
        uses = len(site.uses) + len(both) if self.uses == "multi-indep" else 1
        block = (
            EmbeddingKFACFB(collection, site.vocab_size)
            if uses == 1
            else EmbeddingKFACMultiIndepFB(collection, site.vocab_size, uses)
        )
        collection.register_block(draft.value(site.parameter), block)
        rows = draft.value(site.rows)
        block.register_additional_minibatch(draft.value(site.ids), rows)
        block.register_step(
            keep=None if site.keep is None else draft.value(site.keep),
            positions=[emit_positions(projection, site, block.place) for projection in both],
            scale=scale,
        )
        block.instantiate_factors([[rows]])
        return block

    def _hand_out(self, site: Site, result: RowUpdate, draft: Draft) -> None:
        """Give the preconditioned gradient to whoever takes the gradient in the exporter's graph."""
        pair = row_gradient_of(draft.model, site.parameter)
        update = host_update_of(draft.model, site.parameter)
        if pair is not None:
            replace_rows(pair, result, draft)
        elif update is None:
            self._replace_gradient(site, result, draft)
        else:
            source = draft.value(update.source)
            gradient = None if update.rows else self._replace_gradient(site, result, draft)
            replace_source(update, source, site, result, gradient, draft)

    def _replace_gradient(self, site: Site, result: RowUpdate, draft: Draft) -> ir.Value:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        if site.gradient is None:
            raise AssertionError("find-embeddings accepts no table without a gradient")
        table = result.update
        if result.ids is not None:
            (table,) = draft.op(
                "ScatterRows",
                [result.ids, result.update],
                [Out("preconditioned", FLOAT, [site.vocab_size, site.embedding_dim])],
                Phase.PRECONDITION,
                vocab_size=site.vocab_size,
            )
        table = from_rows(emit, table, site)
        old = draft.value(site.gradient)
        old_name = site.gradient
        old.name = emit.unique_name(f"{old_name}.unconditioned")
        cast = ir.DataType.FLOAT if old.dtype is None else old.dtype
        new = emit.node("Cast", [table], attributes={"to": cast}, name=old_name, dtype=cast, shape=old.shape)
        new.name = old_name
        outputs = draft.model.graph.outputs
        for index, value in enumerate(outputs):
            if value is old:
                outputs[index] = new
        draft.remember(new, old)
        return new

    def _chosen(self, model: ir.Model, sites: list[Site]) -> list[Site]:
        """Return the tables that `only` names; all of them if it names none."""
        if not self.only:
            return sites
        names = [item.name for item in metadata.read_list(model, "parameters", Parameter)]
        only = chosen(names, self.only, context=self.name)
        tables = {site.parameter for site in metadata.read_list(model, "sites", Site)}
        others = sorted(only - tables)
        if others:
            raise UserError(
                f"'{others[0]}' is no embedding table, and preset '{self.preset}' is for tables",
                context=self.name,
                help="`scan MODEL` lists the tables; `why MODEL PARAM` says why a parameter is none",
            )
        return [site for site in sites if site.parameter in only]

    def _trained_sites(
        self, model: ir.Model, done: Collection[str | None]
    ) -> tuple[list[Site], list[Refusal]]:
        """Return the tables that get a block and those that do not, which the user allowed.

        `done` are the parameters that have an optimizer already.
        """
        sites = metadata.read_list(model, "sites", Site)
        refused = metadata.read_list(model, "refused", Refusal)
        for site in [site for site in sites if site.dense is not None]:
            use = site.dense_uses[0]
            if self.tied == "refuse":
                name = site.parameter
                reason = (
                    f"it is tied: {use.op} '{use.output}' uses the whole table too, and tied=refuse is set"
                )
                remedy = f"set tied=lookup or tied=both, or leave it to --rest: allow-fallback={name}"
                refused.append(Refusal(name, f"{name} -> {use.output}", reason, remedy))
                sites.remove(site)
            elif self.tied == "both" and not site.projections and site.parameter not in done:
                raise UserError(
                    f"tied=both needs the statistics of {use.op} '{use.output}', which also uses "
                    f"'{site.parameter}', and its part of the gradient is no product of two tensors",
                    context=self.name,
                    help="set tied=lookup; `why` says what was tried",
                )
        for site in [site for site in sites if site.penalty is not None]:
            use = site.penalties[0]
            if self.penalty == "refuse":
                name = site.parameter
                reason = f"{use.op} '{use.output}' is a penalty on the whole table, and penalty=refuse is set"
                remedy = f"set penalty=all, or leave it to --rest: allow-fallback={name}"
                refused.append(Refusal(name, f"{name} -> {use.output}", reason, remedy))
                sites.remove(site)
            elif self.penalty == "rows" and site.decay is None:
                raise UserError(
                    f"penalty=rows needs a penalty whose gradient is a number times '{site.parameter}', such "
                    f"as a sum of squares; {use.op} '{use.output}' is another",
                    context=self.name,
                    help="set penalty=all, which applies its gradient to all rows",
                )
        self._check(model, sites, refused)
        return sites, refused

    def _check(self, model: ir.Model, sites: list[Site], refused: list[Refusal]) -> None:
        present = set(values_by_name(model))
        for name in self.allow_fallback:
            known = [item.parameter for item in refused]
            if name not in known:
                near = did_you_mean(name, known)
                raise UserError(
                    f"allow-fallback names '{name}', which was not refused{near}",
                    help="`scan MODEL` lists the refused parameters",
                )
        for item in refused:
            if item.parameter in present and item.parameter not in self.allow_fallback:
                raise UserError(
                    f"parameter '{item.parameter}' is used in a way that no block covers: {item.reason}",
                    path=item.path,
                    context=self.name,
                    help=item.remedy,
                )
        if not sites and not self.allow_fallback:
            raise UserError(
                "the graph has no embedding table: no operator looks up rows of a trained parameter",
                context=self.name,
                help="`scan MODEL` lists the trained parameters, `why MODEL PARAM` what was tried for one",
            )
