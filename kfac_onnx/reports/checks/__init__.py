"""Linting of training graphs: one small function per check, in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.reports.checks import operators, parameters, tables, training
from kfac_onnx.reports.checks.finding import CheckReport, Finding, Severity
from kfac_onnx.reports.checks.subject import Subject, read_subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import onnx
    import onnx_ir as ir

__all__ = ["CHECKS", "CheckReport", "Finding", "Severity", "check"]

CHECKS: Final[tuple[Callable[[Subject], Iterator[Finding]], ...]] = (
    training.gradients,
    operators.old_opset,
    operators.shapes,
    operators.kernels,
    operators.racing_scatters,
    operators.inference_mode,
    parameters.gone,
    parameters.refused,
    parameters.set_aside,
    parameters.stale_copies,
    parameters.folded,
    parameters.folded_lookups,
    parameters.merged,
    parameters.renamed,
    parameters.shared,
    parameters.equal_tables,
    parameters.unused,
    parameters.no_derivative,
    parameters.frozen,
    tables.double_precision,
    tables.wide_rows,
    tables.equal_ids,
    training.detached,
    training.weights,
    training.padding,
    training.tied,
    training.loss,
    training.static_batch,
)
"""In the order in which their findings are listed among those of the same severity."""

ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "note")


@checked
@blames_the_graph
def check(
    source: str | Path | ir.Model | onnx.ModelProto,
    *,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
    parameters: Mapping[str, np.ndarray] | None = None,
) -> CheckReport:
    """Return what is wrong with a training graph, or probably not meant; errors first.

    Args:
        source: a file, or a model already read (which is not changed).
        loss: the scalar output that is the loss, where several qualify.
        gradients: parameter name to the output that is its gradient, where names do not tell.
        parameters: first values of parameters that the graph takes as inputs.

    Raises:
        UserError: the file is not a model.

    """
    subject = read_subject(source, loss=loss, gradients=gradients, parameters=parameters)
    found = [finding for rule in CHECKS for finding in rule(subject)]
    found.sort(key=lambda finding: ORDER.index(finding.severity))
    return CheckReport(tuple(found), tuple(rule.__name__.replace("_", "-") for rule in CHECKS))
