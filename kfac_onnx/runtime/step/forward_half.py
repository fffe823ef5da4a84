"""A step in two halves, where the loss lies outside the graph.

The first half computes the predictions and hands them out; the host computes the loss and its gradients with
respect to them; the second half takes these in. Between the halves activations stay where they were made, so
that both see the same dropout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.batches import checked_batch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime as ort

    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.step.engine import Engine
    from kfac_onnx.runtime.step.stepper import Stepper

    Ready = Mapping[str, np.ndarray | ort.OrtValue]

__all__ = ["Halves"]


class Halves:
    """The first half of a step, and what it ran on; `predictions` maps each to the input of its gradient."""

    def __init__(
        self,
        predictions: Mapping[str, str | None],
        inputs: Sequence[BatchInput],
        stepper: Stepper,
        engine: Engine,
    ) -> None:
        self.predictions = predictions
        self._late = [name for name in predictions.values() if name is not None]
        self._early = [item for item in inputs if item.name not in self._late]
        self._stepper = stepper
        self._engine = engine
        self._given: Mapping[str, np.ndarray] = {}
        self._ready: Ready | None = None

    def forward(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the first half and return copies of the predictions.

        Raises UserError where the loss is in the graph, and as `TrainingSession.step` does.
        """
        if not self.predictions:
            raise UserError(
                "the graph computes its own loss, so it hands out nothing before a step",
                help="call step(batch), or export(outputs=[...]) for a forward model",
            )
        ready = checked_batch(batch, self._early, allowed=self._late)
        self.forget()
        self._stepper.forward(ready)
        self._given, self._ready = {item.name: batch[item.name] for item in self._early}, ready
        return {name: np.array(self._engine.read(name)) for name in self.predictions}

    def forget(self) -> None:
        """Let the next step run both halves: something that the first half read has changed."""
        self._given, self._ready = {}, None

    def take(self, batch: Mapping[str, np.ndarray]) -> Ready | None:
        """Return what the first half ran on if it was given the same arrays, and forget it."""
        ready, given = self._ready, self._given
        self.forget()
        same = ready is not None and all(batch[name] is array for name, array in given.items())
        return ready if same else None

    def require_loss(self, what: str) -> None:
        """Raise UserError where the loss lies outside the graph, so that `what` cannot be done."""
        if not self.predictions:
            return
        fed = ", ".join(f"'{name}'" for name in self._late)
        raise UserError(
            f"the loss lies outside the graph, which takes its gradients {fed}: the session cannot {what}",
            help="call forward(batch), compute the loss and its gradients, then step(batch with them)",
        )
