"""Where the nodes and states of a factor go: into the draft of a step, under one prefix of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kfac_onnx.dialect import DOMAIN
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import FLOAT, INT64

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter, Out
    from kfac_onnx.step.draft import Draft

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """A draft, the prefix of its states' names, and the parameter that they serve (None: a block alone).

    In a step every factor takes in the batch before it is read, schedules say when roots are refreshed, and
    states are kept only if the step is. A block alone is updated when its caller says so.
    """

    draft: Draft
    prefix: str
    parameter: str | None

    @property
    def in_step(self) -> bool:
        """Whether the nodes become part of a training step."""
        return self.parameter is not None

    def emitter(self, phase: Phase) -> Emitter:
        """Return the emitter of a phase."""
        return self.draft.outer.derive(site=self.parameter, phase=phase)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[Out],
        phase: Phase = Phase.GRADIENTS,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add an `ai.kfac` operator and return its outputs."""
        results = self.emitter(phase).node(
            op_type, inputs, domain=DOMAIN, attributes=attributes, outputs=list(outputs)
        )
        self.draft.remember(*results)
        return results

    def state(
        self,
        what: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        initial: str | float,
        role: Literal["factor", "root", "counter", "scratch"] = "factor",
    ) -> ir.Value:
        """Add the state `<prefix>/<what>`."""
        name = f"{self.prefix}/{what}"
        return self.draft.state(name, dtype, shape, initial, role, parameter=self.parameter)

    def counter(self, what: str, dtype: ir.DataType = INT64, initial: float = 0.0) -> ir.Value:
        """Add a scalar state."""
        return self.state(what, dtype, [], initial, "counter")

    def flag(self, value: ir.Value) -> None:
        """Let the step be kept only if a tensor is finite."""
        if self.in_step:
            with self.draft.at(self.draft.outer.derive(site=self.parameter)):
                self.draft.flag(value)

    def number(self, value: float) -> ir.Value:
        """Return a float32 constant."""
        return self.draft.outer.constant(np.float32(value), "number")

    def float32(self, value: ir.Value, phase: Phase = Phase.GRADIENTS) -> ir.Value:
        """Return a value as float32."""
        if value.dtype == FLOAT:
            return value
        emit = self.emitter(phase)
        return emit.node("Cast", [value], attributes={"to": FLOAT}, dtype=FLOAT, shape=value.shape)
