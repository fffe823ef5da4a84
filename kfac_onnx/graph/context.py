"""What is known of one model while it is rewritten: the names in use, and the constants that were added.

A model has one context, found by `Context.of(model)`, which every emitter of every pass shares. Names are
collected from the graph once, when the first is asked for. Whoever names a value without an emitter tells the
context: `take` for one name, `invalidate` after an edit of any size. A pipeline does so after each pass.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.values import all_graphs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping

__all__ = ["Context", "names_in"]

KEY: Final = "kfac.context"
"""Where a model keeps its context, in memory only."""
LONG: Final = 64
"""Bytes above which constants are compared by a digest."""


def names_in(graph: ir.Graph) -> set[str]:
    """Return the names of the values and nodes of a graph and of those in it."""
    names: set[str] = set()
    for inner in all_graphs(graph):
        names.update(value.name for value in inner.inputs if value.name)
        names.update(inner.initializers)
        for node in inner:
            if node.name:
                names.add(node.name)
            for value in node.outputs:
                if value.name:
                    names.add(value.name)
    return names


class Context:
    """The names and constants of one model, shared by all that is emitted into it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._names: set[str] | None = None
        self._numbers: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @classmethod
    def of(cls, model: ir.Model) -> Context:
        """Return the context of a model; every call for the same model returns the same one."""
        store = cast("MutableMapping[str, object]", model.meta)
        context = store.get(KEY)
        if not isinstance(context, Context) or context.model is not model:
            context = store[KEY] = cls(model)
        return context

    @property
    def names(self) -> set[str]:
        """The names in use."""
        if self._names is None:
            self._names = names_in(self.model.graph)
        return self._names

    def invalidate(self) -> None:
        """Forget the names: the graph was edited by something that does not tell the context."""
        self._names = None
        self._numbers.clear()

    def names_are(self, names: Iterable[str]) -> None:
        """Take over the names of the whole graph from somebody who has just listed them."""
        self._names = set(names)
        self._numbers.clear()

    def fresh(self, wanted: str) -> str:
        """Return `wanted`, or `wanted_2`, `wanted_3`, ... if it is taken, and take it."""
        names = self.names
        number = self._numbers.get(wanted, 1)
        name = wanted if number == 1 else f"{wanted}_{number}"
        while name in names:
            number += 1
            name = f"{wanted}_{number}"
        self._numbers[wanted] = number
        names.add(name)
        return name

    def take(self, name: str) -> str:
        """Return a name exactly as it is.

        Raises ValueError when it is taken.
        """
        if name in self.names:
            raise ValueError(f"the model already has a value '{name}'")
        self.names.add(name)
        return name

    def release(self, name: str) -> None:
        """Let a name be given again that no value has any more."""
        self.names.discard(name)
        self._numbers.pop(name, None)

    def constant(
        self, array: np.ndarray, name: str = "kfac/lower/constant", tags: Mapping[str, str] | None = None
    ) -> ir.Value:
        """Return an initializer of the main graph with these contents.

        Equal contents of one type and shape are one initializer, as long as it is in the graph.
        """
        array = np.ascontiguousarray(array) if array.ndim else np.asarray(array)
        contents = array.tobytes()
        if len(contents) > LONG:
            contents = hashlib.sha256(contents).digest()
        key = (str(array.dtype), array.shape, contents)
        graph, value = self.model.graph, self._constants.get(key)
        if value is not None and graph.initializers.get(str(value.name)) is value:
            return value
        full = self.fresh(name)
        tensor = ir.tensor(array, name=full)
        value = ir.Value(
            name=full,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
            metadata_props=dict(tags or {}),
        )
        graph.register_initializer(value)
        self._constants[key] = value
        return value
