"""What an engine runs: a stage with its session and ports, and the buffers of a state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

    from kfac_onnx.metadata import State
    from kfac_onnx.runtime.step.tensors import Buffer
    from kfac_onnx.step.plan import Stage

__all__ = ["Holder", "Port", "Runner", "StageError"]


class StageError(Exception):
    """ONNX Runtime could not run a stage; the text is the first line of its own.

    `other_shape`: an output that was bound to memory turned out to have another shape.
    """

    def __init__(self, text: str, stage: str = "", *, other_shape: bool = False) -> None:
        super().__init__(text)
        self.stage = stage
        self.other_shape = other_shape


@dataclass
class Holder:
    """A state's buffers; `current` is the one that holds its value between steps."""

    state: State
    buffers: list[Buffer]
    current: int = 0

    @property
    def live(self) -> Buffer:
        """The buffer that holds the state's value."""
        return self.buffers[self.current]


@dataclass
class Port:
    """How a stage's input or output finds its value: a state's buffer, a fixed value, or the flow."""

    name: str
    holder: int | None = None
    spare: bool = False
    fixed: ort.OrtValue | None = None
    flow: bool = False
    batch: bool = False


@dataclass
class Runner:
    """A stage with its session, ports and cached bindings.

    `loose` outputs are allocated by ONNX Runtime, with their place in the outputs; `moving` inputs are bound
    at every run, those of the `batch` among them. While `keeps` holds, loose outputs stay bound as long as
    the batch has the same shapes; `kept` has, for each binding, those shapes and the outputs, and
    `bound` the values from other stages that it reads.
    """

    stage: Stage
    session: ort.InferenceSession
    inputs: list[Port]
    outputs: list[Port]
    holders: tuple[int, ...]
    loose: tuple[tuple[int, str], ...]
    moving: tuple[Port, ...]
    keeps: bool
    batch: tuple[str, ...]
    bindings: dict[tuple[int, ...], ort.IOBinding] = field(
        default_factory=dict[tuple[int, ...], "ort.IOBinding"]
    )
    bound: dict[tuple[int, ...], dict[str, ort.OrtValue]] = field(
        default_factory=dict[tuple[int, ...], dict[str, "ort.OrtValue"]]
    )
    kept: dict[tuple[int, ...], tuple[object, dict[str, ort.OrtValue]]] = field(
        default_factory=dict[tuple[int, ...], tuple[object, dict[str, "ort.OrtValue"]]]
    )
