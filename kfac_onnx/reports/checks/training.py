"""Checks of first values and of the interface: weights, padding, loss and batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.autodiff.detached import KEPT_DETACH, cancelled
from kfac_onnx.disk.mapped import all_same, windows
from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.graph.operators import COMPARISONS
from kfac_onnx.graph.values import constant, label
from kfac_onnx.metadata import Site, Step
from kfac_onnx.reports.checks.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kfac_onnx.reports.checks.subject import Subject
    from kfac_onnx.tables.matching import SiteMatch

__all__ = ["detached", "gradients", "loss", "padding", "static_batch", "tied", "weights"]


def gradients(subject: Subject) -> Iterator[Finding]:
    """Report a graph that cannot be read, or that has no gradients."""
    error = subject.error
    if error is None:
        return
    help_text = error.help or "see `scan MODEL`"
    if subject.graph is None:
        yield Finding(
            "unreadable",
            "error",
            error.message,
            tuple(error.tried),
            "`transform` cannot read this graph",
            help_text,
        )
    else:
        yield Finding(
            "no-gradients",
            "warning",
            error.message,
            (),
            "a forward model cannot be trained as it is",
            help_text,
        )


def detached(subject: Subject) -> Iterator[Finding]:
    """Report estimators whose `detach` is lost where gradients are derived from the forward graph."""
    if subject.trainable and subject.raw.metadata_props.get("kfac.frontend") != "differentiated":
        return  # the exporter knew what is detached
    for node, h in cancelled(subject.raw.graph):
        yield Finding(
            "lost-detach",
            "warning",
            f"{label(node)} adds '{h.name}' to what it was subtracted from",
            (label(node),),
            "a straight-through estimator is written so, with a `detach` that forward graphs do not hold: "
            f"without it no gradient reaches '{h.name}' there",
            KEPT_DETACH,
        )


def loss(subject: Subject) -> Iterator[Finding]:
    """Report a loss outside the graph, or one whose reduction over examples is not seen."""
    if subject.loss is None or not subject.trainable:
        return
    if subject.loss.value is None:
        yield Finding(
            "loss-outside",
            "note",
            "the graph has no loss: it takes the gradient of its predictions as an input",
            (),
            "who runs it must compute the loss and its gradient",
            "export the model together with its loss",
        )
    elif subject.loss.reduction == "unknown":
        yield Finding(
            "loss-reduction",
            "warning",
            f"how the loss '{subject.loss.value}' reduces over examples is not seen",
            (subject.loss.value,),
            "preset r1.7 needs the number that a mean divides by; the other presets do not",
            "reduce by mean or sum as the last step of the loss, or give grad-scale=N to r1.7",
        )


def static_batch(subject: Subject) -> Iterator[Finding]:
    """Report a batch of fixed size."""
    inputs = [value for value in subject.batch_inputs if value.shape is not None and len(value.shape) > 0]
    if not inputs or any(not isinstance(dim, int) for value in inputs for dim in value.shape or ()):
        return
    names = [str(value.name) for value in inputs]
    shapes = ", ".join(f"{value.name} {list(value.shape or ())}" for value in inputs)
    yield Finding(
        "static-batch",
        "note",
        f"no input of the batch has a free dimension: {shapes}",
        tuple(names),
        "every batch must have exactly this size, also the last one of an epoch",
        "export with a dynamic first dimension (dynamic_axes, dynamic_shapes, or TensorSpec([None, ...]))",
    )


def weights(subject: Subject) -> Iterator[Finding]:
    """Report first values that are not finite, or all equal."""
    tables = {str(item.weight.name): item.site for item in subject.verdicts if item.site is not None}
    for item in subject.parameters:
        array = subject.array(item.name)
        if array is None or array.size == 0 or not subject.trainable:
            continue
        infinite = sum(int(np.sum(~np.isfinite(piece.astype(np.float32)))) for (piece,) in windows(array))
        first = np.float32(array.reshape(-1)[0])
        if infinite:
            yield Finding(
                "non-finite-weights",
                "error",
                f"{infinite} of {array.size} first values of '{item.name}' are not finite",
                (item.name,),
                "every step is skipped, or trains to nothing",
                "export the model again with finite weights, or give others: --parameters FILE",
            )
        elif array.ndim > 1 and min(array.shape) > 1 and all_same(array):
            site = tables.get(item.name)
            zero = first == 0.0
            yield Finding(
                "zero-table" if site is not None and zero else "constant-weights",
                "warning",
                f"all first values of '{item.name}' are {first:g}",
                (item.name,),
                "rows that start equal differ only by what they are trained on; where the model multiplies "
                "two such tensors, neither has a gradient"
                if site is not None
                else "units that start equal stay equal",
                "start from random values: --parameters FILE",
            )


def tied(subject: Subject) -> Iterator[Finding]:
    """Report tied tables of a training step whose preset diverges on such tables."""
    step = metadata.read(subject.raw, "step", Step)
    preset = None if step is None else PRESETS.get(step.settings.preset or "")
    if preset is None or not preset.diverges_on_tied:
        return
    names = [site.parameter for site in metadata.read_list(subject.raw, "sites", Site) if site.dense_uses]
    if names:
        yield Finding(
            "diverging-preset",
            "warning",
            f"preset '{preset.name}' trains {len(names)} tied table{'s' * (len(names) != 1)}",
            tuple(names),
            "its steps follow the size of gradients, which projections make large in rows that are seldom "
            "looked up, so that the loss can diverge",
            "transform the graph with preset "
            + " or ".join(name for name, other in PRESETS.items() if not other.diverges_on_tied),
        )


def padding(subject: Subject) -> Iterator[Finding]:
    """Report a row that starts at zero, as a padding row does, and that the graph trains."""
    for verdict in subject.verdicts:
        site = verdict.site
        if site is None or any(use.padding_idx is not None for use in site.uses):
            continue
        row = _zero_row(subject, site)
        if row is None or _compares(subject, row):
            continue
        yield Finding(
            "padding-lost",
            "warning",
            f"row {row} of '{verdict.weight.name}' starts at zero, as a padding row does, but is trained",
            (str(verdict.weight.name), str(site.gradient.name)),
            "some exporters drop padding_idx from the gradient (ONNX Runtime's artifacts do): the row does "
            "not stay zero",
            f"if row {row} is padding, say so: --padding-idx {verdict.weight.name}={row}",
        )


def _zero_row(subject: Subject, site: SiteMatch) -> int | None:
    """Return the one row of a table that is zero at the start, if exactly one is."""
    array = subject.array(str(site.weight.name))
    pulled = site.pulled
    if array is None or array.size != pulled.vocab_size * pulled.embedding_dim or pulled.embedding_dim < 2:
        return None
    table = array.T if pulled.layout == "columns" else array.reshape(pulled.vocab_size, pulled.embedding_dim)
    rows: list[int] = []
    start = 0
    for (piece,) in windows(table):
        rows.extend((start + np.flatnonzero(~piece.astype(np.float32).any(axis=1))).tolist())
        if len(rows) > 1:
            return None
        start += len(piece)
    return rows[0] if rows else None


def _compares(subject: Subject, row: int) -> bool:
    """Say whether the loss depends on a comparison of integers with this id: a mask of the model's own."""
    facts = subject.facts
    if facts is None or subject.graph is None:
        return False
    for node in subject.graph.graph:
        if node.op_type in COMPARISONS and facts.is_forward(node):
            for value in node.inputs:
                found = constant(value)
                if (
                    found is not None
                    and found.size == 1
                    and found.dtype.kind in "iu"
                    and int(found.flat[0]) == row
                ):
                    return True
    return False
