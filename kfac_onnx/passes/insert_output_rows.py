"""The pass that gives output tables their block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.fisher.damping import Relative
from kfac_onnx.fisher.layer_collection import LayerCollection
from kfac_onnx.fisher.output_rows import OutputRowSettings
from kfac_onnx.fisher.presets import find_preset
from kfac_onnx.fisher.settings import Average
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.graph.values import rank_of, static_shape
from kfac_onnx.metadata import Parameter, Phase, Role
from kfac_onnx.passes.find_embeddings import values_by_name
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET
from kfac_onnx.passes.insertion.writing import as_float32, drop_gradient, keep_parameter
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.patterns import chosen
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import FLOAT, Draft

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["InsertOutputRows"]


@register
@dataclass(frozen=True, kw_only=True)
class InsertOutputRows(Pass):
    """Insert the block of every output table that has no optimizer yet: full A, and a scale of each row.

    Reads   the roles left by `classify`, and what earlier passes already update.
    Adds    state kfac/<table>/A         float32[n, n]  average of hᵀh/N over the table's inputs h
            state kfac/<table>/root      float32[n, n]  (A + damping)^(−1/2) as of the last refresh
            state kfac/<table>/momentum  float32[C, n]  of the gradient times the root
            state kfac/<table>/window    float32[C]     of the mean squares of its rows
    Bias    a trained vector that is added to the table's products alone is its last column.
    Source  Martens & Grosse 2015, section 3, https://arxiv.org/abs/1503.05671; docs/mathematics.md
    """

    name: ClassVar[str] = "insert-output-rows"
    lr: float = opt(0.016, "learning rate: near 1.6 times the table's tuned Adam rate", lo=0.0)
    momentum: float = opt(0.9, "weight kept from the old momentum", lo=0.0, hi=0.9999999)
    window: float = opt(0.8, "power p of the window 1 - t^-p over a row's mean squares", lo=1e-3, hi=1.0)
    damping: float = opt(0.01, "share of A's mean eigenvalue that is added to all", lo=1e-30)
    decay: float = opt(0.95, "weight kept from the old A at each update", lo=0.0, hi=0.9999999)
    refresh_every: int = opt(10, "committed steps between refreshes of the root", lo=1)
    only: tuple[str, ...] = opt((), "patterns of the matrices that get it; the output tables if none")
    rate: str = opt("kfac/output_lr", "name of the learning-rate input")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError where `classify` has not run, for a pattern that matches no parameter, and for a
        parameter asked for by pattern that multiplies no activations in one product.
        """
        if "kfac.roles" not in model.metadata_props:
            raise UserError(
                "insert-output-rows needs to know which matrices are output tables",
                context=self.name,
                help="put classify before it: find-embeddings,classify,...,insert-output-rows",
            )
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        collection = LayerCollection(preset=find_preset(DEFAULT_PRESET), draft=draft)
        for role in self._tables(model, draft):
            self._insert(model, role, collection)
            log.count("output tables")
        draft.save()
        return emitter.changes

    def _tables(self, model: ir.Model, draft: Draft) -> list[Role]:
        done = {state.parameter for state in draft.states if state.role == "parameter"}
        roles = metadata.read_list(model, "roles", Role)
        only = chosen([role.parameter for role in roles], self.only, context=self.name)
        for role in roles:
            if role.parameter in only and role.activations is None:
                raise UserError(
                    f"'{role.parameter}' cannot be an output table: it is of the role '{role.kind}', and no "
                    f"single product with activations reads it ({role.reason})",
                    context=self.name,
                    help="leave it to another optimizer: `scan MODEL` lists the roles",
                )
        wanted = [
            role for role in roles if role.parameter in only or (not self.only and role.kind == "output")
        ]
        return [role for role in wanted if role.parameter not in done and role.activations is not None]

    def _insert(self, model: ir.Model, role: Role, collection: LayerCollection) -> None:
        draft = collection.draft
        gradients = {item.name: item.gradient for item in metadata.read_list(model, "parameters", Parameter)}
        rate = draft.learning_rate(self.rate, self.lr)
        weight = draft.value(role.parameter)
        done = {state.parameter for state in draft.states if state.role == "parameter"}
        bias = role.bias if role.bias not in done and gradients.get(role.bias or "") is not None else None
        with draft.at(draft.emitter.derive(site=role.parameter)):
            emit = draft.emitter.derive(phase=Phase.GRADIENTS)
            inputs = _features(emit, draft.value(role.activations or ""), role, bias is not None)
            gradient = _rows_of_classes(emit, draft.value(gradients[role.parameter] or ""), role)
            draft.flag(gradient)
            parts = [gradient]
            if bias is not None:
                parts.append(_column(emit, draft.value(gradients[bias] or "")))
            classes, features = static_shape(gradient) or (0, 0)
            if bias is not None:
                shape = [classes, features + 1]
                gradient = emit.node(
                    "Concat", parts, attributes={"axis": 1}, name="gradient", dtype=FLOAT, shape=shape
                )
            block = collection.register_softmax_output(
                weight if bias is None else (weight, draft.value(bias)),
                inputs,
                draft.value(role.activations or ""),
                num_classes=classes,
                settings=OutputRowSettings(
                    average=Average(decay=self.decay),
                    damping=Relative(self.damping),
                    momentum=self.momentum,
                    window=self.window,
                    refresh_every=self.refresh_every,
                ),
            )
            block.instantiate_factors([])
            update = block.update(gradient).update
            for name in (role.parameter, *([] if bias is None else [bias])):
                drop_gradient(draft, gradients[name])
            self._write(draft, role, bias, update, rate, features)

    def _write(
        self, draft: Draft, role: Role, bias: str | None, update: ir.Value, rate: ir.Value, features: int
    ) -> None:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        classes = (static_shape(update) or (0,))[0]
        if bias is not None:
            sizes = emit.constant(np.asarray([features, 1], np.int64), "sizes")
            outs = [Out("update", FLOAT, [classes, features]), Out("bias_update", FLOAT, [classes, 1])]
            update, column = emit.node("Split", [update, sizes], attributes={"axis": 1}, outputs=outs)
            flat = emit.constant(np.asarray([classes], np.int64), "classes")
            vector = emit.node("Reshape", [column, flat], name="bias_update", dtype=FLOAT, shape=[classes])
            self._step(draft, bias, vector, rate)
        if role.rows != (0,):
            perm = {"perm": [1, 0]}
            update = emit.node(
                "Transpose", [update], attributes=perm, name="update", dtype=FLOAT, shape=[features, classes]
            )
        self._step(draft, role.parameter, update, rate)

    def _step(self, draft: Draft, name: str, update: ir.Value, rate: ir.Value) -> None:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        weight = draft.parameter(name)
        inputs = [as_float32(emit, weight, "W"), update, rate]
        (new,) = draft.op("Sgd", inputs, [Out("new", FLOAT, weight.shape)], Phase.PRECONDITION)
        draft.flag(new)
        keep_parameter(draft, weight, new)


