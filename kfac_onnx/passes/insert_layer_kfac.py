"""The pass that gives hidden matrices and kernels their K-FAC block, both factors full."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.fisher.damping import Pi, Relative
from kfac_onnx.fisher.errors import FisherValueError
from kfac_onnx.fisher.layer_blocks import LayerSettings, Window
from kfac_onnx.fisher.layer_collection import LayerCollection
from kfac_onnx.fisher.presets import find_preset
from kfac_onnx.fisher.settings import Average
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.graph.values import rank_of, static_shape
from kfac_onnx.metadata import Parameter, Phase, Role
from kfac_onnx.passes.find_embeddings import facts_of, values_by_name
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET
from kfac_onnx.passes.insertion.loss_divisor import squared_divisor
from kfac_onnx.passes.insertion.writing import as_float32, drop_gradient, keep_parameter
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.patterns import chosen
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import FLOAT, Draft
from kfac_onnx.tables.layers import layer_uses
from kfac_onnx.tables.pull_back import Miss

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log
    from kfac_onnx.tables.layers import LayerUse

__all__ = ["InsertLayerKfac"]


@dataclass(frozen=True)
class _Layer:
    """A matrix or kernel with its role, all its uses, and the bias that gets a row of the same block."""

    role: Role
    uses: tuple[LayerUse, ...]
    bias: str | None


@register
@dataclass(frozen=True, kw_only=True)
class InsertLayerKfac(Pass):
    """Insert the block of every hidden matrix and kernel that has no optimizer yet: A and G full.

    Reads   the roles left by `classify`, and what earlier passes already update.
    Adds    state kfac/<matrix>/A         float32[n, n]  average of hᵀh/N over all uses' inputs h
            state kfac/<matrix>/G         float32[m, m]  average of gᵀg/N over the gradients of the products
            state kfac/<matrix>/root_A, root_G           their powers as of the last refresh
            state kfac/<matrix>/momentum  float32[n, m]  of the direction
    Bias    a trained vector that is added to the products of one use alone is the last row.
    Source  Martens & Grosse 2015, https://arxiv.org/abs/1503.05671; for kernels Grosse & Martens 2016,
            https://arxiv.org/abs/1602.01407
    """

    name: ClassVar[str] = "insert-layer-kfac"
    lr: float = opt(0.003, "learning rate: near a third of the matrices' tuned Adam rate", lo=0.0)
    power: Literal["half", "whole"] = opt("half", "powers of A and G: half: -1/2; whole: -1, as the original")
    damping: float | None = opt(
        None, "half: share of the mean eigenvalues, 0.01; whole: λ that pi splits, 0.001", lo=1e-30
    )
    momentum: float = opt(0.9, "weight kept from the old momentum", lo=0.0, hi=0.9999999)
    decay: float = opt(0.95, "weight kept from the old factors at each update", lo=0.0, hi=0.9999999)
    refresh_every: int = opt(10, "committed steps between refreshes of the powers", lo=1)
    grad_scale: float | None = opt(None, "whole: what a mean loss divides by, if it is hidden", lo=1e-30)
    only: tuple[str, ...] = opt((), "patterns of the matrices that get it; the hidden ones if none")
    rate: str = opt("kfac/hidden_lr", "name of the learning-rate input")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError where `classify` has not run, for a pattern that matches no parameter, and for a
        matrix whose inputs or gradients the graph does not show.
        """
        if "kfac.roles" not in model.metadata_props:
            raise UserError(
                "insert-layer-kfac needs to know which matrices are hidden",
                context=self.name,
                help="put classify before it: find-embeddings,classify,...,insert-layer-kfac",
            )
        if self.grad_scale is not None and self.power == "half":
            raise UserError(
                "grad-scale has no meaning with power=half, whose update does not depend on it",
                context=self.name,
                help="leave it out, or set power=whole",
            )
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        layers = self._layers(model, draft)
        if layers:
            settings = self._settings(model, emitter, draft)
            collection = LayerCollection(preset=find_preset(DEFAULT_PRESET), draft=draft)
            for layer in layers:
                self._insert(layer, collection, settings, _gradients(model))
                log.count("layers")
            draft.set_optimizer("hidden", "kfac")
        draft.save()
        return emitter.changes

    def _settings(self, model: ir.Model, emitter: Emitter, draft: Draft) -> LayerSettings:
        half = self.power == "half"
        value = self.damping if self.damping is not None else 0.01 if half else 0.001
        scale = None
        if not half:
            subject = f"{self.name} with power=whole"
            scale = squared_divisor(
                model, emitter, draft, divisor=self.grad_scale, subject=subject, context=self.name
            )
        return LayerSettings(
            exponent=-0.5 if half else -1.0,
            # `guarded`: a batch without any gradient would make pi infinite
            damping=Relative(value) if half else Pi(value, "guarded"),
            average=Average(decay=self.decay),
            momentum=self.momentum,
            refresh_every=self.refresh_every,
            scale=scale,
        )

    def _layers(self, model: ir.Model, draft: Draft) -> list[_Layer]:
        done = {state.parameter for state in draft.states if state.role == "parameter"}
        gradients, roles = _gradients(model), metadata.read_list(model, "roles", Role)
        only = chosen([role.parameter for role in roles], self.only, context=self.name)
        facts = facts_of(model, draft.values)
        layers: list[_Layer] = []
        for role in roles:
            gradient, asked = gradients.get(role.parameter), role.parameter in only
            if role.parameter in done or gradient is None:
                continue
            if not asked and (self.only or role.kind != "hidden"):
                continue
            if asked and not role.rows:
                raise UserError(
                    f"'{role.parameter}' cannot have K-FAC of a layer: it is no matrix, but of the role "
                    f"'{role.kind}': {role.reason}",
                    context=self.name,
                    help="leave it to another optimizer: `scan MODEL` lists the roles",
                )
            weight = draft.value(role.parameter)
            uses = layer_uses(role, weight, draft.value(gradient), facts)
            if isinstance(uses, Miss):
                raise UserError(
                    f"'{role.parameter}' cannot have K-FAC of a layer, because the graph does not show what "
                    f"its block needs: {uses.reason}",
                    context=self.name,
                    help=f"give it another optimizer: --rule '{role.parameter}=muon'",
                )
            bias = _bias(role, uses, facts.trained)
            alone = bias is not None and bias not in done and gradients.get(bias) is not None
            layers.append(_Layer(role, uses, bias if alone else None))
        return layers

    def _insert(
        self,
        layer: _Layer,
        collection: LayerCollection,
        settings: LayerSettings,
        gradients: dict[str, str | None],
    ) -> None:
        draft, role, bias = collection.draft, layer.role, layer.bias
        rate = draft.learning_rate(self.rate, self.lr)
        weight = draft.value(role.parameter)
        with draft.at(draft.emitter.derive(site=role.parameter)):
            emit = draft.emitter.derive(phase=Phase.GRADIENTS)
            params = weight if bias is None else (weight, draft.value(bias))
            slopes: list[ir.Value] = []
            block = None
            for use in layer.uses:
                again = block is not None
                if use.convolution is not None:
                    outputs = use.convolution.outputs[0]
                    block = collection.register_conv2d(
                        params, _window(use.convolution, weight), use.inputs, outputs, settings=settings
                    )
                    slopes.append(use.gradient)
                    continue
                inputs = _rows(emit, use.inputs, use.input_axis, "h", role)
                gradient = _rows(emit, use.gradient, use.gradient_axis, "g", role)
                block = collection.register_fully_connected(
                    params, inputs, gradient, reuse=again, settings=settings
                )
                slopes.append(gradient)
            if block is None:
                raise AssertionError("a layer has a use")
            try:
                block.instantiate_factors([slopes])
                matrix = _matrix(emit, draft.value(gradients[role.parameter] or ""), role)
                if bias is not None:
                    row = _bias_row(emit, draft.value(gradients[bias] or ""))
                    n, m = static_shape(matrix) or (0, 0)
                    matrix = emit.node(
                        "Concat",
                        [matrix, row],
                        attributes={"axis": 0},
                        name="gradient",
                        dtype=FLOAT,
                        shape=[n + 1, m],
                    )
                draft.flag(matrix)
                update = block.update(matrix).update
            except FisherValueError as error:
                raise UserError(
                    f"'{role.parameter}' cannot have K-FAC of a layer: {error.message}",
                    context=self.name,
                    help=error.help,
                ) from error
            for name in (role.parameter, *([] if bias is None else [bias])):
                drop_gradient(draft, gradients[name])
            self._write(draft, layer, update, rate)

    def _write(self, draft: Draft, layer: _Layer, update: ir.Value, rate: ir.Value) -> None:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        n, m = static_shape(update) or (0, 0)
        if layer.bias is not None:
            sizes = emit.constant(np.asarray([n - 1, 1], np.int64), "sizes")
            outs = [Out("update", FLOAT, [n - 1, m]), Out("bias_update", FLOAT, [1, m])]
            update, row = emit.node("Split", [update, sizes], attributes={"axis": 0}, outputs=outs)
            flat = emit.constant(np.asarray([m], np.int64), "outputs")
            self._step(
                draft,
                layer.bias,
                emit.node("Reshape", [row, flat], name="bias_update", dtype=FLOAT, shape=[m]),
                rate,
            )
        role = layer.role
        shape = static_shape(draft.value(role.parameter)) or ()
        order = (*role.columns, *role.rows)
        ordered = [shape[axis] for axis in order]
        if tuple(ordered) != static_shape(update):
            target = emit.constant(np.asarray(ordered, np.int64), "ordered_shape")
            update = emit.node("Reshape", [update, target], name="update", dtype=FLOAT, shape=ordered)
        if order != tuple(range(len(order))):
            perm = {"perm": [order.index(axis) for axis in range(len(order))]}
            update = emit.node(
                "Transpose", [update], attributes=perm, name="update", dtype=FLOAT, shape=shape
            )
        self._step(draft, role.parameter, update, rate)

    def _step(self, draft: Draft, name: str, update: ir.Value, rate: ir.Value) -> None:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        weight = draft.parameter(name)
        inputs = [as_float32(emit, weight, "W"), update, rate]
        (new,) = draft.op("Sgd", inputs, [Out("new", FLOAT, weight.shape)], Phase.PRECONDITION)
        draft.flag(new)
        keep_parameter(draft, weight, new)


