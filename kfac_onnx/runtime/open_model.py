"""A transformed model, opened: its buffers, sessions and rates, and what can be read of them.

`TrainingSession` adds what changes them: steps, checkpoints, export.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.device.providers import provider_list
from kfac_onnx.disk.models import load_model
from kfac_onnx.errors import UserError, VerifyError, first_line
from kfac_onnx.graph.verifier import require_sound
from kfac_onnx.metadata import Loss, Parameter, Site
from kfac_onnx.runtime import schedules
from kfac_onnx.runtime.description import Description, Parameters, describe
from kfac_onnx.runtime.evaluation import Evaluator
from kfac_onnx.runtime.feed.feeding import Feeder
from kfac_onnx.runtime.health import RootHealth, root_health
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
from kfac_onnx.runtime.random.random_nodes import KEYS
from kfac_onnx.runtime.random.seeds import seed_random_nodes
from kfac_onnx.runtime.random.stateless import RandomKeys, make_stateless
from kfac_onnx.runtime.saved.checkpoint import kfac_metadata
from kfac_onnx.runtime.saved.weights import stored_weights
from kfac_onnx.runtime.step.bodies import use_bodies_for
from kfac_onnx.runtime.step.device_engine import DeviceEngine
from kfac_onnx.runtime.step.engine import Engine
from kfac_onnx.runtime.step.forward_half import Halves
from kfac_onnx.runtime.step.probe import plan_problem
from kfac_onnx.runtime.step.skips import SkipFinder
from kfac_onnx.runtime.step.stepper import Stepper
from kfac_onnx.runtime.step.tensors import device_of
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from kfac_onnx.disk.stored import Array
    from kfac_onnx.runtime.schedules import Schedule
    from kfac_onnx.step.plan import Plan

__all__ = ["OpenModel"]


_log = logging.getLogger(__name__)


def _divided(model: ir.Model, target: str | None, watch: list[str], name: str, *, cpu: bool) -> Plan:
    """Return the stages of a step, with the bodies of operators that are meant for the device.

    Raises UserError where what the file says of its phases contradicts its nodes.
    """
    try:
        plan = partition(model, watch=watch, sequential=cpu)
    except VerifyError as e:
        raise UserError(
            f"{name} cannot be divided into phases: {first_line(e)}",
            help="make it again from the training graph that its exporter wrote",
        ) from e
    stages = [*plan.stages, *([] if plan.short is None else [plan.short.whole])]
    if use_bodies_for(stages, target, cpu=cpu) and not cpu:
        _log.warning(
            "%s was lowered for %s: a step may copy what it counts; transform it with target cuda",
            name,
            "a target that it does not say" if target is None else f"'{target}'",
        )
    return plan


class OpenModel:
    """A transformed model on the buffers of its device; arguments and errors are `TrainingSession`'s."""

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
        cuda_graph: bool = False,
    ) -> None:
        if threads is not None and threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}")
        name = "the model" if isinstance(model, ir.Model) else f"'{model}'"
        loaded = model if isinstance(model, ir.Model) else load_model(model)
        step = require_step(loaded, name)
        require_sound(loaded, None if isinstance(model, ir.Model) else str(model))
        self._providers = provider_list(providers)
        self._device = device_of(self._providers)
        if cuda_graph and self._device.name != "cuda":
            raise UserError(
                f"there are no CUDA graphs on the device '{self._device.name}'",
                help="give the CUDA provider (--provider cuda), or leave cuda_graph (--cuda-graph) out",
            )
        self._threads = threads
        self._seed = seed
        checks = [check for check in step.id_checks if check.negatives == "reject" or not self._device.is_cpu]
        watch = [check.ids for check in checks]
        self._extra = own_outputs(loaded, step)
        plan = _divided(loaded, step.target, [*watch, *self._extra], name, cpu=self._device.is_cpu)
        short = plan.short
        parts = [*(stage.model for stage in plan.stages), *([] if short is None else [short.whole.model])]
        self._random = RandomKeys(
            make_stateless(parts, plan.source.types) if self._device.is_cpu else (), seed
        )
        self._restarting = seed_random_nodes(parts[: len(plan.stages)], seed)
        if self._restarting:  # two sessions would draw from two sequences
            plan = replace(plan, short=None)
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
        self.committed: int = 0
        self.skipped: int = 0
        self.position: int = 0
        self.source: str | None = None
        self.data: dict[str, int | bool | None] | None = None
        self._folders: set[Path] = set()
        self._damaged: tuple[Path, ...] = ()
        host = {step.ok, *step.ends, *watch, *self._extra}
        host.update(stage.condition for stage in plan.stages if stage.condition is not None)
        host.update(check.residual for check in step.root_checks)
        host.update(() if plan.short is None else plan.short.due)
        scalars = {**self._rates, **({KEYS: self._random.array} if len(self._random) else {})}
        batch = [item.name for item in self.batch_inputs]
        self._feeder: Feeder | None = None
        if self._device.is_cpu:
            self._engine = Engine(
                plan,
                self._holders,
                constants=self._constants,
                scalars=scalars,
                batch=batch,
                host=host,
                providers=self._providers,
                device=self._device,
                threads=threads or 0,
            )
        else:
            lock = threading.Lock()
            self._feeder = Feeder(self._device, self.batch_inputs, lock)
            self._engine = DeviceEngine(
                plan,
                self._holders,
                constants=self._constants,
                scalars=scalars,
                batch=batch,
                providers=self._providers,
                device=self._device,
                threads=threads or 0,
                cuda_graph=cuda_graph,
                lock=lock,
            )
        self._stepper = Stepper(plan, self._engine, checks)
        self._skips = SkipFinder(
            plan,
            self._engine,
            self._constants,
            self.batch_inputs,
            self._providers,
            self._random,
            sites=metadata.read_list(loaded, "sites", Site),
            parameters=metadata.read_list(loaded, "parameters", Parameter),
        )
        self._halves = Halves(step.predictions, self.batch_inputs, self._stepper, self._engine)
        self.closed = False

    @property
    def predictions(self) -> dict[str, str | None]:
        """Where the loss lies outside: each prediction, and the input of its gradient (None: it has none)."""
        return dict(self._halves.predictions)

    @property
    def cuda_graph_problems(self) -> dict[str, str]:
        """Where CUDA graphs were asked for: each stage that has none, and why."""
        return dict(self._engine.graph_problems) if isinstance(self._engine, DeviceEngine) else {}

    @property
    def host_roots(self) -> int:
        """How often an inverse root was computed on the host, because the graph's missed its tolerance."""
        return self._stepper.host_roots

    @property
    def root_fallbacks(self) -> int:
        """The same: how often a root of the graph's could not be trusted, so that the host took over."""
        return self._stepper.roots.fallbacks

    def health(self) -> tuple[RootHealth, ...]:
        """Return how well conditioned each table's output factor is now, and how well its root fits it.

        Computed on the host when it is called: an eigendecomposition per table.
        """
        self._require_open()
        plan, held = self._plan, self._holders
        return root_health(
            plan.source.items,
            plan.step.root_checks,
            plan.states,
            lambda name: held[name].live.view(),
            self._stepper.roots.records,
        )

    @property
    def parameters(self) -> Parameters:
        """The trained parameters, copied when read."""
        self._require_whole()
        return Parameters(self._holders)

    @property
    def updates_parameters(self) -> bool:
        """Whether a step changes parameters; a dense model without an optimizer leaves that to the caller."""
        held = [holder.state for holder in self._holders.values()]
        return any(state.role == "parameter" and state.output != state.input for state in held)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """Copies of everything that a step changes, by the name of its input in the model."""
        self._require_whole()
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

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        """Replace the values of trained parameters; nothing is written if one does not fit.

        Raises:
            UserError: an unknown name, or another shape or dtype.

        """
        self._require_open()
        self._halves.forget()
        for name, array in assignable(self._plan, self._holders, values).items():
            self._holders[name].live.write(array)

    def describe(self) -> Description:
        """Return what runs where: providers, phases, how each state is held, and what was fallen back on."""
        return describe(
            providers=self._providers,
            device=self._device,
            threads=self._threads,
            stages=[runner.stage.name for runner in self._engine.runners],
            holders=self._holders,
            in_place_problem=self.in_place_problem,
            random_operators=len(self._random) + self._restarting,
            random_restarts=self._restarting,
        )

    def _require_open(self) -> None:
        if self.closed:
            raise UserError("the training session is closed", help="open a new one, or resume a checkpoint")
        self._require_whole()

    def _require_whole(self) -> None:
        """Raise UserError where a step failed half-way through its writes."""
        if self._stepper.broken:
            raise UserError(
                "the parameters and states of this session are half written: onnxruntime failed in a step",
                help="go on from the last checkpoint: TrainingSession.resume(...), or train --resume",
            )

    def close(self) -> None:
        """Release sessions and buffers."""
        if not self.closed:
            self.closed = True
            self._engine.close()
            self._evaluator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