def _features(emit: Emitter, value: ir.Value, role: Role, ones: bool) -> ir.Value:
    """Return what a matrix multiplies as rows float32[N, n], or [N, n + 1] with a column of ones."""
    value = as_float32(emit, value, "h")
    shape, rank = value.shape, rank_of(value)
    if shape is None or rank is None or not isinstance(shape[role.features], int):
        raise UserError(
            f"'{role.parameter}' multiplies '{value.name}', whose number of features is not known",
            context=InsertOutputRows.name,
            help="leave the matrix to another optimizer, or export the graph with fixed sizes of layers",
        )
    width = int(str(shape[role.features]))
    axis = role.features % rank
    if axis != rank - 1:
        order = [*(other for other in range(rank) if other != axis), axis]
        value = emit.node("Transpose", [value], attributes={"perm": order}, name="h", dtype=FLOAT)
    if rank != 2:
        target = emit.constant(np.asarray([-1, width], np.int64), "rows_of_features")
        value = emit.node("Reshape", [value, target], name="h", dtype=FLOAT, shape=[None, width])
    if not ones:
        return value
    pads = emit.constant(np.asarray([0, 0, 0, 1], np.int64), "one_column")
    one = emit.constant(np.float32(1.0), "one")
    return emit.node("Pad", [value, pads, one], name="h_and_ones", dtype=FLOAT, shape=[None, width + 1])


def _rows_of_classes(emit: Emitter, gradient: ir.Value, role: Role) -> ir.Value:
    """Return the gradient of a matrix as float32[C, n], however it is stored."""
    gradient = as_float32(emit, gradient, "g")
    if role.rows == (0,):
        return gradient
    n, C = static_shape(gradient) or (0, 0)
    return emit.node(
        "Transpose", [gradient], attributes={"perm": [1, 0]}, name="g", dtype=FLOAT, shape=[C, n]
    )


def _column(emit: Emitter, gradient: ir.Value) -> ir.Value:
    """Return the gradient of a bias [C] as float32[C, 1]."""
    axis = emit.constant(np.asarray([1], np.int64), "last_axis")
    size = (static_shape(gradient) or (0,))[0]
    value = as_float32(emit, gradient, "bias_gradient")
    return emit.node("Unsqueeze", [value, axis], name="bias_gradient", dtype=FLOAT, shape=[size, 1])