def _gradients(model: ir.Model) -> dict[str, str | None]:
    return {item.name: item.gradient for item in metadata.read_list(model, "parameters", Parameter)}


def _bias(role: Role, uses: tuple[LayerUse, ...], trained: set[ir.Value]) -> str | None:
    """Return the trained vector that is added to the products of a layer's one use, and used nowhere else."""
    node = uses[0].convolution
    if node is None:
        return role.bias if len(uses) == 1 else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return str(bias.name) if bias is not None and bias in trained and len(bias.uses()) == 1 else None


def _window(node: ir.Node, weight: ir.Value) -> Window:
    kernel = static_shape(weight) or ()
    attributes = node.attributes
    return Window(
        kernel=kernel,
        strides=tuple(attributes.get_ints("strides") or [1] * len(kernel[2:])),
        pads=tuple(attributes.get_ints("pads") or ()) or None,
        dilations=tuple(attributes.get_ints("dilations") or ()) or None,
        auto_pad=attributes.get_string("auto_pad", "NOTSET"),
    )


def _rows(emit: Emitter, value: ir.Value, axis: int, name: str, role: Role) -> ir.Value:
    """Return a tensor as rows float32[N, features], its features along `axis`."""
    value = as_float32(emit, value, name)
    shape, rank = value.shape, rank_of(value)
    if shape is None or rank is None or not isinstance(shape[axis], int):
        raise UserError(
            f"'{role.parameter}' multiplies or makes '{value.name}', whose number of features is not known",
            context=InsertLayerKfac.name,
            help="leave the matrix to another optimizer, or export the graph with fixed sizes of layers",
        )
    width = int(str(shape[axis]))
    axis %= rank
    if axis != rank - 1:
        order = [*(other for other in range(rank) if other != axis), axis]
        value = emit.node("Transpose", [value], attributes={"perm": order}, name=name, dtype=FLOAT)
    if rank != 2 or axis != rank - 1:
        target = emit.constant(np.asarray([-1, width], np.int64), "rows_of_features")
        value = emit.node("Reshape", [value, target], name=name, dtype=FLOAT, shape=[None, width])
    return value


