"""Training with plain ONNX Runtime: steps, checkpoints and export of a model that `open_model` opens.

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

from kfac_onnx.disk.models import load_model, make_folder, require_folder, save_model
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.batches import as_inputs, checked_batch
from kfac_onnx.runtime.feed.ids import check_given
from kfac_onnx.runtime.fitting import SKIP_LIMIT, fit
from kfac_onnx.runtime.open_model import OpenModel
from kfac_onnx.runtime.opening import require_step
from kfac_onnx.runtime.saved.checkpoint import (
    Checkpoint,
    different_model,
    given_values,
    kfac_metadata,
    model_bytes,
    model_hash,
    proto_of,
    read_checkpoint,
    require_complete,
    require_same,
    versions,
    write_checkpoint,
)
from kfac_onnx.runtime.saved.checkpoint_folder import (
    KEEP,
    checkpoint_name,
    is_folder,
    read_newest,
    require_own,
    tidy,
)
from kfac_onnx.runtime.saved.export import forward_model, write_into
from kfac_onnx.runtime.step.skip_causes import reasons
from kfac_onnx.runtime.stopping import uninterrupted
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kfac_onnx.runtime.description import Metrics
    from kfac_onnx.runtime.fitting import FitResult, Row

__all__ = ["TrainingSession"]

_log = logging.getLogger(__name__)


class TrainingSession(OpenModel):
    """A transformed model that is being trained.

    Args:
        model: a file written by `kfac_onnx.save` or `kfac-onnx transform`, or such a model.
        providers: ONNX Runtime's execution providers; the first one's device holds the buffers.
        parameters: values for parameters, constants and batch inputs that stay the same; a mapping, or a
            file: `.npz`, `.safetensors`, an `.onnx` file's initializers, ONNX Runtime's `.checkpoint`.
        threads: width of the all-thread stages; None takes all cores.
        lr, rest_lr: learning rates of the tables and of everything else; None keeps the model's.
        schedule: a `Schedule` or its text; multiplies both rates.
        seed: of random operators (Dropout) in the graph: the same seed draws the same at the same step.
        cuda_graph: on CUDA, launch each stage that can be captured as one; for batches of one shape.

    Raises:
        UserError: the model is not a training step, or a value is missing or does not fit.

    """

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
        self._random.set(self.position)
        return self._halves.forward(batch) if training else self._evaluation().outputs(batch)

    def step(self, batch: Mapping[str, np.ndarray]) -> Metrics:
        """Make one training step on a batch of arrays by input name.

        A step whose gradients, factors or updates are not finite changes no parameter and no state; `skip` of
        the metrics then says what was not finite, and where. Where the loss lies outside the graph, the batch
        holds the gradients of the predictions too (see `forward`), and the loss of the metrics is None.

        Raises:
            UserError: a name, dtype, shape or id of the batch is wrong; nothing was written. Or onnxruntime
                failed: where it failed while it wrote, the session says so and refuses to go on.

        """
        self._require_open()
        ready = checked_batch(batch, self.batch_inputs)
        half = self._halves.take(batch)
        self._random.set(self.position)
        factor = 1.0 if self.schedule is None else self.schedule.factor(self.position)
        for name, rate in self.learning_rates.items():
            self._rates[name][...] = rate * factor
        ready = {**ready, **(half or {})}
        if self._feeder is not None:
            check_given(self._plan, self._plan.step.id_checks, ready)
            ready = self._feeder.fed(batch, ready)
        with uninterrupted():  # Ctrl-C comes before the step or after it
            loss, kept = self._stepper.step(ready, forwarded=half is not None)
            self.position += 1
            if kept:
                self.committed += 1
            else:
                self.skipped += 1
        first = next(iter(self.learning_rates.values()), 0.0) * factor
        metrics: Metrics = {"loss": loss, "skipped": not kept, "step": self.committed, "lr": first}
        if not kept:
            metrics["skip"] = self._skips.find(batch, ready)
            _log.warning("batch %d was skipped: %s", self.position, reasons(metrics["skip"]))
        if self._extra:
            metrics["outputs"] = {name: np.array(self._engine.read(name)) for name in self._extra}
        return metrics

    def prepared(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return a batch as far on its way as it can be before its step: in its dtypes, and on the device.

        What is wrong with it stays as it is, for `step` to say.
        """
        ready = as_inputs(batch, self.batch_inputs)
        return ready if self._feeder is None else self._feeder.ahead(ready)

    def reserve(self, ahead: int) -> None:
        """Have room on the device for so many batches from `prepared` that wait for their step."""
        if self._feeder is not None:
            self._feeder.reserve(ahead)

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
        keep: int | None = None,
        skip_limit: int | None = SKIP_LIMIT,
        prefetch: int | None = None,
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
            checkpoint: where to save (see `save`; folders are made), at the end and
            checkpoint_every: every so many steps.
            keep: how many checkpoints a folder keeps (default: 3).
            skip_limit: so many skipped steps in a row stop the run; None goes on whatever happens.
            prefetch: how many batches a thread makes ahead while a step runs, 0 for no thread; 2 for
                `data.Batches` if None, 0 for any other iterable, which may fill one array again and again.

        SIGINT and SIGTERM, where nobody else handles them: the step is finished, a checkpoint is saved if one
        was asked for, and `stopping.Interrupted` (a KeyboardInterrupt) or `stopping.Terminated` (a
        SystemExit) is raised. A second signal stops at once.

        Raises:
            UserError: as `step` and `save`; too many steps in a row were skipped (it is saved first).

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
            keep=keep,
            skip_limit=skip_limit,
            prefetch=prefetch,
        )

    def save(self, path: str | Path, *, keep: int | None = None) -> Path:
        """Write a checkpoint with everything a run needs to go on, whole or not at all; return its file.

        Args:
            path: a file, if it ends in `.ckpt` or `.safetensors`; anything else is a folder (it is made)
                and gets `step-0000000040.ckpt` and the like, by the batches consumed.
            keep: how many checkpoints to keep in the folder (default: 3). Older ones are deleted when the new
                one is complete and synced.

        Raises:
            UserError: the place cannot be written, the disk is full (older checkpoints are as they were), or
                the folder holds checkpoints of another run.

        """
        self._require_open()
        if not is_folder(path):
            if keep is not None:
                raise UserError(f"keep is for a folder of checkpoints, and '{path}' is a file")
            self._write(path)
            return Path(path)
        number = KEEP if keep is None else keep
        if number < 1:
            raise UserError(f"keep must be at least 1, got {number}")
        folder = Path(path)
        self.require_place(folder)
        make_folder(folder)
        file = folder / checkpoint_name(self.position)
        self._write(file)
        self._folders.add(folder.resolve())
        tidy(folder, file, number, self._damaged)
        return file

    def require_place(self, path: str | Path) -> None:
        """Raise UserError where `save` would refuse this place: sooner than after hours of work."""
        if is_folder(path):
            require_folder(path)
            own = Path(path).resolve() in self._folders
            require_own(path, self.position, self._damaged, own=own)

    def _write(self, path: str | Path) -> None:
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
            entropy=self._random.entropy,
            data=self.data,
            source=self.source,
            versions=versions(),
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
        cuda_graph: bool = False,
    ) -> TrainingSession:
        """Return a session that goes on where `save` was called.

        Args:
            path: the checkpoint, which holds the model; of a folder of checkpoints, the newest that is whole.
            model: the model that the caller expects it to be of; another one is an error.
            providers: as for a new session.
            threads: as for a new session.
            cuda_graph: as for a new session.

        Bit for bit the run goes on as it would have with the same `threads`, versions and machine; other
        versions than those of the checkpoint, and damaged checkpoints in a folder, are warned about.

        Raises:
            UserError: no such file, a damaged one, a folder without a whole one, or a checkpoint of another
                model or of another version of the format.

        """
        damaged: tuple[Path, ...] = ()
        if Path(path).is_dir():
            file, checkpoint, damaged = read_newest(path)
        else:
            file, checkpoint = Path(path), read_checkpoint(path)
        if model is not None:
            loaded = model if isinstance(model, ir.Model) else load_model(model)
            require_step(loaded, "the model" if isinstance(model, ir.Model) else f"'{model}'")
            require_same(checkpoint, file, loaded)
        _warn_of_versions(checkpoint, file)
        own = ir.from_proto(proto_of(checkpoint))
        session = cls(
            own,
            providers=providers,
            threads=threads,
            parameters=given_values(checkpoint),
            schedule=checkpoint.schedule,
            seed=checkpoint.seed,
            cuda_graph=cuda_graph,
        )
        require_complete(checkpoint, file, [holder.state for holder in session._holders.values()])
        for name, holder in session._holders.items():
            if holder.state.initial != "parameter":
                holder.live.write(checkpoint.states[name])
        session.learning_rates.update(checkpoint.learning_rates)
        session.committed, session.skipped = checkpoint.committed, checkpoint.skipped
        session.position = checkpoint.position
        session.data, session.source = checkpoint.data, checkpoint.source
        session._stepper.host_roots = checkpoint.host_roots
        session._serialized = checkpoint.model
        session._random.entropy = checkpoint.entropy
        if session._restarting:
            _log.warning("%d random operators of the graph start their sequence anew", session._restarting)
        session._folders.add(file.parent.resolve())
        session._damaged = damaged
        return session

    def require_model(self, model: ir.Model) -> None:
        """Raise UserError unless the session trains this model (values of parameters aside)."""
        if model_hash(model_bytes(partition(model), kfac_metadata(model))) != model_hash(self._model_bytes()):
            raise different_model("the checkpoint")

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


def _warn_of_versions(checkpoint: Checkpoint, path: Path) -> None:
    for name, version in versions().items():
        written = checkpoint.versions.get(name)
        if written != version:
            _log.warning(
                "checkpoint '%s' was written with %s %s, this is %s: numbers may differ in their last bits",
                path,
                name,
                written,
                version,
            )
