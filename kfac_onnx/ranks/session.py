"""One rank of a training run: dense parameters on every rank, tables and their counts by row.

A step: the batch's distinct ids go to the ranks that hold their rows, and the rows come back. Each rank
computes loss and gradients of its own examples. Then gradients are summed per distinct row and sent to the
owners, with how often each was looked up; dense gradients, Σ g gᵀ of each table and the loss are summed in
one all-reduce. Every rank runs the same update: on its own rows, and on the same bits of all else. A vote
keeps a step only where everything is finite on all ranks. Bytes that a rank sends in a step in which it asks
for U distinct rows that are elsewhere, and is asked for as many:

    U·(8·D + 16)  +  2·(P − 1)/P·4·(dense parameters + tables·D² + 1)

which does not grow with the number of rows of a table.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.disk.models import load_model, save_model
from kfac_onnx.errors import UserError
from kfac_onnx.errors.signatures import checked
from kfac_onnx.ranks.cut import cut_step
from kfac_onnx.ranks.fabric import AgreedError, Alone, Fabric, Mpi, agree
from kfac_onnx.ranks.routing import Routes, merged, places_among, routes, share_of
from kfac_onnx.ranks.update import shard
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.batches import checked_batch
from kfac_onnx.runtime.feed.ids import check_ids, origin_of
from kfac_onnx.runtime.feed.table_batches import WINDOW, batches_of
from kfac_onnx.runtime.opening import batch_inputs
from kfac_onnx.runtime.saved.checkpoint import versions
from kfac_onnx.runtime.saved.export import forward_model, require_format, write_weights
from kfac_onnx.runtime.saved.weights import stored_weights
from kfac_onnx.runtime.step.tensors import open_session
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    import onnx
    import onnxruntime as ort

    from kfac_onnx.data.vocabulary import Vocabulary
    from kfac_onnx.disk.stored import Array
    from kfac_onnx.ranks.update import Boundary
    from kfac_onnx.runtime.description import Metrics
    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.feed.data import Batches
    from kfac_onnx.runtime.feed.table_batches import RowStream
    from kfac_onnx.runtime.schedules import Schedule

__all__ = ["RankSession"]

_CLOSE: Final = 1e-3
"""How far loss and gradients of a batch may be from those of its halves: float32 sums in another order are
within 1e-5 of the largest entry; examples that see each other change them by percents."""


class RankSession:
    """A transformed model that several processes train as one, each on its own part of every batch.

    The loss is that of one process on the batches of all ranks, one after the other. Every method is
    collective: all ranks call it, in the same order.

    Args:
        model: as for `TrainingSession`, the same on all ranks.
        ranks: an mpi4py communicator, a `Fabric`, or None: all ranks that a launcher started.
        parameters: values of parameters, the same on all ranks; a rank keeps its rows of the tables.
        threads: width of the all-thread stages (default 1).
        lr, rest_lr, schedule: as for `TrainingSession`.

    Raises:
        UserError: as for `TrainingSession`; the model cannot be cut (it says why); mpi4py is not installed;
            ranks have different models, values or versions.

    """

    @checked
    def __init__(
        self,
        model: str | Path | ir.Model,
        ranks: object = None,
        *,
        parameters: Mapping[str, Array] | str | Path | None = None,
        threads: int | None = 1,
        lr: float | None = None,
        rest_lr: float | None = None,
        schedule: Schedule | str | None = None,
    ) -> None:
        fabric = ranks if isinstance(ranks, Alone) or hasattr(ranks, "exchange") else Mpi(ranks)
        self._fabric: Fabric = fabric  # pyright: ignore[reportAttributeAccessIssue]  a protocol, by its methods
        error = None
        try:
            values = self._prepare(model, parameters)
        except UserError as e:
            values, error = {}, e
        agree(self._fabric, error)
        self._require_same(values)
        try:
            self._open(values, threads, lr=lr, rest_lr=rest_lr, schedule=schedule)
        except UserError as e:
            error = e
        agree(self._fabric, error)
        self.bytes_sent = 0
        """What this rank sent in all steps so far, by the formula of this module for all-reduces."""

    def _prepare(
        self, model: str | Path | ir.Model, parameters: Mapping[str, Array] | str | Path | None
    ) -> dict[str, Array]:
        """Cut the model; return the values of parameters."""
        whole = model if isinstance(model, ir.Model) else load_model(model)
        self._cut = cut_step(whole)
        self._tables = self._cut.tables
        self._plan = partition(whole)
        self.batch_inputs: tuple[BatchInput, ...] = batch_inputs(self._plan, {})
        for item in self.batch_inputs:
            if item.dims and isinstance(item.dims[0], int):
                raise UserError(
                    f"the model cannot be trained on several ranks: the input '{item.name}' has"
                    f" {item.dims[0]} as its first dimension, so that a batch cannot be divided",
                    help="export the graph with a batch dimension of any size",
                )
        for table in self._tables:
            if table.rows < self.size:
                raise UserError(f"the table '{table.parameter}' has {table.rows} rows for {self.size} ranks")
        values: dict[str, Array] = (
            stored_weights(parameters) if isinstance(parameters, (str, Path)) else {**(parameters or {})}
        )
        trained = {state.input for state in self._plan.states if state.initial == "parameter"}
        for name, tensor in self._plan.initial.items():
            if name in trained:
                values.setdefault(name, tensor.numpy())
        return values

    def _open(
        self,
        values: Mapping[str, Array],
        threads: int | None,
        *,
        lr: float | None,
        rest_lr: float | None,
        schedule: Schedule | str | None,
    ) -> None:
        """Open the three parts, the update on this rank's rows."""
        rank, size = self.rank, self.size
        rows = {t.parameter: share_of(t.rows, rank, size) for t in self._tables}
        for table in self._tables:
            value = values.get(table.parameter)
            if value is not None and np.shape(value) != (table.rows, table.columns):
                raise UserError(
                    f"the value of '{table.parameter}' has the shape {list(np.shape(value))},"
                    f" not {[table.rows, table.columns]}"
                )
        own = {n: np.asarray(v)[rank::size] if n in rows else v for n, v in values.items()}
        self._update = TrainingSession(
            shard(self._cut.update, self._cut.sharded, rows),
            parameters=own,
            threads=threads,
            lr=lr,
            rest_lr=rest_lr,
            schedule=schedule,
        )
        self._update.decide_by(self._all)
        providers = [("CPUExecutionProvider", dict[str, str]())]
        self._local = _Part(self._cut.local, open_session(self._cut.local, providers, threads=threads or 0))
        route = self._cut.route
        self._route = None if route is None else _Part(route, open_session(route, providers, threads=1))

    def end_schedule(self, steps: int) -> None:
        """Have the schedule reach its end after so many steps."""
        if self._update.schedule is not None:
            self._update.schedule = self._update.schedule.within(steps)

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
        """Return the batches of all ranks, as `TrainingSession.batches`; `part` takes this rank's of each."""
        return batches_of(
            data,
            self.batch_inputs,
            batch_size,
            columns=columns,
            vocabularies=vocabularies,
            seed=seed,
            drop_last=drop_last,
            window=window,
        )

    def part(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return this rank's examples of a batch: the ranks' parts in order are the batch."""
        cut: dict[str, np.ndarray] = {}
        for name, array in batch.items():
            size = len(array)
            cut[name] = array[self.rank * size // self.size : (self.rank + 1) * size // self.size]
        return cut

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self._fabric.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._fabric.size

    @property
    def committed(self) -> int:
        """How many steps were made; skipped ones are not among them."""
        return self._update.committed

    @property
    def skipped(self) -> int:
        """How many steps were skipped on all ranks, because something was not finite on one."""
        return self._update.skipped

    def _require_same(self, values: Mapping[str, Array]) -> None:
        """Raise UserError where ranks were started with different models, values or versions."""
        model = hashlib.sha256(self._cut.update.SerializeToString(deterministic=True))
        model.update(self._cut.local.SerializeToString(deterministic=True))
        data = hashlib.sha256()
        for name in sorted(values):
            data.update(name.encode())
            data.update(np.ascontiguousarray(values[name]).tobytes())
        packages = hashlib.sha256(repr(sorted(versions().items())).encode())
        own = np.frombuffer(packages.digest() + model.digest() + data.digest(), np.uint8).reshape(3, -1)
        for what, digests in zip(
            ("versions of packages", "models", "values of parameters"),
            np.swapaxes(self._fabric.gather(own), 0, 1),
            strict=True,
        ):
            other = [rank for rank in range(self.size) if (digests[rank] != digests[0]).any()]
            if other:
                raise AgreedError(
                    f"ranks have different {what}: rank {other[0]} is not like rank 0",
                    help="start all of them with the same command, in the same environment",
                )

    def _all(self, kept: bool) -> bool:
        return bool(self._fabric.gather(np.array([kept])).all())

    def step(self, batch: Mapping[str, np.ndarray]) -> Metrics:
        """Make one step on this rank's part of a batch; return the metrics of the whole.

        Raises:
            UserError: something is wrong with the batch of any rank: the same sentence on all of them, and
                nothing was written.

        """
        ready: dict[str, np.ndarray] = {}
        ids: dict[str, np.ndarray] = {}
        error = None
        try:
            for name, value in checked_batch(batch, self.batch_inputs).items():
                if not isinstance(value, np.ndarray):
                    raise UserError(f"the input '{name}' is bfloat16, which ranks do not take")
                ready[name] = value
            ids = self._ids(ready)
        except UserError as e:
            error = e
        agree(self._fabric, error)
        plans = [routes(_of(ids, table), table.rows, self.size) for table in self._tables]
        fetched, asked = self._fetch(plans)
        counts = np.array([plan.places[-1].size for plan in plans], np.int64)
        all_counts = self._fabric.gather(counts)
        lookups, first = all_counts.sum(0), all_counts[: self.rank].sum(0)
        feed = dict(ready)
        for k, table in enumerate(self._tables):
            feed[table.lookups], feed[table.first] = np.array(lookups[k]), np.array(first[k])
        made: dict[str, np.ndarray] = {}
        try:
            made = self._run_local(feed, fetched, [plan.places for plan in plans])
            self._require_separate(ready, made, fetched, plans)
        except UserError as e:
            error = e
        agree(self._fabric, error)
        divisor = np.asarray(made[self._cut.divisor], np.float64).reshape(1)
        total = float(self._fabric.gather(divisor).sum())
        weight = 1.0 if self._cut.summed else float(divisor[0]) / total if total else 0.0
        exchanged = self._reduced(made, weight)
        for k, (table, plan) in enumerate(zip(self._tables, plans, strict=True)):
            exchanged[table.lookups] = np.array(lookups[k])
            exchanged |= self._owned(table, plan, asked[k], made[table.row_gradient], weight)
        names = {item.name for item in self._update.batch_inputs}
        return self._update.step({name: value for name, value in exchanged.items() if name in names})

    def _ids(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return ids by name; raises UserError for one that is no row, and a label that is no class."""
        ids = dict(batch)
        if self._route is not None:
            ids |= self._route.run(batch)
        for check in self._plan.step.id_checks:
            if check.ids in ids:
                check_ids(check, ids[check.ids], lambda check=check: origin_of(self._plan, check, batch))
        return ids

    def _fetch(self, plans: Sequence[Routes]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Return the distinct rows of each table, and the row numbers that each rank asked this one for."""
        own = self._update.views([table.parameter for table in self._tables])
        numbers = np.array([[len(plan.asked[d]) for plan in plans] for d in range(self.size)], np.int64)
        heads = self._fabric.gather(numbers)  # [from, to, table]
        fetched: list[np.ndarray] = []
        asked: list[list[np.ndarray]] = []
        for k, (table, plan) in enumerate(zip(self._tables, plans, strict=True)):
            wanted = self._fabric.exchange(plan.asked, heads[:, self.rank, k].tolist())
            rows = self._fabric.exchange(
                [own[table.parameter][part] for part in wanted], numbers[:, k].tolist()
            )
            away = plan.distinct - len(plan.asked[self.rank])
            lent = sum(map(len, wanted)) - len(wanted[self.rank])
            self.bytes_sent += 8 * away + 4 * table.columns * lent
            fetched.append(np.concatenate(rows))
            asked.append(wanted)
        return fetched, asked

    def _run_local(
        self,
        feed: Mapping[str, np.ndarray],
        fetched: Sequence[np.ndarray],
        places: Sequence[Sequence[np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Run loss and gradients of a batch on the fetched rows."""
        values = dict(feed)
        for table, rows, own in zip(self._tables, fetched, places, strict=True):
            # Gather of nothing from nothing is refused: a row that nobody reads.
            values[table.fetched] = rows if len(rows) else np.zeros((1, table.columns), np.float32)
            values.update({local: part for (_, local), part in zip(table.uses, own[:-1], strict=True)})
        missing = [name for name in self._local.inputs if name not in values]
        values |= self._update.views(missing)
        return self._local.run(values)

    def _require_separate(
        self,
        batch: dict[str, np.ndarray],
        made: Mapping[str, np.ndarray],
        fetched: Sequence[np.ndarray],
        plans: Sequence[Routes],
    ) -> None:
        """Raise UserError where a batch is more than its examples: its halves have another loss or gradient.

        So it is with normalization over the batch, with negatives drawn from it, with gradients that the
        graph clips, and with a mean that divides by a number of its own. It is looked at in steps 1, 2, 4,
        8, ..., since clipping, say, need not show in the first.
        """
        turn = self.committed + self.skipped + 1
        sizes = {array.shape[0] if array.ndim else -1 for array in batch.values()}
        if len(sizes) != 1 or -1 in sizes:
            raise UserError(
                "the model cannot be trained on several ranks: its batch inputs have no common first"
                " dimension, so whether its examples are independent cannot be seen"
            )
        size = sizes.pop()
        if turn & (turn - 1) or size < 2 or not np.isfinite(made[self._cut.loss]).all():
            return
        whole = self._compared(made, plans, [plan.places[-1] for plan in plans])
        total = {name: np.zeros(value.shape, np.float64) for name, value in whole.items()}
        most = {name: float(np.abs(value).max(initial=0.0)) for name, value in whole.items()}
        divisor = float(made[self._cut.divisor])
        for part in (slice(0, size // 2), slice(size // 2, size)):
            half = {name: np.ascontiguousarray(array[part]) for name, array in batch.items()}
            ids = self._ids(half)
            places = [
                places_among(plan, _of(ids, table), table.rows, self.size)
                for table, plan in zip(self._tables, plans, strict=True)
            ]
            feed = dict(half)
            for table, own in zip(self._tables, places, strict=True):
                feed[table.lookups], feed[table.first] = np.array(own[-1].size), np.array(0)
            values = self._run_local(feed, fetched, places)
            weight = (
                1.0 if self._cut.summed else float(values[self._cut.divisor]) / divisor if divisor else 0.0
            )
            if not weight:
                continue  # a half of ignored labels has no loss
            for name, value in self._compared(values, plans, [own[-1] for own in places]).items():
                share = weight * value.astype(np.float64)
                total[name] += share
                most[name] = max(most[name], float(np.abs(share).max(initial=0.0)))
        for name, value in whole.items():
            if np.abs(total[name] - value).max(initial=0.0) > _CLOSE * most[name]:
                raise UserError(
                    "the model cannot be trained on several ranks: the examples of a batch depend on each"
                    f" other, '{name}' of a batch is not that of its halves together"
                )

    def _compared(
        self, made: Mapping[str, np.ndarray], plans: Sequence[Routes], places: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return what halves of a batch must add up to: loss, dense gradients, gradients by distinct row."""
        values = {name: made[name] for name in (self._cut.loss, *self._cut.dense)}
        for table, plan, own in zip(self._tables, plans, places, strict=True):
            values[table.row_gradient] = merged(own.reshape(-1), made[table.row_gradient], plan.distinct)
        return values

    def _reduced(self, made: Mapping[str, np.ndarray], weight: float) -> dict[str, np.ndarray]:
        """Return loss, dense gradients and products, summed over ranks in one message."""
        names = {self._cut.loss: weight, **dict.fromkeys(self._cut.dense, weight)}
        names |= {table.product: weight * weight for table in self._tables}
        # A rank without an example has 0/0 for its loss, and a share of nothing in it.
        flat = [
            (made[n] * np.float32(w) if weight else np.zeros_like(made[n])).reshape(-1)
            for n, w in names.items()
        ]
        fused = np.concatenate([part.astype(np.float32) for part in flat])
        fused = self._fabric.sum(fused)
        self.bytes_sent += 2 * (self.size - 1) * fused.nbytes // self.size
        result: dict[str, np.ndarray] = {}
        start = 0
        for name in names:
            end = start + made[name].size
            result[name] = fused[start:end].reshape(made[name].shape).astype(made[name].dtype)
            start = end
        result["kfac/ranks/loss"] = result.pop(self._cut.loss).reshape(())
        return result

    def _owned(
        self, table: Boundary, plan: Routes, asked: Sequence[np.ndarray], rows: np.ndarray, weight: float
    ) -> dict[str, np.ndarray]:
        """Send summed gradients of rows to their owners; return what this rank got for its own, by row."""
        places = plan.places[-1].reshape(-1)
        own = np.zeros_like(rows) if not weight else rows
        summed = merged(places, own, plan.distinct) * np.float32(weight)
        counts = np.bincount(places, minlength=plan.distinct).astype(np.float64)
        ends = np.cumsum([len(part) for part in plan.asked])[:-1]
        lengths = [len(part) for part in asked]
        gradients = np.concatenate(self._fabric.exchange(np.split(summed, ends), lengths))
        numbers = np.concatenate(self._fabric.exchange(np.split(counts, ends), lengths))
        self.bytes_sent += (plan.distinct - len(plan.asked[self.rank])) * (4 * table.columns + 8)
        ids, inverse = np.unique(np.concatenate(asked), return_inverse=True)
        return {
            table.ids: ids,
            table.row_gradient: merged(inverse.reshape(-1), gradients, len(ids)),
            table.counts: merged(inverse.reshape(-1), numbers, len(ids)),
        }

    def gathered(self, name: str) -> np.ndarray:
        """Return a whole state on every rank: of a table, the rows of all ranks.

        Raises UserError for an unknown name.
        """
        if name not in {state.input for state in self._plan.states}:
            raise UserError(f"the model has no state '{name}'")
        own = self._update.views([name])[name]
        if name not in self._cut.sharded:
            return own.copy()
        table = next(t for t in self._tables if t.parameter == self._cut.sharded[name])
        lengths = [share_of(table.rows, rank, self.size) for rank in range(self.size)]
        result = np.empty((table.rows, *own.shape[1:]), own.dtype)
        for rank, part in enumerate(self._fabric.exchange([own] * self.size, lengths)):
            result[rank :: self.size] = part
        return result

    def parameters(self) -> dict[str, np.ndarray]:
        """Return all trained parameters, whole, on every rank."""
        return {s.input: self.gathered(s.input) for s in self._plan.states if s.role == "parameter"}

    def export(self, path: str | Path) -> None:
        """Write, on rank 0, the weights (`.safetensors`) or the forward graph with them, as one file.

        Raises UserError where the place cannot be written.
        """
        require_format(path)
        weights = self.parameters()
        error = None
        try:
            if self.rank == 0 and str(path).endswith(".safetensors"):
                write_weights(weights, path)
            elif self.rank == 0:
                save_model(forward_model(self._plan, weights, self._plan.step.ends), path)
        except UserError as e:
            error = e
        agree(self._fabric, error)

    def close(self) -> None:
        """Release sessions and buffers."""
        self._update.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, AgreedError):
            self._fabric.abort(error)
        self.close()


class _Part:
    """A model with its session."""

    def __init__(self, model: onnx.ModelProto, session: ort.InferenceSession) -> None:
        self.inputs = [value.name for value in model.graph.input]
        self._outputs = [value.name for value in model.graph.output]
        self._session = session

    def run(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name; raises UserError where ONNX Runtime fails."""
        try:
            results = self._session.run(None, {name: values[name] for name in self.inputs})
        except Exception as e:
            from kfac_onnx.device.failures import from_onnxruntime

            if not from_onnxruntime(e):
                raise
            raise UserError(
                f"the batch cannot be run through the graph: {e}", help="nothing was written"
            ) from e
        return {name: np.asarray(value) for name, value in zip(self._outputs, results, strict=True)}


def _of(ids: Mapping[str, np.ndarray], table: Boundary) -> list[np.ndarray]:
    """Return the ids of a table: of each use, and of all lookups last."""
    return [*(ids[name] for name, _ in table.uses), ids[table.ids]]
