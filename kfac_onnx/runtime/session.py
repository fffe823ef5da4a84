"""Training with plain ONNX Runtime: open a transformed model, step, read the parameters.

One step runs the stages of `passes.partition` in order (DESIGN section 6): loss and gradients at the
parameters as they are, factors take in the batch, the root is refreshed when due, updates are computed, and
only then is anything that lasts written. If a gradient, factor or update is not finite, what the step
wrote is undone, the step is counted as skipped, and only the data position and the schedule advance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.files import load_model
from kfac_onnx.metadata import State
from kfac_onnx.passes.partition import Slot, partition
from kfac_onnx.runtime import schedules
from kfac_onnx.runtime.batches import checked_batch
from kfac_onnx.runtime.engine import Engine, Runner
from kfac_onnx.runtime.ids import check_ids, explain_failure, origin_of
from kfac_onnx.runtime.opening import (
    batch_inputs,
    build_constants,
    build_holders,
    check_names,
    require_step,
)
from kfac_onnx.runtime.probe import in_place_problem, scatters_of
from kfac_onnx.runtime.roots import eigen_power
from kfac_onnx.runtime.seeds import seed_random_nodes
from kfac_onnx.runtime.tensors import device_of, provider_list
from kfac_onnx.runtime.weights import read_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import onnxruntime as ort

    from kfac_onnx.runtime.engine import Holder
    from kfac_onnx.runtime.schedules import Schedule

__all__ = ["Metrics", "Parameters", "TrainingSession"]

_log = logging.getLogger(__name__)


class Metrics(TypedDict):
    """What a step reports: `step` counts kept steps, `lr` is the factor's product for the tables."""

    loss: float
    skipped: bool
    step: int
    lr: float


class Parameters(Mapping[str, np.ndarray]):
    """The trained parameters as copies, in the exporter's names, layouts and dtypes."""

    def __init__(self, holders: Mapping[str, Holder]) -> None:
        self._holders = {name: holder for name, holder in holders.items() if holder.state.role == "parameter"}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._holders[name].live.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


