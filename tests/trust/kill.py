"""Kill training runs, and resume them: `python tests/trust/kill.py --kills 200 --jobs 2`.

A run is `kfac-onnx train` with a checkpoint every one to three steps, in a process of its own. At a random
moment it gets `kill -9`: while it opens, within a step, within the write of a checkpoint. The next process
resumes from the folder, until the run is through. It holds when

- every checkpoint in the folder is whole after every kill, there is one as soon as there ever was one, and the
  next process resumes from the newest, so that the position never falls back;
- the last checkpoint, the exported weights and the metrics are, bit by bit, those of a run that nobody killed,
  rows of metrics that were written twice among them;
- at the end nothing is left of the writes that were killed.

The table shows kills by case, and how many of them hit the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

GRAPHS: Final = Path(__file__).parents[1] / "data" / "graphs"
LONGEST: Final = 120.0
"""Seconds after which a process that was not killed is taken for one that hangs."""
KEEP: Final = 3

TABLE: Final = """<ir_version: 10, opset_import: ["" : 18]>
lookup (float[{rows}, 16] emb, int64[n] ids, float[n, 16] target) => (float loss, float[{rows}, 16] emb_grad)
  <int64[2] shape = {{{rows}, 16}}, int64[1] column = {{-1}}, float two = {{2}}> {{
  found = Gather <axis = 0> (emb, ids)
  error = Sub(found, target)
  square = Mul(error, error)
  loss = ReduceSum <keepdims = 0> (square)
  d_rows = Mul(error, two)
  zeros = ConstantOfShape(shape)
  tall = Unsqueeze(ids, column)
  size = Shape(found)
  wide = Expand(tall, size)
  emb_grad = ScatterElements <axis = 0, reduction = "add"> (zeros, wide, d_rows)
}}
"""
"""A table that is big for its step, so that most of the time goes into the checkpoints."""


@dataclass(frozen=True)
class Case:
    """A graph with data, and how it is trained."""

    name: str
    graph: str
    options: tuple[str, ...]
    threads: int
    every: int
    steps: int
    batch: int

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.threads} thread{'' if self.threads == 1 else 's'}, saved every {self.every}"
        )


SCHEDULE: Final = ("--schedule", "cosine:warmup=10")
CASES: Final = (
    Case("nplm half adam", "torchjoint_in__nplm", ("--rest", "adam", *SCHEDULE), 1, 1, 150, 6),
    Case("big table half", "table", ("--lr", "0.1"), 1, 1, 40, 32),
    Case(
        "dlrm half, a batch that is not finite",
        "torchjoint_in__dlrm_mean",
        ("--rest", "adagrad"),
        4,
        2,
        150,
        6,
    ),
    Case(
        "nplm r1.7 momentum", "torchjoint_in__nplm", ("--preset", "r1.7", "--rest", "momentum"), 4, 3, 240, 6
    ),
    Case("nplm adagrad", "torchjoint_in__nplm", ("--preset", "adagrad"), 1, 2, 200, 6),
    Case("nplm adaptive", "torchjoint_in__nplm", ("--preset", "adaptive", *SCHEDULE), 4, 1, 150, 6),
    Case(
        "nplm with dropout",
        "ortart_dyncore__nplm_dropout",
        (
            "--rest",
            "adam",
        ),
        1,
        1,
        150,
        5,
    ),
    Case("big table adagrad", "table", ("--preset", "adagrad"), 4, 1, 40, 32),
)


@dataclass
class Tally:
    """What was tried, and what went wrong."""

    kills: int = 0
    opening: int = 0
    writing: int = 0
    resumes: int = 0
    repeated: int = 0
    problems: list[str] = field(default_factory=list[str])


# ------------------------------------------------------------------------------------------------ the process


def child(words: list[str]) -> int:
    """Run the command line in this process, and say on stdout when it trains."""
    from kfac_onnx.cli.main import main
    from kfac_onnx.runtime import TrainingSession

    fit = TrainingSession.fit_as

    def announced(self: TrainingSession, *given: Any, **named: Any) -> Any:
        os.write(1, f"position {self.position}\n".encode())
        return fit(self, *given, **named)

    TrainingSession.fit_as = announced  # type: ignore[method-assign]
    return main(words)


# ------------------------------------------------------------------------------------------------- the harness


def prepare(case: Case, folder: Path) -> list[str]:
    """Write a case's graph, data and first values; return the command line but for its outputs."""
    rng = np.random.default_rng(7)
    examples = case.batch * 20
    folder.mkdir(parents=True)
    values: dict[str, np.ndarray] = {}
    if case.graph == "table":
        import onnx

        rows = 120_000
        (folder / "graph.onnx").write_bytes(
            onnx.parser.parse_model(TABLE.format(rows=rows)).SerializeToString()
        )
        data = {
            "ids": rng.integers(0, rows, examples),
            "target": rng.normal(size=(examples, 16)).astype(np.float32),
        }
        values = {"emb": rng.normal(size=(rows, 16)).astype(np.float32)}
    else:
        shutil.copyfile(GRAPHS / f"{case.graph}.onnx", folder / "graph.onnx")
        side = json.loads((GRAPHS / f"{case.graph}.json").read_text())
        with np.load(GRAPHS / f"{case.graph}.npz") as file:
            given = {name[3:]: file[name] for name in file.files if name.startswith("in:")}
        batch = {*side["data_inputs"], *side["label_inputs"]}
        data = {}
        for name, array in given.items():
            if name not in batch:
                values[name] = array
            elif np.issubdtype(array.dtype, np.integer):
                low, high = int(array.min()), int(array.max())
                data[name] = rng.integers(low, high + 1, (examples, *array.shape[1:])).astype(array.dtype)
            else:
                data[name] = rng.normal(size=(examples, *array.shape[1:])).astype(array.dtype)
        if "dense" in data:
            data["dense"][examples // 2] = np.nan  # one batch of each epoch is skipped
            data["labels"] = (data["labels"] > 0).astype(np.float32)
    np.savez(folder / "data.npz", **data)
    words = ["train", str(folder / "graph.onnx"), "--data", str(folder / "data.npz"), *case.options]
    if values:
        np.savez(folder / "values.npz", **values)
        words += ["--parameters", str(folder / "values.npz")]
    words += ["--batch-size", str(case.batch), "--steps", str(case.steps), "--threads", str(case.threads)]
    return [*words, "--checkpoint-every", str(case.every), "--keep", str(KEEP)]


class Life:
    """One process of a run."""

    def __init__(self, words: list[str], place: Path) -> None:
        self._place = place
        place.mkdir(exist_ok=True)
        out = [*("--checkpoint", str(place / "saved")), *("--metrics", str(place / "rows.jsonl"))]
        out += ["--export", str(place / "trained.onnx")]
        if checkpoints(place):
            out.append("--resume")
        with (place / "stderr").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  our own program
                [sys.executable, __file__, "--child", *words, *out],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def position(self) -> int | None:
        """Wait until it trains and return from which position on; None if it ended before."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], LONGEST)
        line = self._process.stdout.readline() if ready else b""
        return int(line.split()[1]) if line.startswith(b"position ") else None

    def kill(self) -> bool:
        """Kill it; return False if it had ended by itself."""
        alive = self._process.poll() is None
        self._process.send_signal(signal.SIGKILL)
        code = self._process.wait()
        self._close()
        return alive and code == -signal.SIGKILL

    def finish(self) -> int:
        """Wait for its end; return its exit code."""
        try:
            return self._process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1
        finally:
            self._close()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()

    def says(self) -> str:
        return (self._place / "stderr").read_text(errors="replace")[-2000:]


def checkpoints(place: Path) -> list[Path]:
    """Return a run's checkpoints, the newest last."""
    return sorted((place / "saved").glob("step-*.ckpt"))


def number(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def leftovers(place: Path) -> list[str]:
    """Return what lies in the folder and is no checkpoint."""
    folder = place / "saved"
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if not (name.startswith("step-") and name.endswith(".ckpt"))]


@dataclass
class Reference:
    """A run that nobody killed."""

    words: list[str]
    place: Path
    seconds: float


def reference(case: Case, folder: Path) -> Reference:
    words = prepare(case, folder)
    life = Life(words, folder / "whole")
    if life.position() != 0:
        raise RuntimeError(f"{case}: the run did not start: {life.says()}")
    start = time.perf_counter()
    if life.finish() != 0:
        raise RuntimeError(f"{case}: the run did not end well: {life.says()}")
    return Reference(words, folder / "whole", time.perf_counter() - start)


def rows(path: Path) -> dict[int, set[str]]:
    """Return the different lines of metrics by position; a killed process may have left half a line."""
    found: dict[int, set[str]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.setdefault(json.loads(line)["position"], set()).add(line)
    return found


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return a checkpoint's tensors and everything else that it says of the run."""
    from kfac_onnx.runtime.saved.checkpoint import read_checkpoint

    found = read_checkpoint(path)
    tensors = {f"state {name}": np.asarray(array).tobytes() for name, array in found.states.items()}
    tensors |= {f"constant {name}": np.asarray(array).tobytes() for name, array in found.constants.items()}
    tensors["model"] = found.model
    # Entropy is for random operators without a seed, and `train` always has one; settings name files of the run.
    skipped = ("states", "constants", "model", "entropy", "settings")
    rest = {name: value for name, value in vars(found).items() if name not in skipped}
    return tensors, rest


def differences(case: Case, killed: Path, whole: Path) -> list[str]:
    """Return in what a killed run's results differ from those of a whole one."""
    found: list[str] = []
    ours, theirs = checkpoints(killed), checkpoints(whole)
    if [item.name for item in ours] != [item.name for item in theirs]:
        found.append(f"checkpoints {[item.name for item in ours]} and not {[item.name for item in theirs]}")
    elif number(ours[-1]) != case.steps:
        found.append(f"the last checkpoint is of position {number(ours[-1])}")
    else:
        for mine, other in zip(ours, theirs, strict=True):
            (tensors, rest), (wanted, wanted_rest) = contents(mine), contents(other)
            names = [name for name in wanted | tensors if tensors.get(name) != wanted.get(name)]
            names += [name for name in wanted_rest if rest.get(name) != wanted_rest[name]]
            if names:
                found.append(f"'{mine.name}' differs in {', '.join(names)}")
    if (killed / "trained.onnx").read_bytes() != (whole / "trained.onnx").read_bytes():
        found.append("the exported weights differ")
    mine, other = rows(killed / "rows.jsonl"), rows(whole / "rows.jsonl")
    wrong = [at for at in other if mine.get(at) != other[at]]
    if wrong or mine.keys() != other.keys():
        found.append(f"the metrics differ at positions {wrong[:5]} or have other positions")
    if leftovers(killed):
        found.append(f"killed writes left {leftovers(killed)}")
    return found


def check_folder(case: Case, place: Path, at: int) -> list[str]:
    """Return what is wrong with the checkpoints after a kill; the last resume was at position `at`."""
    from kfac_onnx.errors import UserError
    from kfac_onnx.runtime.saved.checkpoint import read_checkpoint

    wrong: list[str] = []
    found = checkpoints(place)
    if at and (not found or number(found[-1]) < at):
        wrong.append(f"the newest checkpoint is {found[-1:]}, after a resume at position {at}")
    for path in found:
        try:
            read_checkpoint(path)
        except UserError as e:
            wrong.append(f"not whole after a kill: {e}")
    if len(found) > KEEP + 1:
        wrong.append(f"{len(found)} checkpoints are kept instead of {KEEP}")
    return wrong


def run(case: Case, whole: Reference, kills: int, seed: int, place: Path) -> Tally:
    """Kill a run so many times, or until it is through, and compare what it made."""
    random_ = random.Random(seed)  # noqa: S311  not for secrets
    tally = Tally()
    at, complain = 0, tally.problems.append
    while True:
        expected = number(checkpoints(place)[-1]) if checkpoints(place) else 0
        life = Life(whole.words, place)
        left = kills - tally.kills
        if left and random_.random() < 0.1:  # while it opens: nothing may happen to the folder
            life.wait(random_.uniform(0.0, 1.5))
            if life.kill():
                tally.kills += 1
                tally.opening += 1
                for problem in check_folder(case, place, at):
                    complain(f"{case}, seed {seed}: {problem}")
                continue
        position = life.position()
        if position is None and life.finish() == 0 and expected == case.steps:
            break  # killed between its last checkpoint and its end: nothing was left to train
        if position is None:
            complain(f"{case}, seed {seed}: it ended instead of going on: {life.says()}")
            return tally
        tally.resumes += expected > 0
        if position != expected:
            complain(f"{case}, seed {seed}: resumed at {position} and not at {expected}")
        at = position
        if not left:
            code = life.finish()
            if code != 0:
                complain(f"{case}, seed {seed}: exit code {code}: {life.says()}")
                return tally
            break
        remaining = whole.seconds * (case.steps - position) / case.steps
        life.wait(random_.uniform(0.0, 2 * remaining / (left + 1)))
        if not life.kill():
            if life.finish() == 0:
                break
            complain(f"{case}, seed {seed}: it ended by itself: {life.says()}")
            return tally
        tally.kills += 1
        tally.writing += bool(leftovers(place))
        for problem in check_folder(case, place, at):
            complain(f"{case}, seed {seed}: {problem}")
    lines = (place / "rows.jsonl").read_text().splitlines()
    tally.repeated = len(lines) - len(set(lines))
    for problem in differences(case, place, whole.place):
        complain(f"{case}, seed {seed}: {problem}")
    return tally


def harness(
    kills: int, *, seed: int, jobs: int, per_run: int, cases: tuple[Case, ...] = CASES
) -> dict[Case, Tally]:
    """Run until so many kills were made; return what came of it by case."""
    total = {case: Tally() for case in cases}
    with (
        tempfile.TemporaryDirectory(prefix="kfac-kill-") as folder,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        wholes = dict(
            zip(
                cases,
                pool.map(
                    lambda case: reference(
                        case, Path(folder) / case.name.replace(" ", "-") / str(case.threads)
                    ),
                    cases,
                ),
                strict=True,
            )
        )
        done, round_ = 0, 0
        while done < kills:
            shares: list[tuple[Case, int]] = []
            for index in range(max(jobs, len(cases))):
                share = min(per_run, kills - done - sum(n for _, n in shares))
                if share > 0:
                    shares.append((cases[(index + round_) % len(cases)], share))
            round_ += len(shares)
            runs = [
                (
                    case,
                    pool.submit(
                        run,
                        case,
                        wholes[case],
                        share,
                        hash((seed, round_, i)),
                        Path(folder) / f"run-{round_}-{i}",
                    ),
                )
                for i, (case, share) in enumerate(shares)
            ]
            for case, future in runs:
                found, sums = future.result(), total[case]
                for name, value in vars(found).items():
                    setattr(sums, name, getattr(sums, name) + value)
                done += found.kills
            if any(tally.problems for tally in total.values()):
                break
            for item in Path(folder).glob("run-*"):
                shutil.rmtree(item)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--per-run", type=int, default=12)
    options = parser.parse_args()
    start = time.perf_counter()
    total = harness(options.kills, seed=options.seed, jobs=options.jobs, per_run=options.per_run)
    out = sys.stdout.write
    out("| case | kills | while it opened | while it saved | resumes | rows written again | problems |\n")
    out("|---|---|---|---|---|---|---|\n")
    sums = Tally()
    for case, found in total.items():
        out(f"| {case} | {found.kills} | {found.opening} | {found.writing} | {found.resumes} |")
        out(f" {found.repeated} | {len(found.problems)} |\n")
        for name, value in vars(found).items():
            setattr(sums, name, getattr(sums, name) + value)
    out(
        f"{sums.kills} kills, {sums.writing} of them within the write of a checkpoint, {sums.resumes} resumes;"
    )
    out(f" {len(sums.problems)} problems; {time.perf_counter() - start:.0f} s\n")
    for problem in sums.problems:
        out(f"PROBLEM {problem}\n")
    return 1 if sums.problems else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2:]))
    sys.exit(main())
