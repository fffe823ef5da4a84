"""The forward part of the graph, with dropout off, at the current weights: the loss on held-out batches.

Where the loss lies outside the graph, the forward part ends at the predictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.errors import UserError, did_you_mean, first_line
from kfac_onnx.runtime.feed.batches import checked_batch, examples_in, rows_in
from kfac_onnx.runtime.feed.ids import check_given, check_ids, explain_failure, origin_of
from kfac_onnx.runtime.step.tensors import Buffer, Device, open_session
from kfac_onnx.step.plan import extract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import onnxruntime as ort

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.step.runner import Holder
    from kfac_onnx.step.plan import Plan

__all__ = ["Evaluator"]


class Evaluator:
    """A session for the loss (or predictions) alone, reading the training session's own buffers."""

    def __init__(
        self,
        plan: Plan,
        holders: Mapping[str, Holder],
        constants: Mapping[str, Buffer],
        batch: Sequence[BatchInput],
        *,
        reduction: str,
        providers: Providers,
        device: Device,
        threads: int,
        further: Sequence[str] = (),
    ) -> None:
        self._plan = plan
        self._holders = holders
        self._constants = constants
        self._reduction = reduction
        self._device = device
        self._outputs = plan.step.ends
        self._further = [name for name in further if name not in self._outputs]
        # The CPU's kernels fail for an id that is no row; a device's do not, so that ids are looked at.
        # A negative label is one of the last classes to either.
        self._checks = tuple(
            check for check in plan.step.id_checks if check.kind == "labels" or not device.is_cpu
        )
        known = {item.name for item in batch}
        self._computed = [name for name in dict.fromkeys(c.ids for c in self._checks) if name not in known]
        self._wanted = [name for name in self._further if name not in known]
        self._made = list(dict.fromkeys([*self._outputs, *self._computed, *self._wanted]))
        try:
            parts = extract(plan, self._made)
        except KeyError as e:
            missing = str(e.args[0])
            values = [name for item in plan.source.items for name in item.makes]
            raise UserError(
                f"the graph has no value '{missing}'{did_you_mean(missing, [*known, *values])}",
                help="--scores and --labels name values of the graph that is trained",
            ) from e
        self._session = open_session(parts, providers, threads=threads)
        used = [info.name for info in self._session.get_inputs()]
        self._inputs = [item for item in batch if item.name in used]
        self._known = [item.name for item in batch]
        self._bound = [name for name in used if name not in {item.name for item in batch}]

    def _value(self, name: str) -> ort.OrtValue:
        return self._holders[name].live.value if name in self._holders else self._constants[name].value

    def outputs(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the loss or predictions of one batch; what only the backward part reads may be left out.

        Raises UserError as `TrainingSession.step` does.
        """
        made = self._values(batch)
        return {name: made[name] for name in self._outputs}

    def _values(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs, and the further values that this evaluator is for."""
        ready = checked_batch(batch, self._inputs, allowed=self._known)
        check_given(self._plan, self._checks, ready)
        binding = self._session.io_binding()
        for name in self._bound:
            binding.bind_ortvalue_input(name, self._value(name))
        for name, value in ready.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._made:
            binding.bind_output(name, "cpu", 0)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:
            if not from_onnxruntime(e):
                raise
            explain_failure(self._plan, ready, self._value)
            raise UserError(f"the batch cannot be run through the graph: {first_line(e)}") from e
        if not self._device.is_cpu:
            binding.synchronize_outputs()
        names = [item.name for item in self._session.get_outputs()]
        made = {name: value.numpy() for name, value in zip(names, binding.get_outputs(), strict=True)}
        for check in self._checks:
            if check.ids in made:
                check_ids(check, made[check.ids], lambda check=check: origin_of(self._plan, check, ready))
        for name in self._further:
            if name not in made:
                value = ready[name] if name in ready else batch[name]
                made[name] = value if isinstance(value, np.ndarray) else value.numpy()
        return made

    def loss(self, batch: Mapping[str, np.ndarray]) -> float:
        """Return the loss of one batch, as `outputs` does."""
        return self._loss_in(self.outputs(batch))

    def _loss_in(self, values: Mapping[str, np.ndarray]) -> float:
        (name,) = self._outputs
        return float(np.asarray(values[name], np.float64).reshape(()))

    def _examples(self, batch: Mapping[str, np.ndarray]) -> int:
        if (examples := rows_in(batch)) is not None:
            return examples
        return examples_in({name: batch[name] for name in self._known if name in batch})

    def mean(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        observe: Callable[[Mapping[str, np.ndarray]], None] = lambda values: None,
    ) -> float:
        """Return the loss per example over all batches; `observe` sees the values of each.

        A mean (or unknown) loss counts each batch by its examples, a summed loss is divided by them.

        Raises UserError when there is no batch.
        """
        total, examples = 0.0, 0
        for batch in batches:
            size = self._examples(batch)
            values = self._values(batch)
            observe(values)
            total += self._loss_in(values) * (1 if self._reduction == "sum" else size)
            examples += size
        if examples == 0:
            raise UserError("there is no batch to evaluate")
        return total / examples
