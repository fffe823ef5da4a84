"""What users call from Python: `scan`, `transform`, `why` and `save` (DESIGN section 9)."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfac_onnx import metadata
from kfac_onnx.errors import NoGradientsError, UserError, did_you_mean
from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.metadata import Loss, Parameter, Refusal, Site
from kfac_onnx.reports.why import Verdicts, why

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    import onnx
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

    Source = str | Path | ir.Model | onnx.ModelProto

__all__ = [
    "PLAIN",
    "Report",
    "Verdicts",
    "collector_paused",
    "pipeline_text",
    "save",
    "scan",
    "transform",
    "why",
]

PLAIN = ("plain-sgd", "plain-momentum", "plain-adam", "plain-adagrad")
"""Presets that train the tables with an ordinary optimizer, for comparison."""


@dataclass(frozen=True)
class Report:
    """What `scan` found: sites, refusals, the loss, and every input by its kind."""

    frontend: str
    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    loss: str | None
    reduction: str
    batch_inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    notes: tuple[str, ...]
    trainable: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data (the contract of DESIGN section 9)."""
        return {
            "trainable": self.trainable,
            "sites": [_site_json(site) for site in self.sites],
            "refused": [asdict(item) for item in self.refused],
            "loss": self.loss,
            "reduction": self.reduction,
            "batch_inputs": list(self.batch_inputs),
            "parameters": [
                {"name": item.name, "shape": list(item.shape), "gradient": item.gradient}
                for item in self.parameters
            ],
            "frontend": self.frontend,
            "notes": list(self.notes),
        }


def _site_json(site: Site) -> dict[str, Any]:
    names = ("parameter", "vocab_size", "embedding_dim", "dtype", "layout", "padding_idx", "gradient")
    data: dict[str, Any] = {name: getattr(site, name) for name in names}
    data["uses"] = [asdict(use) for use in site.uses]
    data["dense_uses"] = [{"op": use.op, "output": use.output} for use in site.dense_uses]
    return data


def _canonical(
    source: Source, loss: str | None, gradients: Mapping[str, str] | None, *, keep_optimizer: bool = False
) -> ir.Model:
    from kfac_onnx.readers import read_training_graph

    return read_training_graph(source, loss=loss, gradients=gradients, keep_optimizer=keep_optimizer)


@blames_the_graph
def scan(source: Source, *, loss: str | None = None, gradients: Mapping[str, str] | None = None) -> Report:
    """Return the embedding tables of a training graph and what was refused, with reasons.

    A graph without gradients is read too: its tables are listed with `trainable` false.

    Args:
        source: a file, or a model already read.
        loss: the scalar output that is the loss, where several qualify.
        gradients: parameter name to the output that is its gradient, where names do not tell.

    Raises:
        UserError: the file is not a model, or holds something that cannot be read.

    """
    from kfac_onnx.passes.find_embeddings import find_tables
    from kfac_onnx.readers import read_forward_graph
    from kfac_onnx.tables.untrained import forward_tables

    try:
        model = _canonical(source, loss, gradients)
    except NoGradientsError as e:
        model = read_forward_graph(source)
        reason = e.message if e.help is None else f"{e.message}: {e.help}"
        metadata.write(model, "notes", [*metadata.read_strings(model, "notes"), reason])
    trainable = model.metadata_props.get("kfac.frontend") != "forward"
    parameters = metadata.read_list(model, "parameters", Parameter)
    found_loss = metadata.read(model, "loss", Loss)
    refused = metadata.read_list(model, "refused", Refusal)
    if trainable:
        verdicts = find_tables(model)
        sites = [item.site.describe() for item in verdicts if item.site is not None]
        refused += [item.refusal for item in verdicts if item.refusal is not None]
    else:
        sites = forward_tables(model)
    names = {item.name for item in parameters} | {site.parameter for site in sites}
    return Report(
        frontend=model.metadata_props.get("kfac.frontend", ""),
        sites=tuple(sites),
        refused=tuple(refused),
        loss=None if found_loss is None else found_loss.value,
        reduction="unknown" if found_loss is None else found_loss.reduction,
        batch_inputs=tuple(
            str(value.name)
            for value in model.graph.inputs
            if value.name not in names and value.name not in model.graph.initializers
        ),
        parameters=tuple(parameters),
        notes=tuple(metadata.read_strings(model, "notes")),
        trainable=trainable,
    )


