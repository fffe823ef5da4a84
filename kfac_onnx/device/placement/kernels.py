"""The table of a provider's kernels: `cuda_kernels.json`, which tools/cuda_kernels.py writes.

A kernel serves a node when its range of opsets holds the version that the node's operator has at the model's
opset, and its types hold the node's. A range without an end holds its first version alone: onnxruntime does
not run a newer form of an operator on an older kernel (core/framework/kernel_registry.cc).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Kernel", "KernelTable", "cuda_kernels", "type_name"]

_PATH: Final = Path(__file__).with_name("cuda_kernels.json")
_NAMES: Final = {"FLOAT": "float", "DOUBLE": "double"}


def type_name(element: int) -> str:
    """Return ONNX's own word for an element type, such as `float` or `int64`."""
    name = onnx.TensorProto.DataType.Name(element)  # pyright: ignore[reportArgumentType]  an int
    return _NAMES.get(name, name.lower())


@dataclass(frozen=True)
class Kernel:
    """One entry: the opsets it serves (`last` None: no newer one is known) and its types by letter."""

    first: int
    last: int | None
    types: Mapping[str, frozenset[str]]

    def serves(self, version: int) -> bool:
        """Say whether a node of this version of its operator can run on it."""
        return self.first == version or (self.last is not None and self.first <= version <= self.last)


@dataclass(frozen=True)
class KernelTable:
    """All kernels of a provider, and the inputs and outputs that they keep on the host.

    `host_operators` are those standard ones that the CPU has kernels for.
    """

    provider: str
    onnxruntime: str
    source: str
    kernels: Mapping[str, tuple[Kernel, ...]]
    host_inputs: Mapping[str, frozenset[int]]
    host_outputs: Mapping[str, frozenset[int]]
    host_operators: frozenset[str]

    def is_spelled_out(self, domain: str, op_type: str, opset: int) -> bool:
        """Say whether onnxruntime puts an operator's definition in its place: no side has a kernel."""
        schema = _schema(op_type, opset, "" if domain == "ai.onnx" else domain)
        if schema is None:
            return False
        kinds = ("has_function", "has_context_dependent_function")  # onnx does not declare them
        defined = any(bool(getattr(schema, kind)) for kind in kinds)
        return defined and op_type not in self.kernels and op_type not in self.host_operators

    def problem(
        self, domain: str, op_type: str, opset: int, inputs: Sequence[int], outputs: Sequence[int]
    ) -> str | None:
        """Return why no kernel serves a node, in words; None if one does.

        `inputs` and `outputs` are element types, 0 where a value is left out or its type is not known: such
        a one fits every kernel.
        """
        name = f"{domain}::{op_type}" if domain not in ("", "ai.onnx") else op_type
        known = self.kernels.get(name)
        if known is None:
            return f"the provider has no kernel for {name}"
        schema = _schema(op_type, opset, "" if domain == "ai.onnx" else domain)
        version = schema.since_version if schema is not None else 1
        serving = [kernel for kernel in known if kernel.serves(version)]
        if not serving:
            ranges = ", ".join(f"{k.first}-{k.last if k.last is not None else ''}" for k in known)
            return f"the provider's kernels for {name} serve opsets {ranges}, not its version {version}"
        if schema is None:
            return None
        wanted = _types(schema, inputs, outputs)
        if any(_fits(kernel, wanted) for kernel in serving):
            return None
        types = "; ".join(
            sorted(
                {f"{letter} of {', '.join(sorted(k.types[letter]))}" for k in serving for letter in k.types}
            )
        )
        given = ", ".join(f"{letter} = {kind}" for letter, kind in sorted(wanted.items()))
        return f"the provider's kernels for {name} are for {types}, not for {given}"


@functools.cache
def _schema(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def _types(schema: onnx.defs.OpSchema, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, str]:
    """Return the element type that each type letter of an operator, and each port by name, stands for."""
    found: dict[str, str] = {}
    for ports, elements in ((schema.inputs, inputs), (schema.outputs, outputs)):
        for index, element in enumerate(elements):
            port = ports[min(index, len(ports) - 1)] if ports else None
            if port is not None and element:
                found.setdefault(port.type_str, type_name(element))
                found.setdefault(port.name, type_name(element))
    return found


def _fits(kernel: Kernel, wanted: Mapping[str, str]) -> bool:
    return all(wanted[letter] in types for letter, types in kernel.types.items() if letter in wanted)


@functools.cache
def cuda_kernels() -> KernelTable:
    """Return the committed table of the CUDA provider."""
    data = json.loads(_PATH.read_text())
    kernels = {
        name: tuple(
            Kernel(first, last, {letter: frozenset(names) for letter, names in types.items()})
            for first, last, types in rows
        )
        for name, rows in data["kernels"].items()
    }
    memory = data["host_memory"]
    return KernelTable(
        provider=data["provider"],
        onnxruntime=data["onnxruntime"],
        source=data["source"],
        kernels=kernels,
        host_inputs={name: frozenset(ins) for name, (ins, _) in memory.items()},
        host_outputs={name: frozenset(outs) for name, (_, outs) in memory.items()},
        host_operators=frozenset(data["host_operators"]),
    )
