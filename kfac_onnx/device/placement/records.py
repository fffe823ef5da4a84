"""What a placement is, as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

__all__ = ["CPU", "CUDA", "Copy", "Node", "Placement", "is_inserted"]

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"

INLINED: Final = "_inlfunc_"
"""What onnxruntime names begin with of nodes that came out of a function."""


def is_inserted(name: str) -> bool:
    """Say by its name whether a node, or a node of a function's body, is this package's."""
    from kfac_onnx.dialect import OPERATORS

    if name.startswith(INLINED):
        operator, _, rest = name.removeprefix(INLINED).partition("_")
        return operator in OPERATORS and bool(rest)
    return name.startswith("kfac/")


@dataclass(frozen=True)
class Node:
    """One node: the stage it is in, the provider that runs it, and why, where that is the host.

    `inserted` says whether this package put it there, `operator` which `ai.kfac` operator it is part of.
    `missing` is set where the provider asked for has no kernel, which makes it fall back; a node without it
    is on the host because it only handles sizes, which are there.
    """

    stage: str
    name: str
    op_type: str
    provider: str
    inserted: bool
    operator: str | None = None
    missing: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Copy:
    """A value that is copied between host and device in every step; `inserted`: because of a node of ours.

    `implicit` copies have no Memcpy node: an input of a stage that only the host reads, an output it makes.
    """

    stage: str
    value: str
    direction: Literal["to host", "to device"]
    inserted: bool
    because: tuple[str, ...]
    implicit: bool = False


@dataclass(frozen=True)
class Placement:
    """Where all nodes of a model, or of the stages of a step, run.

    `measured` says whether onnxruntime itself decided, on this machine, or the table of kernels did.
    """

    provider: str
    measured: bool
    onnxruntime: str
    nodes: tuple[Node, ...]
    copies: tuple[Copy, ...]

    def __add__(self, other: Placement) -> Placement:
        return Placement(
            self.provider,
            self.measured and other.measured,
            self.onnxruntime,
            self.nodes + other.nodes,
            self.copies + other.copies,
        )

    @property
    def fallbacks(self) -> tuple[Node, ...]:
        """Inserted nodes that run on the host because the provider has no kernel for them."""
        return tuple(node for node in self.nodes if node.inserted and node.missing)

    @property
    def own_copies(self) -> tuple[Copy, ...]:
        """Copies within a step that inserted nodes cause."""
        return tuple(copy for copy in self.copies if copy.inserted)

    @property
    def user_fallbacks(self) -> tuple[Node, ...]:
        """Nodes of the user's graph that run on the host because the provider has no kernel for them."""
        return tuple(node for node in self.nodes if not node.inserted and node.missing)

    @property
    def user_copies(self) -> tuple[Copy, ...]:
        """Copies within a step that the user's own nodes cause."""
        return tuple(copy for copy in self.copies if not copy.inserted)

    def by_provider(self, *, inserted: bool) -> dict[str, int]:
        """Return how many nodes, of ours or of the user's, each provider runs."""
        return dict(Counter(node.provider for node in self.nodes if node.inserted == inserted))

    def to_json(self) -> dict[str, Any]:
        """Return the placement as plain JSON data."""
        return {
            "provider": self.provider,
            "measured": self.measured,
            "onnxruntime": self.onnxruntime,
            "inserted": self.by_provider(inserted=True),
            "user": self.by_provider(inserted=False),
            "fallbacks": [asdict(node) for node in self.fallbacks],
            "copies": [asdict(copy) for copy in self.own_copies],
            "user_fallbacks": [asdict(node) for node in self.user_fallbacks],
            "user_copies": [asdict(copy) for copy in self.user_copies],
            "nodes": [asdict(node) for node in self.nodes],
        }