def pipeline_text(
    *,
    preset: str = "half",
    lr: float | None = None,
    rest: str = "adam",
    rest_lr: float | None = None,
    shape: str = "rows",
    target: str = "cpu",
    deterministic: bool = False,
    grad_scale: float | None = None,
    allow_fallback: tuple[str, ...] = (),
    padding_idx: Mapping[str, int] | None = None,
    **options: float | int | str | None,
) -> str:
    """Return the textual pipeline that `transform` runs for these settings.

    `options` are those of `insert-embedding-kfac`: damping, decay_a, decay_g, refresh_every, g_rows,
    g_every, uses, tied.

    Raises UserError for an unknown preset or optimizer, or a setting out of range.
    """
    from kfac_onnx.passes.find_embeddings import FindEmbeddings
    from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac
    from kfac_onnx.passes.insert_optimizer import InsertOptimizer
    from kfac_onnx.pipeline.registry import pass_class

    known = (*PRESETS, *PLAIN)
    if preset not in known:
        raise UserError(
            f"unknown preset '{preset}'{did_you_mean(preset, known)}",
            help="the presets are: " + ", ".join(known),
        )
    methods = ("sgd", "momentum", "adam", "adagrad")
    if rest not in methods:
        raise UserError(
            f"unknown optimizer '{rest}'{did_you_mean(rest, methods)}",
            help="the optimizers are: " + ", ".join(methods),
        )
    padding = tuple(f"{name}={row}" for name, row in (padding_idx or {}).items())
    steps = [str(FindEmbeddings(padding=padding))]
    others: dict[str, Any] = {} if rest_lr is None else {"lr": rest_lr}
    if preset in PLAIN:
        for name in (name for name, value in options.items() if value is not None):
            raise UserError(
                f"preset '{preset}' has no K-FAC block, so {name} cannot be set",
                help="the presets with a block are: " + ", ".join(PRESETS),
            )
        rates: dict[str, Any] = {} if lr is None else {"lr": lr}
        method: Any = preset.removeprefix("plain-")
        steps.append(str(InsertOptimizer(method=method, parameters="tables", **rates)))
    else:
        steps.append(
            str(
                InsertEmbeddingKfac(
                    preset=preset,  # pyright: ignore[reportArgumentType]  checked above
                    lr=lr,
                    grad_scale=grad_scale,
                    shape=shape,  # pyright: ignore[reportArgumentType]  checked by the option
                    allow_fallback=allow_fallback,
                    **options,  # pyright: ignore[reportArgumentType]  checked by the options
                )
            )
        )
    if shape == "rows":
        chosen: Any = rest
        steps.append(str(InsertOptimizer(method=chosen, **others)))
    steps += ["close-step", "dce"]
    steps.append(str(pass_class("lower")(target=target, deterministic=deterministic)))  # pyright: ignore[reportCallIssue]
    return ",".join(steps)