class TrainingSession:
    """A transformed model that is being trained.

    Args:
        model: a file written by `kfac_onnx.save` or `kfac-onnx transform`, or such a model.
        providers: ONNX Runtime's execution providers; the first one's device holds the buffers.
        parameters: values for parameters, constants and batch inputs that stay the same; a mapping, or a
            file: `.npz`, `.safetensors`, an `.onnx` file's initializers, ONNX Runtime's `.checkpoint`.
        threads: width of the all-thread stages; None takes all cores.
        lr, rest_lr: learning rates of the tables and of everything else; None keeps the model's.
        schedule: a `Schedule` or its text; multiplies both rates.
        seed: of random operators (Dropout) in the graph.

    Raises:
        UserError: the model is not a training step, or a value is missing or does not fit.

    """

    def __init__(
        self,
        model: str | Path | ir.Model,
        *,
        providers: Sequence[str | tuple[str, Mapping[str, object]]] = ("CPUExecutionProvider",),
        parameters: Mapping[str, np.ndarray] | str | Path | None = None,
        threads: int | None = None,
        lr: float | None = None,
        rest_lr: float | None = None,
        schedule: Schedule | str | None = None,
        seed: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}")
        name = "the model" if isinstance(model, ir.Model) else f"'{model}'"
        loaded = model if isinstance(model, ir.Model) else load_model(model)
        step = require_step(loaded, name)
        self._providers = provider_list(providers)
        self._device = device_of(self._providers)
        self._threads = threads
        self._seed = seed
        self._checks = [
            check for check in step.id_checks if check.negatives == "reject" or not self._device.is_cpu
        ]
        watch = [check.ids for check in self._checks]
        outputs = {state.output for state in metadata.read_list(loaded, "state", State)}
        self._extra = [
            value.name
            for value in loaded.graph.outputs
            if step.shape == "dense" and value.name and value.name != step.loss and value.name not in outputs
        ]
        plan = partition(loaded, watch=[*watch, *self._extra])
        if seed is not None:
            seed_random_nodes((stage.model for stage in plan.stages), seed)
        self._plan = plan
        self._metadata = {
            key: value for key, value in loaded.metadata_props.items() if key.startswith("kfac.")
        }
        values = read_weights(parameters) if isinstance(parameters, (str, Path)) else dict(parameters or {})
        check_names(plan, values)
        self.in_place_problem = self._probe()
        self._holders = build_holders(plan, values, self._device, in_place=self.in_place_problem is None)
        self._constants = build_constants(plan, values, self._device)
        self.batch_inputs = batch_inputs(plan, self._constants)
        self.learning_rates = {rate.input: rate.default for rate in step.learning_rates}
        for index, rate in enumerate(step.learning_rates):
            given = rest_lr if index > 0 or "rest" in rate.input else lr
            if given is not None:
                self.learning_rates[rate.input] = float(given)
        self._rates = {name: np.zeros((), np.float32) for name in self.learning_rates}
        self.schedule = schedules.parse(schedule) if isinstance(schedule, str) else schedule
        self.committed = 0
        self.skipped = 0
        self.position = 0
        self.host_roots = 0
        host = {step.loss, step.ok, *watch, *self._extra}
        host.update(stage.condition for stage in plan.stages if stage.condition is not None)
        host.update(check.residual for check in step.root_checks)
        self._engine = Engine(
            plan,
            self._holders,
            constants=self._constants,
            scalars=self._rates,
            batch=[item.name for item in self.batch_inputs],
            host=host,
            providers=self._providers,
            device=self._device,
            threads=threads or 0,
        )
        engine = self._engine
        self._before = engine.stages(lambda slot: slot <= Slot.PRECONDITION)
        self._keep = engine.stages(lambda slot: Slot.PRECONDITION < slot <= Slot.RENORMALIZE)
        self._undo = engine.stages(lambda slot: slot >= Slot.UNDO_READ)
        self.closed = False

    def _probe(self) -> str | None:
        stages = [stage for stage in self._plan.stages if stage.one_thread and stage.writes]
        problem = in_place_problem(
            scatters_of(stage.model for stage in stages), self._providers, self._device
        )
        if problem is not None:
            _log.warning("tables are copied at every step: %s", problem)
        return problem

    # -- one step --------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, np.ndarray]) -> Metrics:
        """Make one training step on a batch of arrays by input name.

        A step whose gradients, factors or updates are not finite changes no parameter and no state.

        Raises:
            UserError: a name, dtype, shape or id of the batch is wrong; nothing was written.

        """
        self._require_open()
        ready = checked_batch(batch, self.batch_inputs)
        factor = 1.0 if self.schedule is None else self.schedule.factor(self.position)
        for name, rate in self.learning_rates.items():
            self._rates[name][...] = rate * factor
        engine = self._engine
        engine.start()
        counted = decided = False
        try:
            for runner in self._before:
                slot = runner.stage.slot
                counted = counted or slot == Slot.COUNT
                ran = self._run_first(runner, ready) if slot == Slot.GRADIENTS else engine.run(runner, ready)
                if slot == Slot.REFRESH and ran:
                    self._check_roots(runner.stage.outputs)
            decided = True
            kept = bool(engine.read(self._plan.step.ok))
            for runner in self._keep if kept else self._undo:
                engine.run(runner, ready)
        except BaseException:
            if counted and not decided:
                for runner in self._undo:
                    engine.run(runner, ready)
                engine.settle()
            raise
        self.position += 1
        if kept:
            engine.swap()
            self.committed += 1
        else:
            engine.settle()
            self.skipped += 1
            _log.info("batch %d was skipped: a gradient, factor or update is not finite", self.position)
        loss = float(engine.read(self._plan.step.loss).reshape(()))
        first = next(iter(self.learning_rates.values()), 0.0) * factor
        return {"loss": loss, "skipped": not kept, "step": self.committed, "lr": first}

    def _run_first(self, runner: Runner, batch: Mapping[str, np.ndarray | ort.OrtValue]) -> bool:
        """Run the gradients, which write nothing, and check the ids that reached the tables."""
        try:
            ran = self._engine.run(runner, batch)
        except Exception as e:  # ONNX Runtime's exceptions share no class of their own
            explain_failure(self._plan, batch, self._value)
            message = f"the batch cannot be run through the graph: {first_line(e)}"
            raise UserError(message, help="nothing was written") from e
        for check in self._checks:
            given = batch.get(check.ids)
            ids = given if isinstance(given, np.ndarray) else self._engine.read(check.ids)
            check_ids(check, ids, lambda check=check: origin_of(self._plan, check, batch))
        return ran

    def _value(self, name: str) -> ort.OrtValue:
        return self._engine.value(name)

    def _check_roots(self, outputs: Sequence[str]) -> None:
        """Replace a root that missed its tolerance by an eigendecomposition in float64."""
        for check in self._plan.step.root_checks:
            if check.root not in outputs:
                continue
            residual = float(self._engine.read(check.residual).reshape(()))
            if residual <= check.tolerance:
                continue
            factor = self._engine.read(check.factor)
            damping = float(self._engine.read(check.damping).reshape(()))
            root = eigen_power(factor, damping, check.exponent)
            if root is not None:
                self._engine.buffer(check.root).write(root)
                self.host_roots += 1
                _log.info(
                    "the root of '%s' was computed on the host (residual %.3g above %.3g)",
                    check.parameter,
                    residual,
                    check.tolerance,
                )

    # -- what it holds ---------------------------------------------------------------------------

    @property
    def parameters(self) -> Parameters:
        """The trained parameters, copied when read."""
        return Parameters(self._holders)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """Copies of everything that a step changes, by the name of its input in the model."""
        return {name: holder.live.read() for name, holder in self._holders.items()}

    def _require_open(self) -> None:
        if self.closed:
            raise UserError("the training session is closed", help="open a new one, or resume a checkpoint")

    def close(self) -> None:
        """Release sessions and buffers."""
        if not self.closed:
            self.closed = True
            self._before, self._keep, self._undo = [], [], []
            self._engine.runners = []

    def __enter__(self) -> TrainingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
