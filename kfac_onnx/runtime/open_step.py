"""A transformed model on the buffers of its device: runs a step when it is told to, and can be read.

It knows nothing of a run: at which position a step stands, which rate a schedule gives it and what is saved
where is `TrainingSession`'s, which has one of these.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.device.providers import provider_list
from kfac_onnx.disk.models import load_model
from kfac_onnx.errors import UserError, VerifyError, first_line
from kfac_onnx.errors.arguments import thread_count
from kfac_onnx.graph.verifier import require_sound
from kfac_onnx.metadata import Loss, Parameter, Site
from kfac_onnx.runtime.description import Description, describe
from kfac_onnx.runtime.evaluation import Evaluator
from kfac_onnx.runtime.feed.batches import checked_batch
from kfac_onnx.runtime.feed.feeding import Feeder
from kfac_onnx.runtime.feed.ids import check_given
from kfac_onnx.runtime.feed.row_hints import RowHints, mapped_parameters
from kfac_onnx.runtime.health import RootHealth, root_health
from kfac_onnx.runtime.opening import (
    assignable,
    batch_inputs,
    build_constants,
    build_holders,
    check_names,
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
    from collections.abc import Mapping, Sequence

    import onnxruntime as ort

    from kfac_onnx.disk.stored import Array
    from kfac_onnx.runtime.step.mapped_tables import MappedTables
    from kfac_onnx.step.plan import Plan

    Ready = Mapping[str, np.ndarray | ort.OrtValue]

__all__ = ["OpenStep"]


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


class OpenStep:
    """The parts of a step: its stages and sessions, the buffers that they read and write, and who watches.

    Args:
        model: as for `TrainingSession`, like the others.
        providers: ONNX Runtime's.
        parameters: values of parameters, constants and batch inputs.
        threads: of the parallel stages.
        seed: of random operators.
        cuda_graph: whether to capture stages.
        mapped: where tables are trained in their files.

    Raises:
        UserError: the model is not a training step, or a value is missing or does not fit.

    """

    def __init__(
        self,
        model: str | Path | ir.Model,
        *,
        providers: Sequence[str | tuple[str, Mapping[str, object]]],
        parameters: Mapping[str, Array] | str | Path | None,
        threads: int | None,
        seed: int | None,
        cuda_graph: bool,
        mapped: MappedTables | None = None,
    ) -> None:
        threads = thread_count(threads)
        name = "the model" if isinstance(model, ir.Model) else f"'{model}'"
        loaded = model if isinstance(model, ir.Model) else load_model(model)
        step = require_step(loaded, name)
        require_sound(loaded, None if isinstance(model, ir.Model) else str(model))
        self.providers = provider_list(providers)
        self.device = device_of(self.providers)
        if cuda_graph and self.device.name != "cuda":
            raise UserError(
                f"there are no CUDA graphs on the device '{self.device.name}'",
                help="give the CUDA provider (--provider cuda), or leave cuda_graph (--cuda-graph) out",
            )
        self.threads = threads
        checks = [check for check in step.id_checks if check.negatives == "reject" or not self.device.is_cpu]
        watch = [check.ids for check in checks]
        self.extra = own_outputs(loaded, step)
        plan = _divided(loaded, step.target, [*watch, *self.extra], name, cpu=self.device.is_cpu)
        short = plan.short
        parts = [*(stage.model for stage in plan.stages), *([] if short is None else [short.whole.model])]
        self.random = RandomKeys(make_stateless(parts, plan.source.types) if self.device.is_cpu else (), seed)
        self.restarting = seed_random_nodes(parts[: len(plan.stages)], seed)
        if self.restarting:  # two sessions would draw from two sequences
            plan = replace(plan, short=None)
        self.plan = plan
        self.metadata = kfac_metadata(loaded)
        loss = metadata.read(loaded, "loss", Loss)
        self._reduction = "unknown" if loss is None else loss.reduction
        self._evaluator: Evaluator | None = None
        self._further: tuple[str, ...] = ()
        values: dict[str, Array] = (
            stored_weights(parameters) if isinstance(parameters, (str, Path)) else {**(parameters or {})}
        )
        check_names(plan, values)
        self.in_place_problem = plan_problem(plan, self.providers, self.device)
        sites = metadata.read_list(loaded, "sites", Site)
        self.mapped = mapped
        tables = [] if mapped is None else mapped_parameters(plan, sites, self.device, self.in_place_problem)
        self.holders = build_holders(
            plan,
            values,
            self.device,
            in_place=self.in_place_problem is None,
            mapped=mapped,
            tables=tables,
        )
        self.constants = build_constants(plan, values, self.device)
        self.batch_inputs = batch_inputs(
            plan, self.constants, metadata.read_list(loaded, "vocabularies", metadata.Vocabulary)
        )
        self._rates = {rate.input: np.zeros((), np.float32) for rate in step.learning_rates}
        host = {step.ok, *step.ends, *watch, *self.extra}
        host.update(stage.condition for stage in plan.stages if stage.condition is not None)
        host.update(check.residual for check in step.root_checks)
        host.update(() if plan.short is None else plan.short.due)
        scalars = {**self._rates, **({KEYS: self.random.array} if len(self.random) else {})}
        batch = [item.name for item in self.batch_inputs]
        self.feeder: Feeder | None = None
        if self.device.is_cpu:
            self.engine = Engine(
                plan,
                self.holders,
                constants=self.constants,
                scalars=scalars,
                batch=batch,
                host=host,
                providers=self.providers,
                device=self.device,
                threads=threads or 0,
            )
        else:
            lock = threading.Lock()
            self.feeder = Feeder(self.device, self.batch_inputs, lock)
            self.engine = DeviceEngine(
                plan,
                self.holders,
                constants=self.constants,
                scalars=scalars,
                batch=batch,
                providers=self.providers,
                device=self.device,
                threads=threads or 0,
                cuda_graph=cuda_graph,
                lock=lock,
            )
        self.stepper = Stepper(plan, self.engine, checks)
        self.skips = SkipFinder(
            plan,
            self.engine,
            self.constants,
            self.batch_inputs,
            self.providers,
            self.random,
            sites=sites,
            parameters=metadata.read_list(loaded, "parameters", Parameter),
        )
        self.hints = None if mapped is None else RowHints(plan, self.batch_inputs, tables, self.providers)
        self.halves = Halves(step.predictions, self.batch_inputs, self.stepper, self.engine)

    def ready(self, batch: Mapping[str, np.ndarray]) -> tuple[Ready, bool]:
        """Return a checked batch as a step takes it, and whether its first half has run on it.

        Raises UserError for a wrong name, dtype, shape or id.
        """
        ready: Ready = checked_batch(batch, self.batch_inputs)
        half = self.halves.take(batch)
        ready = {**ready, **(half or {})}
        if self.feeder is not None:
            check_given(self.plan, self.plan.step.id_checks, ready)
            ready = self.feeder.fed(batch, ready)
        return ready, half is not None

    def run(
        self, ready: Ready, position: int, rates: Mapping[str, float], *, forwarded: bool
    ) -> tuple[float | None, bool]:
        """Run a step at a data position; return its loss (None: it lies outside) and whether it was kept."""
        self.random.set(position)
        for name, rate in rates.items():
            self._rates[name][...] = rate
        result = self.stepper.step(ready, forwarded=forwarded)
        if self.mapped is not None:
            self.mapped.after_step()
        return result

    def outputs(self) -> dict[str, np.ndarray]:
        """Return copies of a drop-in graph's own outputs in the last step."""
        return {name: np.array(self.engine.read(name)) for name in self.extra}

    def forward(self, batch: Mapping[str, np.ndarray], position: int) -> dict[str, np.ndarray]:
        """Run the first half of a step at a data position."""
        self.random.set(position)
        return self.halves.forward(batch)

    @property
    def evaluator(self) -> Evaluator:
        """The forward part at the current weights, opened when it is first used."""
        return self.evaluator_of(())

    def evaluator_of(self, further: tuple[str, ...]) -> Evaluator:
        """Return the forward part that also gives these values of the graph; the last one stays open.

        Raises UserError where there is no such value.
        """
        if self._evaluator is None or self._further != further:
            self._evaluator = Evaluator(
                self.plan,
                self.holders,
                self.constants,
                self.batch_inputs,
                reduction=self._reduction,
                providers=self.providers,
                device=self.device,
                threads=self.threads or 0,
                further=further,
            )
            self._further = further
        return self._evaluator

    def health(self) -> tuple[RootHealth, ...]:
        """Return how well conditioned each output factor is now, and how well its root fits it."""
        plan, holders = self.plan, self.holders
        return root_health(
            plan.source.items,
            plan.step.root_checks,
            plan.states,
            lambda name: holders[name].live.view(),
            self.stepper.roots.records,
        )

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        """Replace the values of trained parameters; nothing is written if one does not fit.

        Raises UserError for an unknown name, or another shape or dtype.
        """
        self.halves.forget()
        for name, array in assignable(self.plan, self.holders, values).items():
            self.holders[name].live.write(array)

    def describe(self) -> Description:
        """Return what runs where."""
        return describe(
            providers=self.providers,
            device=self.device,
            threads=self.threads,
            stages=[runner.stage.name for runner in self.engine.runners],
            holders=self.holders,
            in_place_problem=self.in_place_problem,
            random_operators=len(self.random) + self.restarting,
            random_restarts=self.restarting,
            tables={} if self.mapped is None else self.mapped.buffers,
        )

    def require_whole(self) -> None:
        """Raise UserError where a step failed half-way through its writes."""
        if self.stepper.broken:
            raise UserError(
                "the parameters and states of this session are half written: onnxruntime failed in a step",
                help="go on from the last checkpoint: TrainingSession.resume(...), or train --resume",
            )

    def close(self) -> None:
        """Release sessions and buffers."""
        self.engine.close()
        self._evaluator = None
