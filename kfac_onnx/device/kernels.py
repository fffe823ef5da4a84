"""Which operators the installed onnxruntime has kernels for: the wheel itself is asked.

Beside the operators of the ONNX standard the plain wheel runs some ninety of the domain com.microsoft on the
CPU, others from release to release.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cpu_operators", "has_cpu_kernel", "typed_like"]


class _Kernel(Protocol):
    domain: str
    op_name: str
    provider: str


class _Argument(Protocol):
    typeStr: str  # noqa: N815  its name in onnxruntime


class _Schema(Protocol):
    domain: str
    name: str
    since_version: int
    inputs: Sequence[_Argument]
    outputs: Sequence[_Argument]


class _State(Protocol):
    """What is used of onnxruntime's compiled module, which has no types."""

    def get_all_opkernel_def(self) -> Sequence[_Kernel]: ...
    def get_all_operator_schema(self) -> Sequence[_Schema]: ...


def _state() -> _State:
    return cast("_State", importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state"))


@functools.cache
def cpu_operators() -> frozenset[tuple[str, str]]:
    """Return (domain, operator) of everything that onnxruntime's CPU provider has a kernel for."""
    return frozenset(
        (item.domain, item.op_name)
        for item in _state().get_all_opkernel_def()
        if item.provider == "CPUExecutionProvider"
    )


def has_cpu_kernel(domain: str, op_type: str) -> bool:
    """Say whether the installed onnxruntime runs an operator on the CPU, for some element types at least."""
    return ("" if domain == "ai.onnx" else domain, op_type) in cpu_operators()


@functools.cache
def typed_like(domain: str, op_type: str) -> tuple[int | None, ...] | None:
    """Return for each result of an operator the input that has the same element type (None: no input has).

    Returns None for an operator that onnxruntime does not know.
    """
    schemas = [
        item for item in _state().get_all_operator_schema() if (item.domain, item.name) == (domain, op_type)
    ]
    if not schemas:
        return None
    newest = max(schemas, key=lambda item: item.since_version)
    types = [item.typeStr for item in newest.inputs]
    return tuple(types.index(item.typeStr) if item.typeStr in types else None for item in newest.outputs)
