"""Checks of trained parameters: without a gradient, folded away, renamed, merged, or gone stale."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.autodiff.blocked import blocking_nodes, has_derivative
from kfac_onnx.autodiff.merged import REMEDY, folded_positions, merged_parameters
from kfac_onnx.disk.mapped import all_same, equal
from kfac_onnx.graph.values import is_float, label
from kfac_onnx.reports.checks.finding import Finding
from kfac_onnx.reports.checks.subject import is_anonymous
from kfac_onnx.tables.facts import ancestors
from kfac_onnx.tables.lookups import forward_uses

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from kfac_onnx.metadata import Parameter
    from kfac_onnx.reports.checks.subject import Subject
    from kfac_onnx.tables.lookups import Lookup

__all__ = [
    "equal_tables",
    "folded",
    "folded_lookups",
    "frozen",
    "gone",
    "merged",
    "no_derivative",
    "refused",
    "renamed",
    "set_aside",
    "shared",
    "stale_copies",
    "unused",
]

NO_FOLDING = (
    "export with the parameters as inputs, or without optimization and constant folding "
    "(torch.onnx.export(..., optimize=False), do_constant_folding=False)"
)


def gone(subject: Subject) -> Iterator[Finding]:
    """Report gradients whose parameter the exporter folded away."""
    for item in subject.refused:
        if item.path.startswith("gradient output"):
            yield Finding(
                "parameter-gone",
                "error",
                f"the gradient of '{item.parameter}' is computed, but the parameter is not in the graph",
                (item.path.removeprefix("gradient output "),),
                "the exporter folded it into a constant or merged it with one that started equal: nothing is "
                "left to train",
                NO_FOLDING,
            )


def refused(subject: Subject) -> Iterator[Finding]:
    """Report tables that no block covers, and constants that are a copy of one of several parameters."""
    items = [item for item in subject.refused if not item.path.startswith("gradient output")]
    items += [item.refusal for item in subject.verdicts if item.refusal is not None]
    for item in items:
        copied = item.path.startswith("constant ")
        yield Finding(
            "ambiguous-copy" if copied else "refused-table",
            "error" if copied else "warning",
            f"'{item.parameter}' cannot be trained as an embedding table: {item.reason}"
            if not copied
            else f"'{item.parameter}': {item.reason}",
            (item.path,),
            "the copy keeps its first value while the parameter is trained"
            if copied
            else "`transform` refuses it unless the ordinary optimizer may train it",
            item.remedy,
        )


def set_aside(subject: Subject) -> Iterator[Finding]:
    """Report parameters in which rows are looked up and that are no tables: their gradients are dense."""
    for verdict in subject.verdicts:
        item = verdict.aside
        if item is not None:
            yield Finding(
                "no-table",
                "warning",
                f"'{item.parameter}' is no embedding table: {item.reason}",
                (item.path,),
                "it is trained as any other matrix: a step costs as much as it is large",
                item.remedy,
            )


def stale_copies(subject: Subject) -> Iterator[Finding]:
    """Report constants that were folded copies of a parameter, which reading the file undoes."""
    for note in subject.notes:
        if ": now computed from it" in note:
            yield Finding(
                "stale-copy",
                "warning",
                note.replace("was a", "is a").removesuffix(": now computed from it")
                + ", folded into a constant",
                (note.split("'")[1],),
                "the constant keeps the parameter's first value, so that loss and gradients are those of "
                "another model from the second step on",
                "`transform` computes it from the parameter again; elsewhere " + NO_FOLDING,
            )


def unused(subject: Subject) -> Iterator[Finding]:
    """Report trained parameters outside the loss, and those whose gradient is zero whatever the batch is."""
    facts = subject.facts
    if facts is None or not subject.trainable:
        return
    has_loss = subject.loss is not None and subject.loss.value is not None
    for item in subject.parameters:
        weight = subject.values.get(item.name)
        gradient = subject.values.get(item.gradient or "")
        if weight is None or (has_loss and weight not in facts.forward):
            yield Finding(
                "unused-parameter",
                "warning",
                f"the loss does not depend on the parameter '{item.name}'",
                (item.name,),
                "it has a gradient output, but it cannot be trained",
                "leave it out of the trained parameters, or check the model: is it detached?",
            )
        elif gradient is not None and facts.vanishes(gradient):
            yield Finding(
                "zero-gradient",
                "warning",
                f"the gradient '{item.gradient}' of '{item.name}' is zero whatever the batch is",
                (str(item.gradient),),
                "the parameter is never trained",
                "check the model: is it detached, or behind an operator without a gradient?",
            )


def frozen(subject: Subject) -> Iterator[Finding]:
    """Report tensors like parameters that the loss depends on and that have no gradient."""
    facts = subject.facts
    if facts is None or not subject.trainable:
        return
    blocked = set(_blocked(subject))
    names = [
        str(value.name)
        for value, array in subject.constants()
        if value in facts.forward
        and value not in blocked
        and _varied(array)
        and not _folded_name(subject, value)
    ]
    reasons = {item.name: item.reason for item in subject.frozen}
    if names:
        shown = [f"{name} ({reasons[name]})" if name in reasons else name for name in names]
        yield Finding(
            "frozen-parameter",
            "note",
            f"{len(names)} tensor{'s' if len(names) > 1 else ''} that the loss depends on "
            f"ha{'ve' if len(names) > 1 else 's'} no gradient: {', '.join(shown)}",
            tuple(names),
            "they keep the values that they were exported with; buffers and frozen tables are meant to",
            "if one should be trained, name it when exporting (requires_grad)",
        )


def no_derivative(subject: Subject) -> Iterator[Finding]:
    """Report tensors like parameters that reach the loss only through operators without a derivative."""
    for value, nodes in _blocked(subject).items():
        operators = tuple(dict.fromkeys(label(node) for node in nodes))
        yield Finding(
            "no-derivative",
            "warning",
            f"'{value.name}' is not trained: the loss depends on it only through "
            f"{' and '.join(operators[:3])}, which ha{'s' if len(operators) == 1 else 've'} no derivative",
            (str(value.name), *operators),
            "it keeps the values that it was exported with",
            "--straight-through of `differentiate` takes quantization for the identity in derivatives"
            if any(node.op_type == "QuantizeLinear" for node in nodes)
            else "if it should be trained, replace that operator by one with a derivative",
        )


def _blocked(subject: Subject) -> dict[ir.Value, list[ir.Node]]:
    """Return untrained tensors like parameters that have no derivative, with the operators to blame."""
    facts, graph = subject.facts, subject.graph
    if facts is None or graph is None or subject.loss is None or not subject.trainable:
        return {}
    loss = subject.values.get(subject.loss.value or "")
    if loss is None:
        return {}
    nodes = [node for node in graph.graph if facts.is_forward(node)]
    blocked: dict[ir.Value, list[ir.Node]] = {}
    for value, array in subject.constants():
        if value in facts.forward and _varied(array) and _leads_nowhere(value, loss, nodes):
            blocked[value] = blocking_nodes(value, loss, nodes)
    return {value: found for value, found in blocked.items() if found}


def _leads_nowhere(value: ir.Value, loss: ir.Value, nodes: list[ir.Node]) -> bool:
    """Say whether no way of floating-point numbers leads from a value to the loss."""
    reached = {value}
    for node in nodes:
        if any(item in reached for item in node.inputs) and has_derivative(node):
            reached.update(item for item in node.outputs if is_float(item))
    return loss not in reached


def merged(subject: Subject) -> Iterator[Finding]:
    """Report parameters that start at one number everywhere and that several layers read."""
    facts = subject.facts
    if facts is None or metadata.unmerged(facts.model):
        return
    values = [value for item in subject.parameters if (value := subject.values.get(item.name)) is not None]
    for item in merged_parameters(values, lambda value: subject.array(str(value.name)), facts.is_forward):
        yield Finding(
            "merged-parameter",
            "note" if item.layers_shared else "warning",
            str(item),
            (str(item.parameter.name), *(label(node) for node in item.places)),
            "some exporters keep one of several parameters that start equal: layers then share what the "
            "model does not share, and gradients are sums over them",
            "if the model has several, " + REMEDY,
        )


def folded_lookups(subject: Subject) -> Iterator[Finding]:
    """Report parameters that are added whole to looked-up rows, as a folded lookup of positions is."""
    facts = subject.facts
    if facts is None:
        return
    values = [value for item in subject.parameters if (value := subject.values.get(item.name)) is not None]
    arrays = {value: subject.array(str(value.name)) for value in values}
    for value, table in folded_positions(arrays, facts.is_forward):
        yield Finding(
            "folded-lookup",
            "warning",
            f"'{value.name}' is added whole to rows of '{table.name}', as a lookup of all positions is that "
            "an exporter folded",
            (str(value.name), str(table.name)),
            "a table of positions is then trained under another name, and only its first rows; a model may "
            "also hold such a tensor itself",
            "if the model looks positions up in a table, " + REMEDY,
        )


def folded(subject: Subject) -> Iterator[Finding]:
    """Report constants that vary as a parameter does, with made-up names or while parameters are gone."""
    facts = subject.facts
    if facts is None:
        return
    listed = {item.name for item in subject.parameters} if subject.trainable else set[str]()
    found = [
        str(value.name)
        for value, array in _untrained(subject)
        if value.name not in listed
        and value in facts.forward
        and _folded_name(subject, value)
        and _varied(array)
    ]
    if found:
        yield Finding(
            "folded-parameter",
            "warning",
            f"{'a constant looks' if len(found) == 1 else f'{len(found)} constants look'} "
            f"like what an exporter folded from parameters: {', '.join(found)}",
            tuple(found),
            "an exporter that folds constants stores what it computed from a parameter under another name: "
            "such a parameter is not trained, and cannot be put back into the model",
            NO_FOLDING,
        )


def _untrained(subject: Subject) -> Iterator[tuple[ir.Value, np.ndarray]]:
    """Yield candidates for folded parameters; without gradients every initializer is one."""
    yield from subject.constants()
    if subject.trainable:
        return
    for item in subject.parameters:
        value, array = subject.values.get(item.name), subject.array(item.name)
        if value is not None and array is not None and array.ndim > 1:
            yield value, array


def _folded_name(subject: Subject, value: ir.Value) -> bool:
    return is_anonymous(value.name) or any(True for _ in gone(subject))


def renamed(subject: Subject) -> Iterator[Finding]:
    """Report trained parameters with a made-up name."""
    names = [item.name for item in subject.parameters if subject.trainable and is_anonymous(item.name)]
    if names:
        yield Finding(
            "renamed-parameter",
            "warning",
            f"{'a trained parameter has' if len(names) == 1 else f'{len(names)} trained parameters have'} "
            f"a name that an exporter made up: {', '.join(names)}",
            tuple(names),
            "the exporter folded or renamed the model's own parameter: what is trained cannot be loaded back "
            "under its name",
            NO_FOLDING,
        )


def equal_tables(subject: Subject) -> Iterator[Finding]:
    """Report parameters of two or more dimensions that start equal, entry by entry."""
    by_shape: dict[tuple[int, ...], list[tuple[Parameter, np.ndarray]]] = {}
    for item in subject.parameters:
        array = subject.array(item.name)
        if array is not None and array.ndim > 1 and _varied(array):
            by_shape.setdefault(array.shape, []).append((item, array))
    for group in by_shape.values():
        for (one, first), (other, second) in combinations(group, 2):
            if equal(first, second):
                yield Finding(
                    "equal-parameters",
                    "note",
                    f"'{one.name}' and '{other.name}' start with the same values",
                    (one.name, other.name),
                    "some exporters merge parameters that start equal into one; here they are still two",
                    "start them differently, or export with the parameters as inputs",
                )


def shared(subject: Subject) -> Iterator[Finding]:
    """Report a table that is read by ids of different inputs: shared, or merged by an exporter."""
    facts = subject.facts
    if facts is None or metadata.unmerged(facts.model):
        return
    batch = set(subject.batch_inputs)
    for item in subject.parameters:
        weight = subject.values.get(item.name)
        if weight is None or weight.shape is None or len(weight.shape) != 2:
            continue
        lookups = forward_uses(weight, facts).lookups
        if len(lookups) < 2:
            continue
        sources = {name for lookup in lookups if (name := _source(lookup, batch)) is not None}
        if len(sources) < 2:
            continue
        through = [
            str(value.name) for value in _copies(weight) if str(value.name).endswith((".weight", "_weight"))
        ]
        array = subject.array(item.name)
        equal = array is not None and array.size > 1 and all_same(array)
        merged = bool(through) or equal or any(True for _ in gone(subject))
        yield Finding(
            "shared-table",
            "warning" if merged else "note",
            f"{len(lookups)} lookups by ids of different inputs ({', '.join(sorted(sources))}) read one "
            f"table, '{item.name}'" + (f", one of them as '{through[0]}'" if through else ""),
            (item.name, *(str(lookup.output.name) for lookup in lookups)),
            "some exporters merge tables that start with equal values; that cannot be told from a table that "
            "the model shares",
            "check that it is meant; if it is not, start the tables differently, or " + NO_FOLDING,
        )


def _source(lookup: Lookup, batch: set[ir.Value]) -> str | None:
    if lookup.ids is None or lookup.constant_ids is not None:
        return None
    names = sorted(str(value.name) for value in ancestors([lookup.ids]) if value in batch)
    return " and ".join(names) if names else None


def _copies(weight: ir.Value) -> list[ir.Value]:
    return [node.outputs[0] for node, _ in weight.uses() if node.op_type == "Identity"]


def _varied(array: np.ndarray) -> bool:
    """Say whether a tensor's entries vary as those of a parameter do: most are different numbers."""
    entries = array.reshape(-1)
    if entries.size < 8:
        return False
    sample = entries[:4096]
    return len(np.unique(sample)) > sample.size // 2
