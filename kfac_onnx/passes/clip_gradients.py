"""The pass that bounds gradients before anything is made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.metadata import HostUpdate, Parameter, Phase, Refusal, Site
from kfac_onnx.passes.find_embeddings import values_by_name
from kfac_onnx.passes.insertion.writing import as_float32
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import FLOAT, INT64, Draft

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["ClipGradients"]

# What keeps the division finite where every gradient is zero; the same as in torch.nn.utils.clip_grad_norm_.
_TINY = 1e-6


@register
@dataclass(frozen=True, kw_only=True)
class ClipGradients(Pass):
    """Clip gradients by value or by their global norm, before factors and optimizers read them.

    Reads   the sites left by `find-embeddings`, and `kfac.parameters`.
    Norm    g ← g · min(1, c / (‖g‖ + 1e-6)), ‖g‖ over all trained tensors together. A table counts by the sum
            of the rows of each id, as its dense gradient would, at the cost of merging the looked-up rows.
    Value   g ← min(max(g, −c), c) entry by entry; of a table, of the sum of the rows of each id, which its
            lookups then share equally. With both, value comes first.
    Adds    float32 scalars and rows; nothing of a table's size. A norm that is not finite skips the step.
    Source  Pascanu et al. 2013, section 3.2, https://arxiv.org/abs/1211.5063
    """

    name: ClassVar[str] = "clip-gradients"
    norm: float | None = opt(None, "the largest global norm c", lo=1e-30)
    value: float | None = opt(None, "the largest absolute entry c", lo=1e-30)

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError where neither norm nor value is given, after a pass that already updates a
        parameter, and for a graph that keeps an optimizer of its own.
        """
        if self.norm is None and self.value is None:
            raise UserError("clip-gradients has nothing to do", help="give it norm=C, value=C, or both")
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        self._check_order(model, draft)
        sites = {site.parameter: site for site in metadata.read_list(model, "sites", Site)}
        for site in sites.values():
            if site.penalty is not None:  # it goes past the block: what bounds the rows would not bound it
                raise UserError(
                    f"clip-gradients cannot bound the penalty of '{site.parameter}'",
                    context=self.name,
                    help="take the penalty out of the graph, or clip in the graph itself",
                )
        refused = {item.parameter for item in metadata.read_list(model, "refused", Refusal)}
        dense: dict[str, ir.Value] = {}
        rows: dict[str, ir.Value] = {}
        for parameter in metadata.read_list(model, "parameters", Parameter):
            site = sites.get(parameter.name)
            known = parameter.name in draft.values and parameter.name not in refused
            if not known or parameter.gradient is None:
                continue
            if site is not None and site.rows is not None:
                rows[parameter.name] = draft.value(site.rows)
            if site is None or site.dense is not None:
                dense[parameter.name] = draft.value(parameter.gradient)
            log.count("gradients")
        bounded = dict(dense), dict(rows)
        if self.value is not None:
            bounded = self._by_value(draft, sites, *bounded)
        if self.norm is not None:
            bounded = self._by_norm(draft, sites, *bounded)
        for name, new in bounded[0].items():
            _replace_gradient(draft, dense[name], new)
        for name, new in bounded[1].items():
            sites[name] = replace(sites[name], rows=str(new.name))
        if bounded[1]:
            emitter.metadata("sites", list(sites.values()))
        draft.save()
        return emitter.changes

    def _check_order(self, model: ir.Model, draft: Draft) -> None:
        if draft.states or metadata.read(model, "step", metadata.Step) is not None:
            raise UserError(
                "clip-gradients comes after a pass that already reads the gradients",
                context=self.name,
                help="put it right after find-embeddings: find-embeddings,clip-gradients{norm=1},...",
            )
        if metadata.read_list(model, "updates", HostUpdate):
            raise UserError(
                "clip-gradients cannot bound what the graph's own optimizer reads",
                context=self.name,
                help="let the graph's optimizer be replaced (shape=rows), or clip in the graph itself",
            )

    def _by_value(
        self,
        draft: Draft,
        sites: dict[str, Site],
        dense: dict[str, ir.Value],
        rows: dict[str, ir.Value],
    ) -> tuple[dict[str, ir.Value], dict[str, ir.Value]]:
        for name, gradient in dense.items():
            emit = draft.emitter.derive(site=name, phase=Phase.GRADIENTS)
            dense[name] = self._clipped(emit, gradient)
        for name, values in rows.items():
            emit = draft.emitter.derive(site=name, phase=Phase.GRADIENTS)
            ids, shape = draft.value(sites[name].ids or ""), [None, sites[name].embedding_dim]
            # Sorting finds the distinct ids once: where each lookup's sum stands, and how many share it.
            _, _, place, count = emit.node(
                "Unique",
                [ids],
                outputs=[
                    Out("unique_ids", INT64, [None]),
                    Out("first", INT64, [None]),
                    Out("place", INT64, [None]),
                    Out("count", INT64, [None]),
                ],
            )
            with draft.at(emit):
                outs = [Out("unique_ids", INT64, [None]), Out("merged", FLOAT, shape)]
                _, merged = draft.op(
                    "MergeRows", [ids, self._counted(draft, sites[name], values)], outs, Phase.GRADIENTS
                )
            bounded = self._clipped(emit, merged)
            sharing = emit.node("Cast", [count], attributes={"to": FLOAT}, name="count", dtype=FLOAT)
            axis = emit.constant(np.asarray([1], np.int64), "last_axis")
            sharing = emit.node("Unsqueeze", [sharing, axis], name="count", dtype=FLOAT, shape=[None, 1])
            share = emit.node("Div", [bounded, sharing], name="share", dtype=FLOAT, shape=shape)
            rows[name] = emit.node("Gather", [share, place], name="rows", dtype=FLOAT, shape=shape)
            draft.remember(rows[name])
        return dense, rows

    def _clipped(self, emit: Emitter, gradient: ir.Value) -> ir.Value:
        dtype = FLOAT if gradient.dtype is None else gradient.dtype
        low, high = (
            emit.constant(np.asarray(bound, dtype.numpy()), "bound")
            for bound in (-(self.value or 0.0), self.value or 0.0)
        )
        return emit.node("Clip", [gradient, low, high], name="clipped", dtype=dtype, shape=gradient.shape)

    def _by_norm(
        self,
        draft: Draft,
        sites: dict[str, Site],
        dense: dict[str, ir.Value],
        rows: dict[str, ir.Value],
    ) -> tuple[dict[str, ir.Value], dict[str, ir.Value]]:
        emit = draft.emitter.derive(phase=Phase.GRADIENTS)
        squares = [
            _squares(emit.derive(site=name), as_float32(emit, value, "g")) for name, value in dense.items()
        ]
        for name in [name for name in rows if name not in dense]:
            site = sites[name]
            with draft.at(emit.derive(site=name)):
                outs = [Out("unique_ids", INT64, [None]), Out("merged", FLOAT, [None, site.embedding_dim])]
                counted = self._counted(draft, site, rows[name])
                _, merged = draft.op(
                    "MergeRows", [draft.value(site.ids or ""), counted], outs, Phase.GRADIENTS
                )
                squares.append(_squares(draft.emitter.derive(phase=Phase.GRADIENTS), merged))
        if not squares:
            return dense, rows
        total = emit.node("Sum", squares, name="squares", dtype=FLOAT, shape=[])
        norm = emit.node("Sqrt", [total], name="norm", dtype=FLOAT, shape=[])
        draft.flag(norm, phase=Phase.PRECONDITION)
        most, tiny, one = (
            emit.constant(np.float32(number), name)
            for number, name in ((self.norm or 0.0, "largest_norm"), (_TINY, "tiny"), (1.0, "one"))
        )
        above = emit.node("Add", [norm, tiny], name="norm", dtype=FLOAT, shape=[])
        share = emit.node("Div", [most, above], name="share", dtype=FLOAT, shape=[])
        scale = emit.node("Min", [share, one], name="scale", dtype=FLOAT, shape=[])
        for values in (dense, rows):
            for name, value in values.items():
                own = emit.derive(site=name)
                factor = scale
                if value.dtype is not None and value.dtype != FLOAT:
                    factor = own.node("Cast", [scale], attributes={"to": value.dtype}, dtype=value.dtype)
                scaled = own.node(
                    "Mul", [value, factor], name="clipped", dtype=value.dtype, shape=value.shape
                )
                draft.remember(scaled)
                values[name] = scaled
        return dense, rows

    def _counted(self, draft: Draft, site: Site, rows: ir.Value) -> ir.Value:
        """Return the rows with zeros where the graph drops a lookup."""
        if site.keep is None:
            return rows
        emit = draft.emitter.derive(site=site.parameter, phase=Phase.GRADIENTS)
        axis = emit.constant(np.asarray([1], np.int64), "last_axis")
        keep = emit.node(
            "Unsqueeze", [draft.value(site.keep), axis], name="keep", dtype=FLOAT, shape=[None, 1]
        )
        return emit.node("Mul", [rows, keep], name="rows", dtype=FLOAT, shape=rows.shape)


def _squares(emit: Emitter, value: ir.Value) -> ir.Value:
    return emit.node(
        "ReduceSumSquare", [value], attributes={"keepdims": 0}, name="squares", dtype=FLOAT, shape=[]
    )


def _replace_gradient(draft: Draft, old: ir.Value, new: ir.Value) -> None:
    """Let the clipped gradient go by the gradient's name, for whoever looks it up by that."""
    name = str(old.name)
    if old.is_graph_input() or old.is_initializer():
        raise UserError(
            f"the gradient '{name}' is an input or a constant of the graph: it cannot be clipped",
            context=ClipGradients.name,
        )
    old.name = draft.emitter.unique_name(f"{name}.unclipped")
    new.name = name
    outputs = draft.model.graph.outputs
    for index, value in enumerate(outputs):
        if value is old:
            outputs[index] = new
    draft.emitter.count(edited=1)
    draft.remember(new, old)
