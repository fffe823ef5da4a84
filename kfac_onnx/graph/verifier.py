"""What holds for a model between any two passes.

1. Every graph is well formed: names of values are unique and not empty, each input of a node is an
   input, an initializer or the output of an earlier node, of this graph or of one around it.
2. The graph's outputs exist, and no initializer or output is left dangling.
3. Every operator's domain is imported, by the model or by the function that uses it.
4. Every `ai.kfac` node passes its operator's own verifier.
5. What the metadata names (loss, states, step) is in the graph.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from typing import TYPE_CHECKING, Final, TypeAlias

import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.values import bodies_of

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

__all__ = ["problems_of", "require_sound"]

DIALECT: Final = "ai.kfac"

_INITIAL: Final = ("parameter", "zeros", "ones", "identity")
_PHASES: Final = frozenset(str(phase) for phase in metadata.Phase)
_SHOWN: Final = 5
"""Problems that an error lists."""

Owner: TypeAlias = "str | ir.Node"
"""What a name stands for: in words, or the node whose output it is."""


def problems_of(model: ir.Model, *, own_operators: bool = True, taken: set[str] | None = None) -> list[str]:
    """Return one sentence for each thing that is wrong with `model`; an empty list when it is sound.

    Without `own_operators` rule 4 is left out: a file made by another version of this package holds the
    bodies of its own `ai.kfac` operators, and runs by them. `taken` gets the names of all values and nodes
    of the graph and of those in it.
    """
    problems: list[str] = []
    names: dict[str, Owner] = {}
    taken = set() if taken is None else taken
    imports = dict(model.opset_imports)
    problems += _graph_problems(model.graph, set(), names, imports, taken, own=own_operators)
    taken.update(names)
    for function in model.functions.values():
        where = f"in function {function.domain}::{function.name}: "
        problems += [
            where + problem
            for problem in _graph_problems(
                function, set(), {}, dict(function.opset_imports), set(), own=own_operators
            )
        ]
    problems += _metadata_problems(model, names)
    return problems


def require_sound(model: ir.Model, place: str | None, *, own_operators: bool = False) -> None:
    """Raise UserError for a model that somebody else made and that breaks one of the rules above."""
    try:
        problems = problems_of(model, own_operators=own_operators)
    except UserError as e:
        e.place = e.place or place
        raise
    if problems:
        raise UserError(
            "the model contradicts itself, so it cannot be used",
            place=place,
            tried=problems[:_SHOWN],
            help="make it again from the training graph that its exporter wrote",
        )


def _label(node: ir.Node) -> str:
    domain = f"{node.domain}::" if node.domain else ""
    return f"node '{node.name}' ({domain}{node.op_type})" if node.name else f"a node {domain}{node.op_type}"


def _graph_problems(
    graph: ir.Graph | ir.Function,
    scope: set[int],
    names: MutableMapping[str, Owner],
    imports: dict[str, int],
    taken: set[str],
    *,
    own: bool,
) -> Iterator[str]:
    """Yield the problems of one graph.

    `scope` holds the ids of the values known so far, and gets its own; `taken` gets the names of nodes, and
    all names of the graphs inside.
    """
    for value in graph.inputs:
        yield from _define(value, "an input", names)
        scope.add(id(value))
    if isinstance(graph, ir.Graph):
        for key, value in graph.initializers.items():
            if value.name != key:
                yield f"initializer '{key}' is a value named '{value.name}'"
            if value.const_value is None:
                yield f"initializer '{key}' has no data"
            if not value.is_graph_input():
                yield from _define(value, "an initializer", names)
                scope.add(id(value))
    for node in graph:
        domain = node.domain
        if node.name:
            taken.add(node.name)
        if domain not in imports:
            yield f"{_label(node)} is of a domain that is not imported: '{domain}'"
        for index, value in enumerate(node.inputs):
            if value is not None and id(value) not in scope:
                yield f"{_label(node)}, input {index}: '{value.name}' {_why_missing(value, graph)}"
        for body in bodies_of(node) if domain != DIALECT else ():
            inside = ChainMap({}, names)  # another body may use the same names
            yield from _graph_problems(body, scope, inside, imports, taken, own=own)
            taken.update(inside.maps[0])
            scope.difference_update(map(id, _values_of(body)))
        for value in node.outputs:
            name = value.name
            if name:
                if name in names:
                    yield from _define(value, node, names)
                else:
                    names[name] = node
                scope.add(id(value))
            elif value.uses() or value.is_graph_output():
                yield f"{_label(node)} has an output that is used but has no name"
        phase = node.metadata_props.get("kfac.phase")
        if phase is not None and phase not in _PHASES:
            yield f"{_label(node)} is of no known phase: '{phase}'"
        if own and domain == DIALECT:
            for problem in _dialect_problems(node):
                yield f"{_label(node)}: {problem}"
    for value in graph.outputs:
        if id(value) not in scope:
            yield f"output '{value.name}' {_why_missing(value, graph)}"


def _values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values that belong to a graph itself, not to the graphs in it."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _define(value: ir.Value, owner: Owner, names: MutableMapping[str, Owner]) -> tuple[str, ...]:
    name = value.name
    if not name:
        return (f"{_role(owner)} has no name",)
    if name in names:
        return (f"the name '{name}' stands for {_role(names[name])} and for {_role(owner)}",)
    names[name] = owner
    return ()


def _role(owner: Owner) -> str:
    return owner if isinstance(owner, str) else f"an output of {_label(owner)}"


def _why_missing(value: ir.Value, graph: ir.Graph | ir.Function) -> str:
    producer = value.producer()
    if producer is None:
        return "is not an input, not an initializer and no node makes it"
    if producer.graph is None:
        return f"is made by {_label(producer)}, which is in no graph"
    if producer.graph is graph:
        return f"is used before {_label(producer)} makes it"
    return f"is made by {_label(producer)}, which is in another graph"


def _dialect_problems(node: ir.Node) -> list[str]:
    from kfac_onnx import dialect

    return dialect.verify_node(node)


def _metadata_problems(model: ir.Model, names: dict[str, Owner]) -> Iterator[str]:
    loss = metadata.read(model, "loss", metadata.Loss)
    if loss is not None and loss.value is not None and loss.value not in names:
        yield f"kfac.loss names '{loss.value}', which is not in the graph"
    inputs = {value.name for value in model.graph.inputs}
    outputs = {value.name for value in model.graph.outputs}
    values = {value.name: value for value in model.graph.inputs}
    states = metadata.read_list(model, "state", metadata.State)
    for name, count in Counter(state.input for state in states).items():
        if count > 1:
            yield f"kfac.state names '{name}' {count} times"
    for state in states:
        yield from _state_problems(state, values.get(state.input))
        if state.input not in inputs:
            yield f"kfac.state: '{state.input}' is not an input of the graph"
        if state.output not in outputs:
            yield f"kfac.state: '{state.output}' is not an output of the graph"
        for name in (state.candidate, *state.aliases):
            if name not in names:
                yield f"kfac.state of '{state.input}' names '{name}', which is not in the graph"
    step = metadata.read(model, "step", metadata.Step)
    if step is None:
        return
    for value in model.graph.inputs:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            yield f"the input '{value.name}' of a training step is no tensor"
    for name in (*step.batch, *step.constants, *(rate.input for rate in step.learning_rates)):
        if name not in inputs:
            yield f"kfac.step: '{name}' is not an input of the graph"
    named = [
        *step.ends,
        step.ok,
        *(check.ids for check in step.id_checks),
    ]
    for check in step.root_checks:
        named += [check.root, check.factor, check.damping, check.residual]
    for name in named:
        if name not in names:
            yield f"kfac.step names '{name}', which is not in the graph"


def _state_problems(state: metadata.State, value: ir.Value | None) -> Iterator[str]:
    """Yield where a state's entry contradicts what the graph declares for its input."""
    if min(state.shape, default=0) < 0:
        yield f"kfac.state of '{state.input}' has a negative dimension"
    if isinstance(state.initial, str) and state.initial not in _INITIAL:
        yield f"kfac.state of '{state.input}' begins as '{state.initial}', which is no known value"
    if state.initial == "identity" and (len(state.shape) < 2 or state.shape[-1] != state.shape[-2]):
        yield f"kfac.state of '{state.input}' begins as the identity, and is no square matrix"
    if value is None:
        return
    dims = None if value.shape is None else list(value.shape)
    if dims is not None and (
        len(dims) != len(state.shape)
        or any(isinstance(dim, int) and dim != own for dim, own in zip(dims, state.shape, strict=True))
    ):
        yield f"kfac.state: '{state.input}' has the shape {list(state.shape)}, which is not that of the input"
