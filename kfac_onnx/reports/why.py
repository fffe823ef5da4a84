"""Why a parameter is an embedding table or not: what was tried at each node, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kfac_onnx import metadata
from kfac_onnx.errors import NoGradientsError, UserError, did_you_mean
from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.metadata import Parameter, Refusal, Role

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.matching import Verdict

__all__ = ["Verdicts", "why"]

LOOK_UP = (
    "to make it a table, look its rows up with one operator: "
    "torch.nn.functional.embedding, tf.gather or jnp.take"
)


@dataclass(frozen=True)
class Verdicts:
    """What `why` found of one parameter: the verdict, and what was tried at each node, in order.

    `trainable` is false in a graph without gradients. `remedy` says what would change the verdict. `role` is
    what a trained parameter is for, which decides what `--rest muon` and `--rest kfac` train it with.
    """

    parameter: str
    verdict: Literal["embedding", "refused", "not an embedding"]
    trail: tuple[str, ...]
    refusal: Refusal | None = None
    trainable: bool = True
    remedy: str | None = None
    role: Role | None = None


@checked
@blames_the_graph
def why(
    source: str | Path | ir.Model | onnx.ModelProto,
    parameter: str,
    *,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
) -> Verdicts:
    """Return why a parameter is an embedding table or not, with everything that was tried.

    Of a graph without gradients only the uses are told.

    Raises UserError when the graph has no such parameter.
    """
    from kfac_onnx.passes.classify import classified
    from kfac_onnx.passes.find_embeddings import facts_of, find_tables, values_by_name
    from kfac_onnx.readers import read_forward_graph, read_training_graph

    try:
        model = read_training_graph(source, loss=loss, gradients=gradients)
    except NoGradientsError as error:
        return _forward(read_forward_graph(source), parameter, error)
    for refusal in metadata.read_list(model, "refused", Refusal):
        if refusal.parameter == parameter:
            return Verdicts(
                parameter,
                "refused",
                (refusal.path, f"refused: {refusal.reason}"),
                refusal,
                remedy=refusal.remedy,
            )
    values = values_by_name(model)
    verdicts = find_tables(model)
    for item in verdicts:
        if item.weight.name == parameter:
            sites = [other.site.describe() for other in verdicts if other.site is not None]
            role = next((role for role in classified(model, sites) if role.parameter == parameter), None)
            verdict = _verdict(item, _gradient(model, parameter, values), facts_of(model, values))
            return replace(verdict, role=role)
    raise _unknown(model, parameter, values)


def _gradient(model: ir.Model, parameter: str, values: Mapping[str, ir.Value]) -> ir.Value | None:
    for item in metadata.read_list(model, "parameters", Parameter):
        if item.name == parameter and item.gradient is not None:
            return values.get(item.gradient)
    return None


def _verdict(item: Verdict, gradient: ir.Value | None, facts: Facts) -> Verdicts:
    from kfac_onnx.tables.tracing import trace_backward, trace_forward, trace_site

    trail = list(trace_forward(item.weight, facts))
    if gradient is not None:
        trail += trace_backward(gradient, facts)
    if item.site is not None:
        trail += trace_site(item.site)
    trail += item.trail
    verdict = "embedding" if item.site else "refused" if item.refusal else "not an embedding"
    remedy = LOOK_UP if verdict == "not an embedding" else None
    if item.refusal is not None:
        remedy = item.refusal.remedy
    return Verdicts(str(item.weight.name), verdict, tuple(trail), item.refusal, remedy=remedy)


def _forward(model: ir.Model, parameter: str, error: NoGradientsError) -> Verdicts:
    """Tell the uses of a parameter of a graph without gradients."""
    from kfac_onnx.passes.find_embeddings import facts_of, values_by_name
    from kfac_onnx.tables.tracing import trace_forward
    from kfac_onnx.tables.untrained import forward_tables

    values = values_by_name(model)
    weight = values.get(parameter)
    if weight is None or weight.producer() is not None or weight.dtype is None:
        raise _unknown(model, parameter, values)
    if not weight.dtype.is_floating_point():
        raise _unknown(model, parameter, values)
    facts = facts_of(model, values)
    facts.follow(model.graph.outputs)
    facts.trained = {weight}
    table = any(site.parameter == parameter for site in forward_tables(model))
    trail = (*trace_forward(weight, facts), f"not trained: {error.message}")
    return Verdicts(
        parameter,
        "embedding" if table else "not an embedding",
        trail,
        trainable=False,
        remedy=error.help if table else LOOK_UP,
    )


def _unknown(model: ir.Model, name: str, values: Mapping[str, ir.Value]) -> UserError:
    known = [item.name for item in metadata.read_list(model, "parameters", Parameter)]
    value = values.get(name)
    if value is None:
        message = f"the graph has no trained parameter '{name}'{did_you_mean(name, known)}"
    elif (node := value.producer()) is not None:
        message = f"'{name}' is no trained parameter: {node.op_type} makes it"
    elif value.is_graph_input():
        message = f"'{name}' is no trained parameter: it is an input without a gradient"
    else:
        message = f"'{name}' is no trained parameter: it is a constant without a gradient"
    return UserError(message, help="`scan MODEL` lists the trained parameters")
