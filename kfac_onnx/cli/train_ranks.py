"""`mpiexec -n P kfac-onnx train ...`: one run on P processes, of which rank 0 speaks."""

from __future__ import annotations

import itertools
import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.cli.options import given_options, is_quiet
from kfac_onnx.cli.output import print_json, say
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import click
    import onnx_ir as ir

    from kfac_onnx.ranks.fabric import Fabric

__all__ = ["train_on_ranks"]

_ALONE: Final = (
    "held_out",
    "eval_every",
    "measures",
    "scores",
    "labels",
    "monitor",
    "patience",
    "best",
    "log",
    "log_every",
    "histograms",
    "report",
    "checkpoint",
    "checkpoint_every",
    "keep",
    "resume",
    "into",
    "cuda_graph",
    "tables_in",
    "provider",
)
"""Options of `train` that one process has and several ranks do not."""


def train_on_ranks(
    ctx: click.Context,
    model: str,
    started: int,
    prepared: Callable[[], tuple[ir.Model, Mapping[str, Any] | None]],
) -> None:
    """Train on the ranks that a launcher started.

    Raises UserError, on rank 0 alone: what the others would say is the same.
    """
    from kfac_onnx.ranks.fabric import AgreedError, Mpi

    try:
        fabric = Mpi()
    except UserError as e:
        raise UserError(
            f"{started} processes were started, and mpi4py is not installed: each would train alone",
            help="pip install 'kfac-onnx[mpi]'",
        ) from e
    if fabric.size != started:
        raise UserError(
            f"{started} processes were started, and MPI sees {fabric.size}: each would train alone",
            help="start them with the mpiexec of the MPI that mpi4py was installed with",
        )
    try:
        _train(ctx, model, fabric, prepared)
    except AgreedError:
        if fabric.rank:
            ctx.exit(1)
        raise
    except BaseException as e:
        fabric.abort(e)  # the others wait for this rank
        raise


def _train(
    ctx: click.Context,
    model: str,
    fabric: Fabric,
    prepared: Callable[[], tuple[ir.Model, Mapping[str, Any] | None]],
) -> None:
    from kfac_onnx.cli.rows import Rows
    from kfac_onnx.disk.json_lines import json_lines
    from kfac_onnx.ranks import RankSession
    from kfac_onnx.ranks.fabric import AgreedError, agree

    chosen = ctx.params
    error, made, values = None, None, None
    try:
        for option in given_options(ctx, _ALONE):
            raise UserError(
                f"{option} is not for several ranks yet", help="leave it out, or train on one process"
            )
        made, values = prepared()
    except UserError as e:
        error = e
    agree(fabric, error)
    if made is None:
        raise AssertionError("an error was agreed on")
    session = RankSession(
        made,
        fabric,
        parameters=values,
        threads=chosen["threads"] or 1,
        lr=chosen["lr"],
        rest_lr=chosen["rest_lr"],
        schedule=chosen["schedule"],
    )
    with session, ExitStack() as files:
        batches = None
        write = None
        try:
            rows = Rows.chosen(ctx, model, session)
            order = None if chosen["no_shuffle"] else chosen["seed"]
            window = chosen["shuffle_window"]
            batches = rows.batches(
                chosen["data"], chosen["batch_size"], seed=order, full=False, window=window
            )
            if chosen["metrics"] is not None and fabric.rank == 0:
                write = files.enter_context(json_lines(chosen["metrics"], "metrics"))
        except UserError as e:
            error = e
        agree(fabric, error)
        if batches is None:
            raise AssertionError("an error was agreed on")
        ends = [chosen["steps"], None if chosen["epochs"] is None else chosen["epochs"] * len(batches)]
        total = min([end for end in ends if end is not None] or [len(batches)])
        session.end_schedule(total)
        begin, examples, in_a_row, loss = time.perf_counter(), 0, 0, math.nan
        for batch in itertools.islice(batches.since(0), total):
            metrics = session.step(session.part(batch))
            loss = math.nan if metrics["loss"] is None else metrics["loss"]
            examples += len(next(iter(batch.values())))
            in_a_row = in_a_row + 1 if metrics["skipped"] else 0
            if write is not None:
                at = session.committed + session.skipped
                row = {"step": metrics["step"], "position": at, "loss": loss, "lr": metrics["lr"]}
                write({**row, "skipped": metrics["skipped"], "held_out": None})
            if chosen["skip_limit"] and in_a_row >= chosen["skip_limit"]:
                raise AgreedError(f"the last {in_a_row} steps were all skipped: something was not finite")
        seconds = time.perf_counter() - begin
        if chosen["export"] is not None:
            session.export(chosen["export"])
        if fabric.rank == 0:
            _print(session, seconds, examples, loss, as_json=chosen["as_json"])


def _print(session: Any, seconds: float, examples: int, loss: float, *, as_json: bool) -> None:
    steps = session.committed + session.skipped
    if as_json:
        print_json(
            {
                "ranks": session.size,
                "steps": steps,
                "skipped": session.skipped,
                "examples": examples,
                "seconds": seconds,
                "ms_per_step": 1000 * seconds / max(1, steps),
                "loss": loss if math.isfinite(loss) else None,
                "bytes_sent_per_step": session.bytes_sent / max(1, steps),
            }
        )
    elif not is_quiet():
        skipped = f" ({session.skipped} skipped: not finite)" if session.skipped else ""
        say(f"{steps} steps{skipped} on {session.size} ranks, {examples} examples, last loss {loss:.6f}")
        milliseconds, sent = 1000 * seconds / max(1, steps), session.bytes_sent / max(1, steps) / 1e6
        say(f"{seconds:.1f} s, {milliseconds:.2f} ms per step, {sent:.3f} MB sent by rank 0 per step")
