"""What users call from Python: `scan`, `transform`, `why` and `save`."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfac_onnx import metadata
from kfac_onnx.errors import NoGradientsError, UserError, did_you_mean
from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.markup import element, rows_table
from kfac_onnx.metadata import Account, Loss, Parameter, Refusal, Role, Site
from kfac_onnx.options import function_with
from kfac_onnx.passes.standard import PLAIN, TransformOptions
from kfac_onnx.reports.why import Verdicts, why

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    import onnx
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log
    from kfac_onnx.pipeline.pipeline import Trace
    from kfac_onnx.tables.matching import Verdict

    Source = str | Path | ir.Model | onnx.ModelProto

__all__ = [
    "PLAIN",
    "Report",
    "TransformOptions",
    "Verdicts",
    "collector_paused",
    "save",
    "scan",
    "transform",
    "transform_as",
    "why",
]


@dataclass(frozen=True)
class Report:
    """What `scan` found: sites, refusals, the loss, and every input by its kind.

    `roles` say what each trained parameter is for, and why; a graph without gradients has none. `accounts`
    have every trained parameter, every float constant of two or more dimensions and every gradient that
    belongs to none exactly once: as a table, another parameter, refused, frozen, or merged by an exporter.
    """

    frontend: str
    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    loss: str | None
    reduction: str
    batch_inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    notes: tuple[str, ...]
    trainable: bool = True
    roles: tuple[Role, ...] = ()
    accounts: tuple[Account, ...] = ()

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        sites = rows_table(
            ["table", "V x D", "dtype", "lookups ", "gradient"],
            [
                (s.parameter, f"{s.vocab_size} x {s.embedding_dim}", s.dtype, len(s.uses), s.gradient)
                for s in self.sites
            ],
            name=None,
        )
        refused = [
            element("p", element("b", f"refused: {r.parameter}"), f": {r.reason}") for r in self.refused
        ]
        notes = [element("p", note) for note in self.notes]
        inputs = ", ".join(self.batch_inputs)
        head = element("p", f"read as {self.frontend}, loss {self.loss}, inputs {inputs}")
        return element("div", head, sites, *refused, *notes)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        roles = {role.parameter: {"role": role.kind, "reason": role.reason} for role in self.roles}
        no_role = {"role": None, "reason": None}
        return {
            "trainable": self.trainable,
            "sites": [_site_json(site) for site in self.sites],
            "refused": [asdict(item) for item in self.refused],
            "loss": self.loss,
            "reduction": self.reduction,
            "batch_inputs": list(self.batch_inputs),
            "parameters": [
                {"name": item.name, "shape": list(item.shape), "gradient": item.gradient}
                | roles.get(item.name, no_role)
                for item in self.parameters
            ],
            "accounts": [asdict(item) for item in self.accounts],
            "frontend": self.frontend,
            "notes": list(self.notes),
        }


def _site_json(site: Site) -> dict[str, Any]:
    names = ("parameter", "vocab_size", "embedding_dim", "dtype", "layout", "padding_idx", "gradient")
    data: dict[str, Any] = {name: getattr(site, name) for name in names}
    data["uses"] = [asdict(use) for use in site.uses]
    data["dense_uses"] = [{"op": use.op, "output": use.output} for use in site.dense_uses]
    data["penalties"] = [{"op": use.op, "output": use.output} for use in site.penalties]
    data["dead_ends"] = [{"op": use.op, "output": use.output} for use in site.dead_ends]
    return data


def _canonical(
    source: Source,
    loss: str | None,
    gradients: Mapping[str, str] | None,
    trace: Trace | None,
    *,
    keep_optimizer: bool = False,
    log: Log | None = None,
) -> ir.Model:
    from kfac_onnx.readers import read_training_graph

    return read_training_graph(
        source, loss=loss, gradients=gradients, keep_optimizer=keep_optimizer, trace=trace, log=log
    )


@checked
@blames_the_graph
def scan(
    source: Source,
    *,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
    trace: Trace | None = None,
) -> Report:
    """Return the tables of a training graph, what was refused and all parameters' roles, with reasons.

    A graph without gradients is read too: its tables are listed with `trainable` false.

    Args:
        source: a file, or a model already read.
        loss: the scalar output that is the loss, where several qualify.
        gradients: parameter name to the output that is its gradient, where names do not tell.
        trace: what is checked and shown between the passes that read the graph.

    Raises:
        UserError: the file is not a model, or holds something that cannot be read.

    """
    from kfac_onnx.passes.classify import classified
    from kfac_onnx.passes.find_embeddings import find_tables
    from kfac_onnx.readers import read_forward_graph
    from kfac_onnx.tables.untrained import forward_tables

    try:
        model = _canonical(source, loss, gradients, trace)
    except NoGradientsError as e:
        model = read_forward_graph(source, trace=trace)
        reason = e.message if e.help is None else f"{e.message}: {e.help}"
        metadata.write(model, "notes", [*metadata.read_strings(model, "notes"), reason])
    trainable = model.metadata_props.get("kfac.frontend") != "forward"
    parameters = metadata.read_list(model, "parameters", Parameter)
    found_loss = metadata.read(model, "loss", Loss)
    refused = metadata.read_list(model, "refused", Refusal)
    verdicts = find_tables(model) if trainable else []
    if trainable:
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
        roles=tuple(classified(model, sites)) if trainable else (),
        accounts=tuple(_accounts(model, verdicts, sites)),
    )


def _accounts(model: ir.Model, verdicts: Iterable[Verdict], sites: Iterable[Site]) -> list[Account]:
    from kfac_onnx.passes.accounting import accounts_of
    from kfac_onnx.passes.find_embeddings import facts_of, values_by_name

    values = values_by_name(model)
    facts = facts_of(model, values)
    if not facts.forward:
        facts.follow(model.graph.outputs)
    return accounts_of(model, verdicts, values, facts, tables=[site.parameter for site in sites])


@blames_the_graph
def transform_as(source: Source, options: TransformOptions) -> ir.Model:
    """Return a training graph as one model that is a whole training step, as `transform`."""
    from kfac_onnx.pipeline.pipeline import Trace, parse_pipeline

    passes = parse_pipeline(options.text)
    dense = any(getattr(item, "shape", None) == "dense" for item in passes.passes)
    with collector_paused():
        model = _canonical(
            source, options.loss, options.gradients, options.trace, keep_optimizer=dense, log=options.log
        )
        _refuse_transformed(model, source)
        first: Mapping[str, Any] = _first_values(source) if options.initialize else {}
        if first or options.parameters:
            _give_values(model, {**first, **(options.parameters or {})})
        shown = options.trace or Trace()
        passes.run(
            model,
            print_after_change=shown.print_after_change,
            timing=shown.timing,
            log=options.log,
            sound=True,
        )
    return model


@function_with(TransformOptions)
def transform(source: Source, options: TransformOptions) -> ir.Model:
    """Return a training graph as one model that is a whole preconditioned training step.

    `source` is a file, or a model already read (which is not changed).

    Raises:
        UserError: the graph has no gradients or no table, a table is refused, or a setting is wrong.

    """
    return transform_as(source, options)


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
    if any(f"kfac.{key}" in model.metadata_props for key in ("transformed", "step", "state", "draft")):
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


@checked
def save(model: ir.Model, path: str | Path) -> None:
    """Write a model; above 2 GB its tensors go into a file beside it.

    Raises UserError when the file cannot be written; then nothing is left behind.
    """
    from kfac_onnx.disk.models import save_model

    save_model(model, path)