@blames_the_graph
def transform(
    source: Source,
    *,
    preset: str = "half",
    lr: float | None = None,
    rest: str = "adam",
    rest_lr: float | None = None,
    shape: str = "rows",
    target: str = "cpu",
    deterministic: bool = False,
    pipeline: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
    grad_scale: float | None = None,
    allow_fallback: tuple[str, ...] = (),
    padding_idx: Mapping[str, int] | None = None,
    initialize: bool = False,
    log: Log | None = None,
    **options: float | int | str | None,
) -> ir.Model:
    """Return a training graph as one model that is a whole preconditioned training step.

    Args:
        source: a file, or a model already read (which is not changed).
        preset: `half`, `r1.7`, `adagrad`, `adaptive`, or `plain-sgd`, `plain-momentum`, `plain-adam`,
            `plain-adagrad` for the tables too.
        lr: learning rate of the tables; the preset's own if None.
        rest: optimizer of the other parameters: sgd, momentum, adam or adagrad.
        rest_lr: learning rate of the other parameters.
        shape: `rows` (tables updated in place) or `dense` (gradients replaced under their own names).
        target: `cpu` or `cuda`: where the written model runs unaided.
        deterministic: target cuda: sum rows in one order, so that every run gives the same bits.
        pipeline: a textual pipeline that replaces all of the above.
        parameters: values to store in the model: of parameters, and of constants, which leave the batch.
        loss: as for `scan`.
        gradients: as for `scan`.
        grad_scale: r1.7: the number of examples that a mean loss divides by.
        allow_fallback: refused tables that the ordinary optimizer may train.
        padding_idx: table to the row that is padding, where the exporter lost it: not counted, not updated.
        initialize: start from what the file's own initialization (`training_info`) gives, instead of the
            values that are stored; `parameters` come on top of it.
        log: receives what the passes say.
        **options: further options of the pass `insert-embedding-kfac`.

    Raises:
        UserError: the graph has no gradients or no table, a table is refused, or a setting is wrong.

    """
    from kfac_onnx.pipeline.pipeline import parse_pipeline

    text = pipeline or pipeline_text(
        preset=preset,
        lr=lr,
        rest=rest,
        rest_lr=rest_lr,
        shape=shape,
        target=target,
        deterministic=deterministic,
        grad_scale=grad_scale,
        allow_fallback=allow_fallback,
        padding_idx=padding_idx,
        **options,
    )
    passes = parse_pipeline(text)
    dense = any(getattr(item, "shape", None) == "dense" for item in passes.passes)
    with collector_paused():
        model = _canonical(source, loss, gradients, keep_optimizer=dense)
        _refuse_transformed(model, source)
        first: Mapping[str, Any] = _first_values(source) if initialize else {}
        if first or parameters:
            _give_values(model, {**first, **(parameters or {})})
        passes.run(model, log=log)
    return model


@contextmanager
def collector_paused() -> Generator[None]:
    """Let no collection run inside; afterwards the collector is as it was.

    A graph is hundreds of thousands of objects that all stay, and the collector walks them again and again: a
    quarter of the time (benchmarks/transform_time).
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _give_values(model: ir.Model, values: Mapping[str, Any]) -> None:
    """Store each array as the default value of the input or initializer of its name.

    Raises UserError for an unknown name, or an array whose shape or dtype is not the input's.
    """
    import numpy as np
    import onnx_ir as ir

    from kfac_onnx.graph.values import static_shape

    known = {str(value.name): value for value in model.graph.inputs} | dict(model.graph.initializers)
    for name, array in values.items():
        value = known.get(name)
        if value is None:
            raise UserError(
                f"the graph has no parameter or input '{name}'{did_you_mean(name, known)}",
                help="`scan MODEL` lists the parameters and the inputs",
            )
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        shape = static_shape(value)
        if shape is not None and tuple(np.shape(array)) != shape:
            raise UserError(
                f"the value of '{name}' has the shape {list(np.shape(array))}, the graph wants {list(shape)}"
            )
        if value.dtype is not None and tensor.dtype != value.dtype:
            raise UserError(
                f"the value of '{name}' is {tensor.dtype.numpy().name}, "
                f"the graph wants {value.dtype.numpy().name}"
            )
        value.const_value = tensor
        if name not in model.graph.initializers:
            model.graph.register_initializer(value)


def _refuse_transformed(model: ir.Model, source: Source) -> None:
    if any(f"kfac.{key}" in model.metadata_props for key in ("step", "state", "draft")):
        raise UserError(
            "the model is already transformed, so it cannot be transformed again",
            place=str(source) if isinstance(source, (str, Path)) else None,
            help="give the original training graph; `inspect MODEL` shows what was inserted",
        )


def _first_values(source: Source) -> Mapping[str, Any]:
    import onnx_ir as ir

    from kfac_onnx.readers import initial_values

    if isinstance(source, ir.Model):
        raise UserError(
            "a model of onnx_ir has no training_info, so its initialization cannot be run",
            help="give the file, or an onnx.ModelProto",
        )
    return initial_values(source)


def save(model: ir.Model, path: str | Path) -> None:
    """Write a model; above 2 GB its tensors go into a file beside it.

    Raises UserError when the file cannot be written; then nothing is left behind.
    """
    from kfac_onnx.disk.models import save_model

    save_model(model, path)
