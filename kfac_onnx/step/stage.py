"""A stage of a training step: one sub-model, and when and how a host runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx

    from kfac_onnx.step.slots import Slot

__all__ = ["Stage", "stage_of"]


@dataclass(frozen=True)
class Stage:
    """One sub-model.

    `condition` names the bool scalar that must hold for the stage to run; where it does not, each output is
    the value named in `otherwise` or the array in `fixed`. `writes` maps an output to the `State.input` of
    the in-place state whose buffer it is.
    """

    slot: Slot
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    one_thread: bool
    condition: str | None = None
    otherwise: Mapping[str, str] = field(default_factory=dict[str, str])
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict[str, "np.ndarray"])
    writes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        """The stage's name for people, such as `count-read`."""
        return self.slot.name.lower().replace("_", "-")


def stage_of(slot: Slot, model: onnx.ModelProto, versions: Mapping[str, str], *, lone: bool) -> Stage:
    """Return the stage of a model; outputs that are versions of in-place states are its writes."""
    outputs = tuple(value.name for value in model.graph.output)
    return Stage(
        slot=slot,
        model=model,
        inputs=tuple(value.name for value in model.graph.input),
        outputs=outputs,
        one_thread=lone,
        writes={name: versions[name] for name in outputs if name in versions},
    )
