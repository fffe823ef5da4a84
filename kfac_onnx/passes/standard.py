"""The options of a transformation, and the pipeline that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET
from kfac_onnx.passes.rules import LAYERS, METHODS, REST, rule_passes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kfac_onnx.pipeline.log import Log
    from kfac_onnx.pipeline.pipeline import Trace

__all__ = ["BLOCK", "OPTIMIZER", "PLAIN", "TransformOptions"]

PLAIN: Final = tuple(f"plain-{method}" for method in METHODS if method != "adamw")
"""Presets that train the tables with an ordinary optimizer, for comparison."""
BLOCK: Final = (
    "damping",
    "decay_a",
    "decay_g",
    "refresh_every",
    "g_rows",
    "g_every",
    "uses",
    "tied",
    "penalty",
)
"""Options of `insert-embedding-kfac` that have its own default where they are None."""
OPTIMIZER: Final = ("weight_decay", "beta1", "beta2", "epsilon")
"""Options of the `insert-optimizer` of the other parameters, likewise."""


@dataclass(frozen=True, kw_only=True)
class TransformOptions:
    """What a training graph is transformed into.

    Args:
        preset: one of `kfac_onnx.fisher.PRESETS`, or `plain-sgd`, `plain-momentum`, `plain-adam`,
            `plain-adagrad` for the tables too.
        lr: learning rate of the tables; the preset's own if None.
        rest: optimizer of the other parameters: sgd, momentum, adam, adamw or adagrad; or muon or kfac:
            Muon or K-FAC on hidden matrices, the block of output tables on those, adamw on all else.
        rest_lr: learning rate of the other parameters.
        hidden_lr, output_lr: muon, kfac: learning rates of the hidden matrices, and of the output tables.
        weight_decay: decoupled decay of the other parameters' matrices; 0.01 with adamw, muon, kfac, else 0.
        table_decay: decoupled decay of the tables' rows in each step, made up when a row is looked up; none
            if None.
        beta1, beta2, epsilon: of the other parameters' optimizer; its own if None.
        clip_norm: the largest global norm of all gradients together.
        clip_value: the largest absolute entry of a gradient.
        rules: optimizers of single parameters, `PATTERN=optimizer{option=value,...}`; the last match wins.
        shape: `rows` (tables updated in place) or `dense` (gradients replaced under their own names).
        target: `cpu` or `cuda`: where the written model runs unaided.
        deterministic: target cuda: sum rows in one order, so that every run gives the same bits.
        damping, decay_a, decay_g, refresh_every, g_rows, g_every, uses, tied, penalty: of the block
            (`insert-embedding-kfac`); the preset's own if None.
        grad_scale: the number of examples that a mean loss divides by, for presets that need it.
        allow_fallback: refused tables that the ordinary optimizer may train.
        padding_idx: table to the row that is padding, where the exporter lost it: not counted, not updated.
        pipeline: a textual pipeline that replaces all of the above.
        parameters: values to store in the model: of parameters, and of constants, which leave the batch.
        initialize: start from what the file's own initialization (`training_info`) gives, instead of the
            values that are stored; `parameters` come on top of it.
        loss: the scalar output that is the loss, where several qualify.
        gradients: parameter name to the output that is its gradient, where names do not tell.
        log: receives what the passes say.
        trace: what is checked and shown between passes; those after reading are always checked.

    Raises:
        UserError: an unknown preset or optimizer, or an option that the preset does not have.

    """

    preset: str = DEFAULT_PRESET
    lr: float | None = None
    rest: str = "adam"
    rest_lr: float | None = None
    hidden_lr: float | None = None
    output_lr: float | None = None
    weight_decay: float | None = None
    table_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    rules: tuple[str, ...] = ()
    shape: str = "rows"
    target: str = "cpu"
    deterministic: bool = False
    damping: float | None = None
    decay_a: float | None = None
    decay_g: float | None = None
    refresh_every: int | None = None
    g_rows: int | None = None
    g_every: int | None = None
    uses: str | None = None
    tied: str | None = None
    penalty: str | None = None
    grad_scale: float | None = None
    allow_fallback: tuple[str, ...] = ()
    padding_idx: Mapping[str, int] | None = None
    pipeline: str | None = None
    parameters: Mapping[str, Any] | None = None
    initialize: bool = False
    loss: str | None = None
    gradients: Mapping[str, str] | None = None
    log: Log | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        from kfac_onnx.fisher.presets import PRESETS  # slow to load, and `BLOCK` is read by each verb

        presets = (*PRESETS, *PLAIN)
        if self.preset not in presets:
            raise UserError(
                f"unknown preset '{self.preset}'{did_you_mean(self.preset, presets)}",
                help="the presets are: " + ", ".join(presets),
            )
        if self.rest not in REST:
            raise UserError(
                f"unknown optimizer '{self.rest}'{did_you_mean(self.rest, REST)}",
                help="the optimizers are: " + ", ".join(REST),
            )
        if self.rest not in LAYERS and (self.hidden_lr is not None or self.output_lr is not None):
            name = "hidden_lr" if self.hidden_lr is not None else "output_lr"
            raise UserError(
                f"{name} belongs to rest=muon and rest=kfac, and the rest is trained by {self.rest}",
                help="set rest=muon or rest=kfac, or give rest_lr",
            )
        if self.shape == "dense":
            given = [
                name
                for name in ("hidden_lr", "output_lr", "table_decay", *OPTIMIZER, "rules")
                if getattr(self, name) not in (None, ())
            ]
            if given:
                raise UserError(
                    f"shape=dense inserts no optimizer, so {given[0]} cannot be set",
                    help="leave it to the optimizer that takes the gradients, or set shape=rows",
                )
        for name in self._block_options() if self.preset in PLAIN else ():
            raise UserError(
                f"preset '{self.preset}' has no K-FAC block, so {name} cannot be set",
                help="the presets with a block are: " + ", ".join(PRESETS),
            )

    def _block_options(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in BLOCK}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def text(self) -> str:
        """The textual pipeline: `pipeline`, or that of the other options.

        Raises UserError for a setting that is out of range.
        """
        if self.pipeline:
            return self.pipeline
        from kfac_onnx.passes.clip_gradients import ClipGradients
        from kfac_onnx.passes.find_embeddings import FindEmbeddings
        from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac
        from kfac_onnx.passes.insert_layer_kfac import InsertLayerKfac
        from kfac_onnx.passes.insert_muon import InsertMuon
        from kfac_onnx.passes.insert_optimizer import InsertOptimizer
        from kfac_onnx.passes.insert_output_rows import InsertOutputRows
        from kfac_onnx.passes.lower import Lower

        padding = tuple(f"{name}={row}" for name, row in (self.padding_idx or {}).items())
        passes: list[object] = [FindEmbeddings(padding=padding)]
        if self.clip_norm is not None or self.clip_value is not None:
            passes.append(ClipGradients(norm=self.clip_norm, value=self.clip_value))
        ruled = rule_passes(self.rules)
        by_role = (InsertMuon, InsertLayerKfac, InsertOutputRows)
        if self.rest in LAYERS or any(isinstance(item, by_role) for item in ruled):
            passes.append("classify")
        passes += ruled
        if self.preset in PLAIN:
            passes.append(
                InsertOptimizer(
                    method=cast("Any", self.preset.removeprefix("plain-")),  # checked above
                    parameters="tables",
                    table_decay=self.table_decay or 0.0,
                    **_rate(self.lr),
                )
            )
        else:
            passes.append(
                InsertEmbeddingKfac(
                    preset=cast("Any", self.preset),
                    lr=self.lr,
                    grad_scale=self.grad_scale,
                    shape=cast("Literal['rows', 'dense']", self.shape),  # the option checks it
                    table_decay=self.table_decay or 0.0,
                    allow_fallback=self.allow_fallback,
                    **self._block_options(),
                )
            )
        if self.shape == "rows":
            if self.rest in LAYERS:
                hidden = InsertMuon if self.rest == "muon" else InsertLayerKfac
                passes.append(hidden(**_rate(self.hidden_lr)))
                passes.append(InsertOutputRows(**_rate(self.output_lr)))
            method = "adamw" if self.rest in LAYERS else self.rest
            own = {name: getattr(self, name) for name in OPTIMIZER if getattr(self, name) is not None}
            passes.append(InsertOptimizer(method=cast("Any", method), **_rate(self.rest_lr), **own))
        passes += ["close-step", "dce"]
        target = cast("Literal['cpu', 'cuda']", self.target)
        passes.append(Lower(target=target, deterministic=self.deterministic))
        return ",".join(map(str, passes))


def _rate(lr: float | None) -> dict[str, Any]:
    """Return a learning rate as an option; without one the pass has its own."""
    return {} if lr is None else {"lr": lr}
