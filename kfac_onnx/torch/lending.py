"""A module lends its tensors to a trace and has everything back afterwards, whatever happens in between.

`torch.func.functional_call` swaps tensors by name: a submodule with two names is swapped twice, and what it
has back at the end is the first swap's tensor. Here each tensor is swapped by identity in every place that
holds it.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

__all__ = ["lent", "loose_tensors", "untouched"]


@contextmanager
def untouched(module: torch.nn.Module) -> Generator[None]:
    """Put back every attribute of a module and its submodules on leaving.

    That is each `__dict__`, and the contents of the dicts, lists and sets in it (parameters, buffers,
    caches). Values of tensors are not copied: whoever runs the module lends it other tensors (`lent`).
    """
    states = [(part, dict(part.__dict__)) for part in module.modules()]
    contents = [
        (held, held.copy())
        for _, state in states
        for held in state.values()
        if isinstance(held, (dict, list, set))
    ]
    try:
        yield
    finally:
        for part, state in states:
            part.__dict__.clear()
            part.__dict__.update(state)
        for held, before in contents:
            held.clear()
            held.extend(before) if isinstance(held, list) else held.update(before)


@contextmanager
def lent(module: torch.nn.Module, tensors: Mapping[int, torch.Tensor]) -> Generator[None]:
    """Let a module hold other tensors: `tensors` maps the `id` of each that it holds to its replacement."""
    with untouched(module):
        for part in module.modules():
            for name, held in part.__dict__.items():
                if isinstance(held, torch.Tensor):
                    part.__dict__[name] = tensors.get(id(held), held)
                elif isinstance(held, dict):
                    for key, value in held.items():
                        if isinstance(value, torch.Tensor):
                            held[key] = tensors.get(id(value), value)
                elif isinstance(held, list):  # such as the flat weights of an LSTM
                    held[:] = [
                        tensors.get(id(value), value) if isinstance(value, torch.Tensor) else value
                        for value in held
                    ]
        yield


def loose_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a module holds as plain attributes, neither parameters nor buffers, by name."""
    registered = {id(value) for value in (*module.parameters(), *module.buffers())}
    for prefix, part in module.named_modules():
        for name, held in part.__dict__.items():
            entries: list[tuple[str, Any]] = [(name, held)]
            if isinstance(held, dict):
                entries = [(f"{name}[{key!r}]", value) for key, value in held.items()]
            elif isinstance(held, list):
                entries = [(f"{name}[{place}]", value) for place, value in enumerate(held)]
            for shown, value in entries:
                if isinstance(value, torch.Tensor) and id(value) not in registered:
                    registered.add(id(value))
                    yield f"{prefix}.{shown}" if prefix else shown, value
