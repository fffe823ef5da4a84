"""The graph that is checked: as its exporter wrote it, and as the passes read it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import NoGradientsError, UserError
from kfac_onnx.graph.values import all_graphs, static_shape
from kfac_onnx.metadata import Frozen, Loss, Parameter, Refusal
from kfac_onnx.passes.find_embeddings import facts_of, find_tables, values_by_name
from kfac_onnx.readers import read_forward_graph, read_training_graph
from kfac_onnx.readers.load import load
from kfac_onnx.readers.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.matching import Verdict

__all__ = ["Subject", "is_anonymous", "read_subject"]

ANONYMOUS: Final = re.compile(r"^(onnx::\w+|_?val|const|const_fold_opt_?|_inlfunc.*|)_?\d+(__\d+)?$")
"""Names that exporters make up for what they computed. A hint only: it never decides alone."""


def is_anonymous(name: str | None) -> bool:
    """Say whether a name looks made up by an exporter: `val_12`, `onnx::MatMul_27`, `const_31`."""
    return name is None or ANONYMOUS.match(name) is not None


@dataclass
class Subject:
    """A graph under check.

    `raw` is the exporter's graph, functions inlined and shapes inferred; `graph` is the canonical one, None
    if it cannot be read (`error` says why). `trainable` says that it has gradients. `given` are values of
    parameters that the file does not hold.
    """

    raw: ir.Model
    opset: int
    graph: ir.Model | None
    trainable: bool
    error: UserError | None = None
    given: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])

    def nodes(self) -> Iterator[ir.Node]:
        """Yield every node of the exporter's graph, also of the graphs inside."""
        for graph in all_graphs(self.raw.graph):
            yield from graph

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The trained parameters; every float initializer of a graph without gradients."""
        return () if self.graph is None else tuple(metadata.read_list(self.graph, "parameters", Parameter))

    @cached_property
    def refused(self) -> tuple[Refusal, ...]:
        """What reading the file already refused."""
        return () if self.graph is None else tuple(metadata.read_list(self.graph, "refused", Refusal))

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """What `differentiate` left untrained, and why."""
        return () if self.graph is None else tuple(metadata.read_list(self.graph, "frozen", Frozen))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What reading the file changed."""
        return () if self.graph is None else tuple(metadata.read_strings(self.graph, "notes"))

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """The values of the canonical graph by name."""
        return {} if self.graph is None else values_by_name(self.graph)

    @cached_property
    def loss(self) -> Loss | None:
        """The loss that the canonical graph declares."""
        return None if self.graph is None else metadata.read(self.graph, "loss", Loss)

    @cached_property
    def facts(self) -> Facts | None:
        """What is known of the canonical graph's values."""
        if self.graph is None:
            return None
        facts = facts_of(self.graph, self.values)
        if not facts.forward:
            facts.follow(self.graph.graph.outputs)
        return facts

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What was found of each trained parameter."""
        if self.graph is None or not self.trainable:
            return ()
        return tuple(find_tables(self.graph))

    def array(self, name: str) -> np.ndarray | None:
        """Return the first value of a parameter, as numbers NumPy can compare, if it is known."""
        if name in self.given:
            return np.asarray(self.given[name])
        value = self.values.get(name)
        tensor = None if value is None else value.const_value
        return None if tensor is None else np.asarray(tensor.numpy())

    @cached_property
    def batch_inputs(self) -> tuple[ir.Value, ...]:
        """Inputs of the canonical graph that are no parameter and have no default."""
        if self.graph is None:
            return ()
        known = {item.name for item in self.parameters}
        held = self.graph.graph.initializers
        return tuple(
            value for value in self.graph.graph.inputs if value.name not in known and value.name not in held
        )

    def constants(self) -> Iterator[tuple[ir.Value, np.ndarray]]:
        """Yield the float initializers of two or more dimensions that are not trained."""
        if self.graph is None:
            return
        known = {item.name for item in self.parameters}
        for name, value in self.graph.graph.initializers.items():
            shape = static_shape(value)
            tensor = value.const_value
            if name in known or tensor is None or shape is None or len(shape) < 2 or value.is_graph_input():
                continue
            if tensor.dtype.is_floating_point():
                yield value, np.asarray(tensor.numpy())


def read_subject(
    source: str | Path | ir.Model | onnx.ModelProto,
    *,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
    parameters: Mapping[str, np.ndarray] | None = None,
) -> Subject:
    """Return a graph to be checked.

    Raises UserError when the file is not a model.
    """
    exported = load(source)
    raw = exported.model
    opset = max(raw.opset_imports.get("", 1), raw.opset_imports.get("ai.onnx", 1))
    Reading(raw, exported.place, None, None).run("inline-functions,sort-nodes,lift-constants,infer-shapes")
    given = dict(parameters or {})
    try:
        graph = read_training_graph(source, loss=loss, gradients=gradients)
    except NoGradientsError as error:
        try:
            return Subject(raw, opset, read_forward_graph(source), False, error, given)
        except UserError as unreadable:
            return Subject(raw, opset, None, False, unreadable, given)
    except UserError as error:
        return Subject(raw, opset, None, False, error, given)
    return Subject(raw, opset, graph, True, None, given)
