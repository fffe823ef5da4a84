"""State that a training graph changes beside its parameters: running statistics, moving averages, counters.

An exporter may declare it, as pairs of input and output in `kfac.carried` (`kfac_onnx.torch` does). The
running statistics of batch normalization in training mode are seen in the graph of any exporter: inputs
`mean` and `var` of the operator come out as its second and third output.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from kfac_onnx import metadata
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.values import ONNX_DOMAINS, int_attribute
from kfac_onnx.metadata import Carried

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import onnx_ir as ir

__all__ = ["carried_states", "close_states", "hidden_states", "open_states", "require_carried"]

_STATISTICS: Final = ((3, 1), (4, 2))
"""Input and output of both running statistics, of ONNX's operator and of ONNX Runtime's BatchNormInternal."""


def carried_states(model: ir.Model, place: str | None) -> list[Carried]:
    """Return what the graph carries from step to step, and make each new value an output of the graph.

    Two normalizations that read one statistic (a layer that is called twice) follow each other: the second
    starts from what the first leaves. Raises `UserError` for a declared pair that the graph does not have.
    """
    pairs = metadata.read_list(model, "carried", Carried)
    _require_declared(model, pairs, place)
    sources = {pair.input for pair in pairs}
    names: Context | None = None
    last: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if _updates_statistics(node)]:
        for source, result in _STATISTICS:
            old = node.inputs[source]
            if old is None or not _is_source(old) or old.name in sources:
                continue
            if len(node.outputs) <= result:
                node.resize_outputs(result + 1)
            new = node.outputs[result]
            if not new.name or new.type is None or new.shape is None:
                names = names or Context.of(model)
                new.name = new.name or names.fresh(f"{old.name}.next")
                new.type, new.shape = old.type, old.shape
            if old in last:
                node.replace_input_with(source, last[old])
            last[old] = new
    for old, new in last.items():
        if not new.is_graph_output():
            model.graph.outputs.append(new)
        pairs.append(Carried(str(old.name), str(new.name)))
    return pairs


def _updates_statistics(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization" and node.domain in ONNX_DOMAINS:
        return bool(int_attribute(node, "training_mode", 0)) and len(node.inputs) == 5
    return node.op_type == "BatchNormInternal" and len(node.inputs) == 5


def _is_source(value: ir.Value) -> bool:
    return value.is_initializer() or value.is_graph_input()


def _require_declared(model: ir.Model, pairs: Iterable[Carried], place: str | None) -> None:
    graph = model.graph
    inputs = {*graph.initializers, *(str(value.name) for value in graph.inputs)}
    outputs = {str(value.name) for value in graph.outputs}
    for pair in pairs:
        for kind, name, known in (("input", pair.input, inputs), ("output", pair.output, outputs)):
            if name not in known:
                raise UserError(
                    f"the graph declares the state '{pair.input}' with {kind} '{name}', "
                    f"which it does not have{did_you_mean(name, known)}",
                    place=place,
                    help="kfac.carried in its metadata lists pairs of input and output; export it again",
                )


def open_states(model: ir.Model) -> list[str]:
    """Make declared states that are initializers graph inputs too, so that no pass folds their values.

    Return the names of those; `close_states` makes them plain initializers again.
    """
    opened: list[str] = []
    for pair in metadata.read_list(model, "carried", Carried):
        value = model.graph.initializers.get(pair.input)
        if value is not None and not value.is_graph_input():
            model.graph.inputs.append(value)
            opened.append(pair.input)
    return opened


def close_states(model: ir.Model, names: Iterable[str]) -> None:
    """Undo `open_states`."""
    graph = model.graph
    for name in names:
        value = graph.initializers.get(name)
        if value is not None and value.is_graph_input():
            graph.inputs.remove(value)
            graph.initializers.add(value)  # leaving the inputs makes it belong nowhere


@contextmanager
def hidden_states(model: ir.Model, pairs: Iterable[Carried]) -> Generator[None]:
    """Hide the outputs of a graph's own state from those who look for its loss, gradients and updates."""
    names = {pair.output for pair in pairs}
    outputs = model.graph.outputs
    states = [value for value in outputs if value.name in names]
    for index in reversed(range(len(outputs))):
        if outputs[index].name in names:
            del outputs[index]
    try:
        yield
    finally:
        outputs.extend(states)


def require_carried(model: ir.Model, pairs: Iterable[Carried]) -> list[Carried]:
    """Return the pairs whose ends are both in the canonical graph, and whose value a node makes."""
    graph = model.graph
    inputs = {*graph.initializers, *(value.name for value in graph.inputs)}
    outputs = {value.name: value for value in graph.outputs}
    return [
        pair
        for pair in pairs
        if pair.input in inputs and pair.output in outputs and outputs[pair.output].producer() is not None
    ]
