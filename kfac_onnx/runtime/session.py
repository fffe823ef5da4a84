"""A training run on plain ONNX Runtime: steps, evaluation, checkpoints and export of a transformed model.

A session composes an `OpenStep`, which knows the model, with what makes a run of its steps: how many there
were, their rates, and where the run is saved. One step runs the stages of `step.plan` in order: loss and
gradients at the parameters as they are, factors take in the batch, the root is refreshed when due, updates
are computed, and only then is anything that lasts written. If a gradient, factor or update is not finite,
what the step wrote is undone, the step is counted as skipped, and only the data position and the schedule
advance.
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import onnx_ir as ir

from kfac_onnx.data.vocabulary import Vocabulary, read_vocabulary
from kfac_onnx.disk.memory import require_memory
from kfac_onnx.disk.models import load_model, make_folder, require_folder, save_model
from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import (
    LARGEST_RATE,
    LARGEST_SEED,
    finite_number,
    plain,
    whole_number,
)
from kfac_onnx.errors.signatures import checked
from kfac_onnx.markup import element, rows_table
from kfac_onnx.options import method_with
from kfac_onnx.runtime import schedules
from kfac_onnx.runtime.description import Parameters
from kfac_onnx.runtime.feed.batches import as_inputs
from kfac_onnx.runtime.feed.table_batches import WINDOW, batches_of, require_rows
from kfac_onnx.runtime.fitting import FitOptions, fit
from kfac_onnx.runtime.measures.predictions import Predictions
from kfac_onnx.runtime.open_step import OpenStep
from kfac_onnx.runtime.opening import learning_rates, require_step
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
    require_readable,
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
from kfac_onnx.runtime.saved.export import forward_model, require_format, write_into, write_weights
from kfac_onnx.runtime.saved.run_lock import RunLock
from kfac_onnx.runtime.step.device_engine import DeviceEngine
from kfac_onnx.runtime.step.mapped_tables import MappedTables
from kfac_onnx.runtime.step.skip_causes import reasons
from kfac_onnx.runtime.stopping import uninterrupted
from kfac_onnx.runtime.turns import Turns, Writing
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from types import TracebackType

    import numpy as np

    from kfac_onnx.disk.stored import Array
    from kfac_onnx.runtime.description import Description, Metrics
    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.feed.data import Batches
    from kfac_onnx.runtime.feed.table_batches import RowStream
    from kfac_onnx.runtime.fitting import FitResult
    from kfac_onnx.runtime.health import RootHealth
    from kfac_onnx.runtime.schedules import Schedule

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
        seed: of random operators (Dropout) in the graph: the same seed draws the same at the same step.
        cuda_graph: on CUDA, launch each stage that can be captured as one; for batches of one shape.
        tables_in: a folder in whose files the tables are trained, one each (CPU alone): they may be larger
            than the memory. A table's value is that of `model` or `parameters`, or else of the file there.

    One thread at a time is in a session: another one waits for the end of a step, a save or an evaluation.
    While one is in `fit`, another gets an error, and nothing of its call is done.

    Raises:
        UserError: the model is not a training step, or a value is missing or does not fit.

    """

    @checked
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
        tables_in: str | Path | MappedTables | None = None,
    ) -> None:
        if seed is not None:
            seed = whole_number(seed, "the seed", least=0, most=LARGEST_SEED)
        self._locks: dict[Path, RunLock] = {}
        mapped = MappedTables(tables_in) if isinstance(tables_in, (str, Path)) else tables_in
        if mapped is not None:
            make_folder(mapped.folder)
            self._hold(mapped.folder)
        try:
            if mapped is not None:
                mapped.require_usable()
            self._open = OpenStep(
                model,
                providers=providers,
                parameters=parameters,
                threads=threads,
                seed=seed,
                cuda_graph=cuda_graph,
                mapped=mapped,
            )
            if mapped is not None:
                mapped.begin()
        except BaseException:
            if mapped is not None:
                mapped.abandon()
            for lock in self._locks.values():
                lock.release()
            raise
        self._plan, self._holders, self._stepper = self._open.plan, self._open.holders, self._open.stepper
        self._seed = seed
        self.learning_rates = learning_rates(self._plan.step, lr, rest_lr)
        self.schedule = schedules.parse(schedule) if isinstance(schedule, str) else schedule
        self.committed: int = 0
        self.skipped: int = 0
        self.position: int = 0
        self.source: str | None = None
        self.data: dict[str, int | bool | None] | None = None
        self.settings: str | None = None
        self.best: dict[str, float] | None = None
        self.closed = False
        self._turns = Turns()
        self._serialized: bytes | None = None
        self._folders: set[Path] = set()
        self._damaged: tuple[Path, ...] = ()
        self._writing: Writing | None = None

    def _repr_html_(self) -> str:
        """Return the session as a notebook shows it: nothing is copied or computed for that."""
        facts = [
            (
                "steps",
                f"{self.committed:,} made, {self.skipped:,} skipped, {self.position:,} batches consumed",
            ),
            ("learning rates", ", ".join(f"{name} {rate:g}" for name, rate in self.learning_rates.items())),
            ("schedule", self.schedule),
            ("batch", ", ".join(f"{item.name} {list(item.dims or ())}" for item in self.batch_inputs)),
            ("state", "closed" if self.closed else "open"),
            ("pipeline", self.pipeline),
        ]
        return element("div", element("b", "TrainingSession"), rows_table(["", ""], facts, name=None))

    @property
    def batch_inputs(self) -> tuple[BatchInput, ...]:
        """The inputs that every step must be given, in the graph's order."""
        return self._open.batch_inputs

    @property
    def pipeline(self) -> str | None:
        """The text of the passes that made the model; None where it does not say."""
        return self._open.metadata.get("kfac.pipeline")

    def rates_with(self, *, lr: float | None = None, rest_lr: float | None = None) -> dict[str, float]:
        """Return the learning rates of a new session with these: the run's own where an option is None."""
        step = self._plan.step

        def probed(rate: float) -> dict[str, float]:
            return learning_rates(step, None if lr is None else rate, None if rest_lr is None else rate)

        one, two = probed(1.0), probed(2.0)
        names = [name for name in one if one[name] != two[name]]
        new = learning_rates(step, lr, rest_lr)
        return {**self.learning_rates, **{name: new[name] for name in names}}

    @property
    def in_place_problem(self) -> str | None:
        """Why states are held in two buffers each; None where they are written in place."""
        return self._open.in_place_problem

    @property
    def predictions(self) -> dict[str, str | None]:
        """Where the loss lies outside: each prediction, and the input of its gradient (None: it has none)."""
        return dict(self._open.halves.predictions)

    @property
    def cuda_graph_problems(self) -> dict[str, str]:
        """Where CUDA graphs were asked for: each stage that has none, and why."""
        engine = self._open.engine
        return dict(engine.graph_problems) if isinstance(engine, DeviceEngine) else {}

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
        with self._turn("health"):
            return self._open.health()

    @property
    def parameters(self) -> Parameters:
        """The trained parameters, copied when read."""
        self._open.require_whole()
        return Parameters(self._holders, self._turns)

    @property
    def statistics(self) -> Parameters:
        """What the graph itself changes at each step, such as running statistics, copied when read."""
        self._open.require_whole()
        return Parameters(self._holders, self._turns, "statistic")

    @property
    def updates_parameters(self) -> bool:
        """Whether a step changes parameters; a dense model without an optimizer leaves that to the caller."""
        states = [holder.state for holder in self._holders.values()]
        return any(state.role == "parameter" and state.output != state.input for state in states)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """Copies of everything that a step changes, by the name of its input in the model."""
        with self._turns.turn("states"):
            self._open.require_whole()
            return {name: holder.live.read() for name, holder in self._holders.items()}

    @checked
    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
        """Return the loss per example over batches at the current weights, with dropout off.

        A mean loss counts each batch by its examples, a summed loss is divided by them. Inputs that only the
        backward part reads may be left out of the batches.

        Raises:
            UserError: as `step`, and where there is no batch.

        """
        with self._turn("evaluate"):
            self.require_loss("evaluate")
            return self._open.evaluator.mean(batches)

    @checked
    def measure(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        metrics: Sequence[str] = (),
        *,
        scores: str | None = None,
        labels: str | None = None,
    ) -> dict[str, float]:
        """Return the loss per example, as `evaluate`, and metrics of the predictions, by name.

        Args:
            batches: held-out data.
            metrics: `accuracy`, `perplexity`, `auc`, `rmse`, `recall@K`, `ndcg@K`; see `measures.metrics`.
            scores: the value of the graph that they are of; None takes that of its loss over classes.
            labels: the value (or batch input) that they are held against; None as for `scores`.

        Raises:
            UserError: as `evaluate`; an unknown metric or value, or shapes that do not fit.

        """
        with self._turn("measure"):
            self.require_loss("measure")
            if not metrics:
                return {"loss": self._open.evaluator.mean(batches)}
            observed = Predictions.of(self._plan.step.id_checks, metrics, scores, labels)
            loss = self._open.evaluator_of(observed.names).mean(batches, observed.add)
            return {"loss": loss, **observed.values()}

    @property
    def tables(self) -> tuple[str, ...]:
        """The parameters that ids look rows up in."""
        checks = [check for check in self._plan.step.id_checks if check.kind == "ids"]
        own = self.parameters
        return tuple(dict.fromkeys(check.parameter for check in checks if check.parameter in own))

    def rates(self) -> dict[str, float]:
        """Return the learning rates of the last step (of the first before it), with the schedule's factor."""
        at = max(0, self.position - 1)
        factor = 1.0 if self.schedule is None else self.schedule.factor(at)
        return {name: factor * rate for name, rate in self.learning_rates.items()}

    @checked
    def batches(
        self,
        data: object,
        batch_size: int | None = None,
        *,
        columns: str = "",
        vocabularies: Mapping[str, Vocabulary | str | Path] | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        window: int = WINDOW,
    ) -> Batches | RowStream:
        """Return batches of data for `fit` and `evaluate`, in the types and shapes of this session's inputs.

        Args:
            data: a file, folder or pattern (Parquet, Arrow, CSV, TSV, JSON lines, `.npy`, `.npz`, a folder of
                Hugging Face's `save_to_disk`); a table or data set of Arrow's, pandas', Hugging Face's or
                PyTorch's; arrays by column; or any iterable of rows as dicts.
            batch_size: rows of a batch; may be left out for `.npz` files, each of which is a batch then.
            columns: which column fills which input, such as `user_id=users,history=items{pad=0}`; of those
                that are not named, the column of the input's name.
            vocabularies: by input, for ids that are no rows of a table yet: each a file or a `Vocabulary`.
            seed: of the shuffling; None keeps the order.
            drop_last: leave out a last batch that is not full.
            window: rows among which is shuffled, and which are in memory.

        Raises:
            UserError: the data cannot be read, or do not fill the inputs.

        """
        made = batches_of(
            data,
            self.batch_inputs,
            batch_size,
            columns=columns,
            vocabularies=vocabularies,
            seed=seed,
            drop_last=drop_last,
            window=window,
        )
        if vocabularies is not None:
            words = {
                n: v if isinstance(v, Vocabulary) else read_vocabulary(v) for n, v in vocabularies.items()
            }
            require_rows(words, self._plan.step.id_checks)
        return made

    def decide_by(self, vote: Callable[[bool], bool]) -> None:
        """Have `vote` say of each step's finite flag whether the step is kept: of others' flags too.

        Raises UserError for what cannot be called.
        """
        if not callable(vote):
            raise UserError(f"vote is a function of a flag, not {type(vote).__name__}")
        self._stepper.vote = vote

    @checked
    def views(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return what these states hold now, not copied: they are good until the next step.

        Raises UserError for a name that no state has.
        """
        names = list(names)
        for name in names:
            if name not in self._holders:
                raise UserError(f"the step has no state '{name}'", help=f"it has {', '.join(self._holders)}")
        return {name: self._holders[name].live.view() for name in names}

    def require_loss(self, what: str) -> None:
        """Raise UserError where the loss lies outside the graph, so that `what` cannot be done."""
        self._open.halves.require_loss(what)

    @checked
    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        """Replace the values of trained parameters; nothing is written if one does not fit.

        Raises:
            UserError: an unknown name, or another shape or dtype.

        """
        with self._turn("assign"):
            self._open.assign(values)

    def describe(self) -> Description:
        """Return what runs where: providers, phases, how each state is held, and what was fallen back on."""
        return self._open.describe()

    @contextlib.contextmanager
    def _turn(self, work: str) -> Generator[None]:
        """Have an open session that is whole to oneself; UserError where it is not, or another has it."""
        with self._turns.turn(work):
            if self.closed:
                raise UserError(
                    "the training session is closed", help="open a new one, or resume a checkpoint"
                )
            self._open.require_whole()
            if self._writing is not None and self._writing.failed:
                self.finish_saving()
            yield

    @checked
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
        with self._turn("forward"):
            if training:
                return self._open.forward(batch, self.position)
            return self._open.evaluator.outputs(batch)

    def step(self, batch: Mapping[str, np.ndarray]) -> Metrics:
        """Make one training step on a batch of arrays by input name.

        A step whose gradients, factors or updates are not finite changes no parameter and no state; `skip` of
        the metrics then says what was not finite, and where. Where the loss lies outside the graph, the batch
        holds the gradients of the predictions too (see `forward`), and the loss of the metrics is None.

        Raises:
            UserError: a name, dtype, shape or id of the batch is wrong; nothing was written. Or onnxruntime
                failed: where it failed while it wrote, the session says so and refuses to go on.

        """
        with self._turn("step"):
            ready, forwarded = self._open.ready(batch)
            factor = 1.0 if self.schedule is None else self.schedule.factor(self.position)
            rates = {
                name: factor
                * finite_number(rate, f"the learning rate '{name}'", least=0.0, most=LARGEST_RATE)
                for name, rate in self.learning_rates.items()  # the user may have changed them
            }
            with uninterrupted():  # a signal comes before the step or after it
                loss, kept = self._open.run(ready, self.position, rates, forwarded=forwarded)
                self.position += 1
                if kept:
                    self.committed += 1
                else:
                    self.skipped += 1
            first = next(iter(rates.values()), 0.0)
            metrics: Metrics = {"loss": loss, "skipped": not kept, "step": self.committed, "lr": first}
            if not kept:
                metrics["skip"] = self._open.skips.find(batch, ready)
                _log.warning("batch %d was skipped: %s", self.position, reasons(metrics["skip"]))
            if self._open.extra:
                metrics["outputs"] = self._open.outputs()
            return metrics

    def prepared(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return a batch as far on its way as it can be before its step: in its dtypes, and on the device.

        What is wrong with it stays as it is, for `step` to say.
        """
        ready = as_inputs(batch, self.batch_inputs)
        if self._open.hints is not None and self._open.mapped is not None:
            self._open.mapped.hint(self._open.hints.rows(ready))
        feeder = self._open.feeder
        return ready if feeder is None else feeder.ahead(ready)

    def reserve(self, ahead: int) -> None:
        """Have room on the device for so many batches from `prepared` that wait for their step."""
        if self._open.feeder is not None:
            self._open.feeder.reserve(ahead)

    @method_with(FitOptions)
    def fit(self, batches: Iterable[Mapping[str, np.ndarray]], options: FitOptions) -> FitResult:
        """Train on an iterable of dicts of arrays, or on `data.Batches`, which go on where the run is.

        `batches` are iterated again for every epoch. SIGINT and SIGTERM, where nobody else handles them: the
        step is finished, a checkpoint is saved if one was asked for, and `stopping.Interrupted` (a
        KeyboardInterrupt) or `stopping.Terminated` (a SystemExit) is raised. A second signal stops at once.

        Raises:
            UserError: as `step` and `save`; too many steps in a row were skipped (it is saved first).

        """
        return self.fit_as(batches, options)

    def fit_as(self, batches: Iterable[Mapping[str, np.ndarray]], options: FitOptions) -> FitResult:
        """Train as `fit`, whose keywords are these options."""
        with self._turn("fit"):
            return fit(self, batches, options)

    @checked
    def save(self, path: str | Path, *, keep: int | None = None, background: bool = False) -> Path:
        """Write a checkpoint with everything a run needs to go on, whole or not at all; return its file.

        Args:
            path: a file, if it ends in `.ckpt` or `.safetensors`; anything else is a folder (it is made)
                and gets `step-0000000040.ckpt` and the like, by the batches consumed.
            keep: how many checkpoints to keep in the folder (default: 3). Older ones are deleted when the new
                one is complete and synced.
            background: copy everything now, and write it in a thread while steps go on. The next `save`,
                `finish_saving` and `close` wait for the file; they, or the next step, raise what went wrong.

        A folder belongs to this session from then on, until it is closed: `.lock` in it keeps other runs out.

        Raises:
            UserError: the place cannot be written, the disk is full (older checkpoints are as they were), or
                the folder holds checkpoints of another run, or another run is using it.

        """
        with self._turn("save"):
            self.finish_saving()
            write, file = self._writer(path, keep, copy=background)
            if background:
                self._writing = Writing(file, write)
            else:
                write()
            return file

    def finish_saving(self) -> Path | None:
        """Wait for the checkpoint that `save(background=True)` is writing; return its file, None without one.

        Raises:
            UserError: it could not be written, as `save`.

        """
        with self._turns.turn("finish_saving"):
            writing, self._writing = self._writing, None
            return None if writing is None else writing.wait()

    def _writer(self, path: str | Path, keep: int | None, *, copy: bool) -> tuple[Callable[[], None], Path]:
        """Return what writes a checkpoint of now, and its file."""
        if not is_folder(path):
            if keep is not None:
                raise UserError(f"keep is for a folder of checkpoints, and '{path}' is a file")
            file = Path(path)
            checkpoint = self._checkpoint(copy=copy)
            return partial(write_checkpoint, file, checkpoint), file
        number = KEEP if keep is None else whole_number(keep, "keep", least=1)
        folder = Path(path)
        self.require_place(folder)
        make_folder(folder)
        self._hold(folder)
        file = folder / checkpoint_name(self.position)
        checkpoint, damaged = self._checkpoint(copy=copy), self._damaged

        def write() -> None:
            write_checkpoint(file, checkpoint)
            self._folders.add(folder.resolve())
            tidy(folder, file, number, damaged)

        return write, file

    @checked
    def require_place(self, path: str | Path) -> None:
        """Raise UserError where `save` would refuse this place: sooner than after hours of work."""
        if is_folder(path):
            require_folder(path)
            own = Path(path).resolve() in self._folders
            require_own(path, self.position, self._damaged, own=own)

    def _hold(self, path: str | Path) -> bool:
        """Keep other runs out of a place for checkpoints, from now on; return whether that is new.

        Raises UserError where another run has it.
        """
        place = Path(path).absolute()
        if place in self._locks:
            return False
        self._locks[place] = RunLock(path)
        return True

    @contextlib.contextmanager
    def alone_in(self, path: str | Path | None) -> Generator[None]:
        """Keep other runs out of a place for checkpoints within a block; of None there is nothing to keep.

        Folders that are missing are made, and those that are empty at the end are removed again.

        Raises UserError where another run has the place.
        """
        if path is None:
            yield
            return
        folder = (Path(path) if is_folder(path) else Path(path).parent).absolute()
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        make_folder(folder)
        new = self._hold(path)
        try:
            yield
        finally:
            if new and (lock := self._locks.pop(Path(path).absolute(), None)) is not None:
                lock.release()
            with contextlib.suppress(OSError):  # something is in it, as it should
                for place in missing:
                    place.rmdir()

    def require_savable(self) -> None:
        """Raise UserError where a checkpoint would hold what cannot be read again: before hours of work."""
        require_readable(self._header())

    def _header(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the model and its values, by field."""
        return {
            "committed": self.committed,
            "skipped": self.skipped,
            "position": self.position,
            "host_roots": self.host_roots,
            "learning_rates": {name: plain(rate) for name, rate in self.learning_rates.items()},
            "schedule": None if self.schedule is None else str(self.schedule),
            "seed": self._seed,
            "entropy": self._open.random.entropy,
            "data": None if self.data is None else dict(self.data),
            "source": self.source,
            "settings": self.settings,
            "best": self.best,
            "versions": versions(),
        }

    def _checkpoint(self, *, copy: bool) -> Checkpoint:
        """Return what a checkpoint holds now: the buffers themselves, or copies of them."""
        states = {name: holder.live for name, holder in self._holders.items()}
        constants = self._open.constants
        tables = {} if self._open.mapped is None else self._open.mapped.buffers
        if copy and tables:
            raise UserError(
                "save(background=True) copies all states into memory, and tables are trained in their files",
                help="save without background=True: the file is written while the run waits",
            )
        if copy:
            size = sum(buffer.nbytes for buffer in states.values())
            require_memory(size, "a copy of all states, which is written while steps go on")
        return Checkpoint(
            model=self._model_bytes(),
            states={
                name: tables[name].stored if name in tables else buffer.read() if copy else buffer.view()
                for name, buffer in states.items()
            },
            constants={name: buffer.view() for name, buffer in constants.items()},  # no step changes them
            **self._header(),
        )

    @classmethod
    @checked
    def resume(
        cls,
        path: str | Path,
        *,
        model: str | Path | ir.Model | None = None,
        providers: Sequence[str | tuple[str, Mapping[str, object]]] = ("CPUExecutionProvider",),
        threads: int | None = None,
        cuda_graph: bool = False,
        tables_in: str | Path | None = None,
    ) -> TrainingSession:
        """Return a session that goes on where `save` was called.

        Args:
            path: the checkpoint, which holds the model; of a folder of checkpoints, the newest that is whole.
            model: the model that the caller expects it to be of; another one is an error.
            providers: as for a new session.
            threads: as for a new session.
            cuda_graph: as for a new session.
            tables_in: as for a new session; tables of the checkpoint are written over those in the folder.

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
            tables_in=None if tables_in is None else MappedTables(tables_in, replace=True),
        )
        require_complete(checkpoint, file, [holder.state for holder in session._holders.values()])
        for name, holder in session._holders.items():
            if holder.state.initial != "parameter":
                holder.live.write(checkpoint.states[name])
        session.learning_rates.update(checkpoint.learning_rates)
        session.committed, session.skipped = checkpoint.committed, checkpoint.skipped
        session.position = checkpoint.position
        session.data, session.source = checkpoint.data, checkpoint.source
        session.settings, session.best = checkpoint.settings, checkpoint.best
        session._stepper.host_roots = checkpoint.host_roots
        session._serialized = checkpoint.model
        session._open.random.entropy = checkpoint.entropy
        if session._open.restarting:
            _log.warning(
                "%d random operators of the graph start their sequence anew", session._open.restarting
            )
        session._folders.add(file.parent.resolve())
        session._damaged = damaged
        return session

    @checked
    def require_model(self, model: ir.Model) -> None:
        """Raise UserError unless the session trains this model (values of parameters aside)."""
        if model_hash(model_bytes(partition(model), kfac_metadata(model))) != model_hash(self._model_bytes()):
            raise different_model("the checkpoint")

    def _model_bytes(self) -> bytes:
        if self._serialized is None:
            self._serialized = model_bytes(self._plan, self._open.metadata)
        return self._serialized

    @checked
    def export(
        self,
        path: str | Path,
        *,
        outputs: Sequence[str] | None = None,
        into: str | Path | None = None,
    ) -> dict[str, str]:
        """Write a forward graph with the trained weights; return the place of each weight in it.

        A path that ends in `.safetensors` gets the weights alone, by their names in the training graph.
        Statistics that the steps change (running means of batch normalization) go with the weights.

        Args:
            path: the file to write.
            outputs: values of the training graph to cut at; inputs that they do not need are left out.
                None cuts at the loss, or at the predictions where the loss lies outside the graph.
            into: a forward model of the user's; its initializers get the weights, by name or shape.

        Raises:
            UserError: an unknown output, a weight that fits nowhere, a place that cannot be written.

        """
        with self._turn("export"):
            weights = {**self.parameters, **self.statistics}
            if into is not None and outputs is not None:
                raise UserError("outputs and into cannot be given together")
            require_format(path)
            if str(path).endswith(".safetensors"):
                if into is not None or outputs is not None:
                    raise UserError(
                        f"'{path}' gets the weights alone, without a graph for outputs= or into=",
                        help="write an .onnx file, or leave these out",
                    )
                return write_weights(weights, path)
            if into is not None:
                return write_into(weights, into, path)
            plan = self._plan
            constants = {name: buffer.read() for name, buffer in self._open.constants.items()}
            model = forward_model(plan, constants | weights, outputs or plan.step.ends)
            save_model(model, path)
            return {name: name for name in weights if name in model.graph.initializers}

    def close(self) -> None:
        """Wait for a checkpoint that is being written, then release sessions and buffers.

        Raises:
            UserError: that checkpoint could not be written, as `save`; or another thread uses the session.

        """
        with self._turns.turn("close"):
            if not self.closed:
                self.closed = True
                if self._open.mapped is not None and not self._stepper.broken:
                    self._open.mapped.close(self.committed)
                self._open.close()
            try:
                self.finish_saving()
            finally:
                for lock in self._locks.values():
                    lock.release()
                self._locks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