def _matrix(emit: Emitter, gradient: ir.Value, role: Role) -> ir.Value:
    """Return the gradient of a matrix or kernel as float32[inputs, outputs], however it is stored."""
    value = as_float32(emit, gradient, "dW")
    shape = static_shape(gradient) or ()
    order = (*role.columns, *role.rows)
    ordered = [shape[axis] for axis in order]
    if order != tuple(range(len(order))):
        value = emit.node(
            "Transpose", [value], attributes={"perm": list(order)}, name="dW", dtype=FLOAT, shape=ordered
        )
    size = [math.prod(shape[axis] for axis in axes) for axes in (role.columns, role.rows)]
    if ordered != size:
        target = emit.constant(np.asarray(size, np.int64), "matrix_shape")
        value = emit.node("Reshape", [value, target], name="dW", dtype=FLOAT, shape=size)
    return value


def _bias_row(emit: Emitter, gradient: ir.Value) -> ir.Value:
    """Return the gradient of a bias [m] as float32[1, m]."""
    axis = emit.constant(np.asarray([0], np.int64), "first_axis")
    size = (static_shape(gradient) or (0,))[0]
    value = as_float32(emit, gradient, "bias_gradient")
    return emit.node("Unsqueeze", [value, axis], name="bias_gradient", dtype=FLOAT, shape=[1, size])
