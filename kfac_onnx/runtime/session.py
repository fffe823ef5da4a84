"""Training with plain ONNX Runtime: open a transformed model, step, read the parameters.

One step runs the stages of `passes.partition` in order (DESIGN section 6): loss and gradients at the
parameters as they are, factors take in the batch, the root is refreshed when due, updates are computed, and
only then is anything that lasts written. If a gradient, factor or update is not finite, what the step
wrote is undone, the step is counted as skipped, and only the data position and the schedule advance.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.files import load_model, save_model
from kfac_onnx.metadata import Loss
from kfac_onnx.passes.partition import partition
from kfac_onnx.providers import provider_list
from kfac_onnx.runtime import schedules
from kfac_onnx.runtime.batches import checked_batch
from kfac_onnx.runtime.checkpoint import (
    Checkpoint,
    given_values,
    kfac_metadata,
    model_bytes,
    proto_of,
    read_checkpoint,
    require_same,
    write_checkpoint,
)
from kfac_onnx.runtime.engine import Engine
from kfac_onnx.runtime.evaluation import Evaluator
from kfac_onnx.runtime.export import forward_model, write_into
from kfac_onnx.runtime.fitting import FitResult, Row, fit
from kfac_onnx.runtime.halves import Halves
from kfac_onnx.runtime.opening import (
    assignable,
    batch_inputs,
    build_constants,
    build_holders,
    check_names,
    learning_rates,
    own_outputs,
    require_step,
)
from kfac_onnx.runtime.probe import plan_problem
from kfac_onnx.runtime.seeds import seed_random_nodes
from kfac_onnx.runtime.stepper import Stepper
from kfac_onnx.runtime.tensors import device_of
from kfac_onnx.runtime.views import Description, Metrics, Parameters, describe
from kfac_onnx.runtime.weights import stored_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from kfac_onnx.runtime.schedules import Schedule
    from kfac_onnx.runtime.stored import Array

__all__ = ["TrainingSession"]

_log = logging.getLogger(__name__)


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
        parameters: Mapping[str, Array] | str | Path | None = None,
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
        checks = [check for check in step.id_checks if check.negatives == "reject" or not self._device.is_cpu]
        watch = [check.ids for check in checks]
        self._extra = own_outputs(loaded, step)
        plan = partition(loaded, watch=[*watch, *self._extra])
        self._random_operators = seed_random_nodes((stage.model for stage in plan.stages), seed)
        self._plan = plan
        self._metadata = kfac_metadata(loaded)
        loss = metadata.read(loaded, "loss", Loss)
        self._reduction = "unknown" if loss is None else loss.reduction
        self._evaluator: Evaluator | None = None
        self._serialized: bytes | None = None
        values: dict[str, Array] = (
            stored_weights(parameters) if isinstance(parameters, (str, Path)) else {**(parameters or {})}
        )
        check_names(plan, values)
        self.in_place_problem = plan_problem(plan, self._providers, self._device)
        self._holders = build_holders(plan, values, self._device, in_place=self.in_place_problem is None)
        self._constants = build_constants(plan, values, self._device)
        self.batch_inputs = batch_inputs(plan, self._constants)
        self.learning_rates = learning_rates(step, lr, rest_lr)
        self._rates = {name: np.zeros((), np.float32) for name in self.learning_rates}
        self.schedule = schedules.parse(schedule) if isinstance(schedule, str) else schedule
        self.committed = self.skipped = self.position = 0
        host = {step.ok, *step.ends, *watch, *self._extra}
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
        self._stepper = Stepper(plan, self._engine, checks)
        self._halves = Halves(step.predictions, self.batch_inputs, self._stepper, self._engine)
        self.closed = False

    # -- one step --------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, np.ndarray], *, training: bool = True) -> dict[str, np.ndarray]:
        """Return the predictions of a graph whose loss lies outside, by name: the first half of a step.

        The loss is the caller's; `predictions` says which batch input of `step` takes which of its gradients:

            made = session.forward({"ids": ids})                           # {"pred": float32[B, V]}
            session.step({"ids": ids, "pred_grad": softmax(made["pred"]) - onehot})

        A `step` with the very arrays of the last `forward` goes on from it, so that both halves see the same
        dropout; with other arrays it runs both halves. `training=False` turns dropout off and is no part of a
        step. Gradients of predictions may be left out of the batch.

        Raises:
            UserError: as `step`, and where the loss is in the graph.

        """
        self._require_open()
        return self._halves.forward(batch) if training else self._evaluation().outputs(batch)

    def step(self, batch: Mapping[str, np.ndarray]) -> Metrics:
        """Make one training step on a batch of arrays by input name.

        A step whose gradients, factors or updates are not finite changes no parameter and no state. Where the
        loss lies outside the graph, the batch holds the gradients of the predictions too (see `forward`), and
        the loss of the metrics is None.

        Raises:
            UserError: a name, dtype, shape or id of the batch is wrong; nothing was written.

        """
        self._require_open()
        ready = checked_batch(batch, self.batch_inputs)
        half = self._halves.take(batch)
        factor = 1.0 if self.schedule is None else self.schedule.factor(self.position)
        for name, rate in self.learning_rates.items():
            self._rates[name][...] = rate * factor
        loss, kept = self._stepper.step({**ready, **(half or {})}, forwarded=half is not None)
        self.position += 1
        if kept:
            self.committed += 1
        else:
            self.skipped += 1
            _log.info("batch %d was skipped: a gradient, factor or update is not finite", self.position)
        first = next(iter(self.learning_rates.values()), 0.0) * factor
        metrics: Metrics = {"loss": loss, "skipped": not kept, "step": self.committed, "lr": first}
        if self._extra:
            metrics["outputs"] = {name: np.array(self._engine.read(name)) for name in self._extra}
        return metrics

    @property
    def predictions(self) -> dict[str, str | None]:
        """Where the loss lies outside: each prediction, and the input of its gradient (None: it has none)."""
        return dict(self._halves.predictions)

    @property
    def host_roots(self) -> int:
        """How often an inverse root was computed on the host, because the graph's missed its tolerance."""
        return self._stepper.host_roots

    # -- what it holds ---------------------------------------------------------------------------

    @property
    def parameters(self) -> Parameters:
        """The trained parameters, copied when read."""
        return Parameters(self._holders)

    @property
    def updates_parameters(self) -> bool:
        """Whether a step changes parameters; a dense model without an optimizer leaves that to the caller."""
        held = [holder.state for holder in self._holders.values()]
        return any(state.role == "parameter" and state.output != state.input for state in held)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """Copies of everything that a step changes, by the name of its input in the model."""
        return {name: holder.live.read() for name, holder in self._holders.items()}

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
        """Return the loss per example over batches at the current weights, with dropout off.

        A mean loss counts each batch by its examples, a summed loss is divided by them. Inputs that only the
        backward part reads may be left out of the batches.

        Raises:
            UserError: as `step`, and where there is no batch.

        """
        self._require_open()
        self.require_loss("evaluate")
        return self._evaluation().mean(batches)

    def _evaluation(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = Evaluator(
                self._plan,
                self._holders,
                self._constants,
                self.batch_inputs,
                reduction=self._reduction,
                providers=self._providers,
                device=self._device,
                threads=self._threads or 0,
            )
        return self._evaluator

    def require_loss(self, what: str) -> None:
        """Raise UserError where the loss lies outside the graph, so that `what` cannot be done."""
        self._halves.require_loss(what)

    def fit(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        *,
        steps: int | None = None,
        epochs: int | None = None,
        held_out: Iterable[Mapping[str, np.ndarray]] | None = None,
        eval_every: int | None = None,
        metrics: Callable[[Row], None] | str | Path | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
    ) -> FitResult:
        """Train on an iterable of dicts of arrays, or on `data.Batches`, which go on where the run is.

        Args:
            batches: the training data; iterated again for every epoch.
            steps: how many more steps.
            epochs: how many more passes over the data; without steps and epochs, to the end of the data.
            held_out: batches to evaluate, at the end and
            eval_every: every so many steps.
            metrics: called with a `Row` per step, or a file to which rows are added as JSON lines.
            progress: show a progress bar on stderr.
            checkpoint: file to save to (its folder is made), at the end and
            checkpoint_every: every so many steps.

        Raises:
            UserError: as `step`.

        """
        return fit(
            self,
            batches,
            steps=steps,
            epochs=epochs,
            held_out=held_out,
            eval_every=eval_every,
            metrics=metrics,
            progress=progress,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        """Replace the values of trained parameters; nothing is written if one does not fit.

        Raises:
            UserError: an unknown name, or another shape or dtype.

        """
        self._require_open()
        self._halves.forget()
        for name, array in assignable(self._plan, self._holders, values).items():
            self._holders[name].live.write(array)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint with everything a run needs to go on; whole or not at all.

        Random operators in the graph (Dropout) start their sequence anew after `resume`.

        Raises:
            UserError: the place cannot be written.

        """
        self._require_open()
        checkpoint = Checkpoint(
            model=self._model_bytes(),
            states={name: holder.live.view() for name, holder in self._holders.items()},
            constants={name: buffer.view() for name, buffer in self._constants.items()},
            committed=self.committed,
            skipped=self.skipped,
            position=self.position,
            host_roots=self.host_roots,
            learning_rates=self.learning_rates,
            schedule=None if self.schedule is None else str(self.schedule),
            seed=self._seed,
        )
        write_checkpoint(path, checkpoint)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        model: str | Path | ir.Model | None = None,
        providers: Sequence[str | tuple[str, Mapping[str, object]]] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> TrainingSession:
        """Return a session that goes on where `save` was called.

        Args:
            path: the checkpoint; it holds the model.
            model: the model that the caller expects it to be of; another one is an error.
            providers: as for a new session.
            threads: as for a new session.

        Raises:
            UserError: no such file, a damaged one, or a checkpoint of another model.

        """
        checkpoint = read_checkpoint(path)
        if model is not None:
            loaded = model if isinstance(model, ir.Model) else load_model(model)
            require_step(loaded, "the model" if isinstance(model, ir.Model) else f"'{model}'")
            require_same(checkpoint, path, loaded)
        session = cls(
            ir.from_proto(proto_of(checkpoint)),
            providers=providers,
            threads=threads,
            parameters=given_values(checkpoint),
            schedule=checkpoint.schedule,
            seed=checkpoint.seed,
        )
        for name, holder in session._holders.items():
            if holder.state.initial != "parameter":
                holder.live.write(checkpoint.states[name])
        session.learning_rates.update(checkpoint.learning_rates)
        session.committed, session.skipped = checkpoint.committed, checkpoint.skipped
        session.position = checkpoint.position
        session._stepper.host_roots = checkpoint.host_roots
        session._serialized = checkpoint.model
        return session

    def _model_bytes(self) -> bytes:
        if self._serialized is None:
            self._serialized = model_bytes(self._plan, self._metadata)
        return self._serialized

    def export(
        self,
        path: str | Path,
        *,
        outputs: Sequence[str] | None = None,
        into: str | Path | None = None,
    ) -> dict[str, str]:
        """Write a forward graph with the trained weights; return the place of each weight in it.

        Args:
            path: the file to write.
            outputs: values of the training graph to cut at; inputs that they do not need are left out.
                None cuts at the loss, or at the predictions where the loss lies outside the graph.
            into: a forward model of the user's; its initializers get the weights, by name or shape.

        Raises:
            UserError: an unknown output, a weight that fits nowhere, a place that cannot be written.

        """
        self._require_open()
        weights = {**self.parameters}
        if into is not None:
            if outputs is not None:
                raise UserError("outputs and into cannot be given together")
            return write_into(weights, into, path)
        constants = {name: buffer.read() for name, buffer in self._constants.items()}
        model = forward_model(self._plan, constants | weights, outputs or self._plan.step.ends)
        save_model(model, path)
        return {name: name for name in weights if name in model.graph.initializers}

    def describe(self) -> Description:
        """Return what runs where: providers, phases, how each state is held, and what was fallen back on."""
        return describe(
            providers=self._providers,
            device=self._device,
            threads=self._threads,
            stages=[runner.stage.name for runner in self._engine.runners],
            holders=self._holders,
            in_place_problem=self.in_place_problem,
            random_operators=self._random_operators,
        )

    def _require_open(self) -> None:
        if self.closed:
            raise UserError("the training session is closed", help="open a new one, or resume a checkpoint")

    def close(self) -> None:
        """Release sessions and buffers."""
        if not self.closed:
            self.closed = True
            self._engine.close()
            self._evaluator = None

    def __enter__(self) -> TrainingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
