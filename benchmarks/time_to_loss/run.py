"""Wall-clock time of training alone to a held-out loss: ours beside PyTorch's and FBGEMM's optimizers.

    python benchmarks/time_to_loss/run.py lm
    python benchmarks/time_to_loss/run.py movielens --movielens ml-100k.inter
    python benchmarks/time_to_loss/run.py --report

All arms train the same model from the same values on the same batches. Rates (of the tables, and of Adam on
the rest) are tuned for each arm over grids of the same size on a seed and on that half of the held-out data
which the report does not use. Then all arms of a seed train in turn, some steps each, so that whatever else
the machine does meets them alike; evaluations are not timed. Runs are added to `results.jsonl` as they end,
and are not made again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kfac_onnx.bench.arms import ARMS, open_arm
from kfac_onnx.bench.movielens import read_ratings
from kfac_onnx.bench.workloads import Case, cases, write_parameters
from kfac_onnx.demo.corpus import load_corpus
from kfac_onnx.demo.curves import Curve

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results.jsonl"
OURS = "adaptive"
COMPARED = {
    "lm": (OURS, "torch-sparse-adam", "torch-adam", "fbgemm-rowwise-adagrad"),
    # Two of its tables have one column, and FBGEMM's have multiples of four.
    "movielens": (OURS, "torch-sparse-adam", "torch-adam", "torch-sparse-adagrad"),
}
RATES = {
    OURS: (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04),
    "torch-sparse-adam": (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04),
    "torch-adam": (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04),
    "torch-sparse-adagrad": (0.0075, 0.015, 0.03, 0.06, 0.12, 0.25),
    "fbgemm-rowwise-adagrad": (0.015, 0.03, 0.06, 0.12, 0.25, 0.5),
}
REST_RATES = {"lm": (0.001, 0.002, 0.004), "movielens": (0.001,)}
STEPS = {"lm": 1_200, "movielens": 1_000}
TUNING_SEED = 100
TURN = 10
"""Steps that an arm makes before the next one's turn; the first finds the caches as the others left them."""
EVERY = 25

Part = dict[str, np.ndarray]


@functools.cache
def case_of(task: str, movielens: Path | None) -> tuple[Case, list[Part], list[Part]]:
    """Return a task with the held-out data of tuning and of the report."""
    if task == "lm":
        parts: list[Part] = list(load_corpus().held_out(500))
        return cases("lm", vocab_sizes=(1,))[0], parts[1::2], parts[::2]
    if movielens is None:
        raise SystemExit("give the ratings with --movielens: u.data, or ml-100k.inter of the recbole wheel")
    data = read_ratings(movielens)
    halves = [{name: array[k::2] for name, array in data.held_out.items()} for k in (1, 0)]
    return cases("movielens", vocab_sizes=(1,), data=data)[0], halves[:1], halves[1:]


def loss_of(trainee: Any, parts: list[Part]) -> float:
    """Return the mean held-out loss; infinite where it is no number."""
    loss = trainee.evaluate(parts)
    return loss if math.isfinite(loss) else math.inf


def past() -> list[dict[str, Any]]:
    """Return the runs so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def note(run: dict[str, Any]) -> None:
    """Add a run."""
    with RESULTS.open("a") as file:
        file.write(json.dumps(run) + "\n")


def tune(task: str, arm: str, movielens: Path | None) -> tuple[float, float]:
    """Return the rates of tables and rest with the lowest held-out loss on the tuning seed."""
    case, held_out, _ = case_of(task, movielens)
    runs = [run for run in past() if (run["kind"], run["task"], run["arm"]) == ("tuning", task, arm)]
    tried = {(run["lr"], run["rest_lr"]): run["best"] for run in runs}
    for lr, rest_lr in itertools.product(RATES[arm], REST_RATES[task]):
        if (lr, rest_lr) in tried:
            continue
        with tempfile.TemporaryDirectory() as folder:
            parameters = Path(folder) / "start.safetensors"
            write_parameters(case, parameters, TUNING_SEED)
            trainee = open_arm(ARMS[arm], case, parameters, threads=None, lr=lr, rest_lr=rest_lr)
            losses: list[float] = []
            batches = case.batches(TUNING_SEED)
            for step in range(1, STEPS[task] + 1):
                trainee.step(next(batches))
                if step % (4 * EVERY) == 0:
                    losses.append(loss_of(trainee, held_out))
            trainee.close()
        tried[lr, rest_lr] = min(losses)
        note({"kind": "tuning", "task": task, "arm": arm, "lr": lr, "rest_lr": rest_lr, "best": min(losses)})
        print(f"{task} {arm} lr={lr:g} rest={rest_lr:g}: {min(losses):.4f}", flush=True)
    return min(tried, key=lambda rates: tried[rates])


def race(task: str, seed: int, rates: dict[str, tuple[float, float]], movielens: Path | None) -> None:
    """Train all arms on a seed in turn; note held-out losses and the seconds of training until each."""
    case, _, held_out = case_of(task, movielens)
    with tempfile.TemporaryDirectory() as folder:
        parameters = Path(folder) / "start.safetensors"
        write_parameters(case, parameters, seed)
        trainees = {
            arm: open_arm(ARMS[arm], case, parameters, threads=None, lr=lr, rest_lr=rest_lr)
            for arm, (lr, rest_lr) in rates.items()
        }
        streams: dict[str, Iterator[Part]] = {arm: case.batches(seed) for arm in trainees}
        spent = dict.fromkeys(trainees, 0.0)
        curves: dict[str, list[tuple[int, float, float]]] = {arm: [] for arm in trainees}
        order = list(trainees)
        for start in range(0, STEPS[task], TURN):
            order = [*order[1:], order[0]]
            for arm in order:
                ahead = list(itertools.islice(streams[arm], TURN))
                began = time.perf_counter()
                for batch in ahead:
                    trainees[arm].step(batch)
                spent[arm] += time.perf_counter() - began
                if (start + TURN) % (2 * EVERY) == 0:
                    curves[arm].append((start + TURN, spent[arm], loss_of(trainees[arm], held_out)))
        for trainee in trainees.values():
            trainee.close()
    for arm, (lr, rest_lr) in rates.items():
        run = {"kind": "race", "task": task, "arm": arm, "seed": seed, "lr": lr, "rest_lr": rest_lr}
        note({**run, "curve": curves[arm]})
        print(f"{task} seed {seed} {arm}: {min(loss for _, _, loss in curves[arm]):.4f}", flush=True)


def reached(run: dict[str, Any], level: float) -> tuple[float, float] | None:
    """Return the steps and the seconds to a level, or None."""
    steps, seconds, losses = zip(*run["curve"], strict=True)
    at = Curve(tuple(steps), tuple(losses)).first_below(level)
    return None if at is None else (at, float(np.interp(at, (0, *steps), (0.0, *seconds))))


def report() -> None:
    """Print the tables of the README."""
    races = [run for run in past() if run["kind"] == "race"]
    for task in dict.fromkeys(run["task"] for run in races):
        runs = {(run["arm"], run["seed"]): run for run in races if run["task"] == task}
        seeds = sorted({seed for _, seed in runs})
        print(f"\n{task}: of a baseline's own steps and seconds to its own best loss, those of `{OURS}`\n")
        print("| arm | rates | ms a step | best loss | steps | seconds, each seed | median |")
        print("|---|---|--:|--:|--:|--:|--:|")
        for arm in COMPARED[task]:
            own = [runs[arm, seed] for seed in seeds]
            lr, rest_lr = own[0]["lr"], own[0]["rest_lr"]
            pace = statistics.median(1e3 * run["curve"][-1][1] / run["curve"][-1][0] for run in own)
            best = [min(loss for _, _, loss in run["curve"]) for run in own]
            cells = f"| `{arm}` | {lr:g}, {rest_lr:g} | {pace:.2f} | {statistics.mean(best):.4f} |"
            if arm == OURS:
                print(cells + " | | |")
                continue
            pairs: list[tuple[float, float]] = []
            for run, level, seed in zip(own, best, seeds, strict=True):
                ours, theirs = reached(runs[OURS, seed], level), reached(run, level)
                if ours is None or theirs is None:
                    pairs.append((math.inf, math.inf))
                else:
                    pairs.append((ours[0] / theirs[0], ours[1] / theirs[1]))
            steps, seconds = zip(*pairs, strict=True)
            each = ", ".join(f"{ratio:.2f}" for ratio in seconds)
            print(
                cells + f" {statistics.median(steps):.2f} | {each} | **{statistics.median(seconds):.2f}** |"
            )


def main() -> None:
    """Tune, race, report."""
    parser = argparse.ArgumentParser(description="Wall-clock time of training to a held-out loss.")
    parser.add_argument("tasks", nargs="*", choices=[[], *STEPS], default=[])
    parser.add_argument("--movielens", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    for task in options.tasks:
        rates = {arm: tune(task, arm, options.movielens) for arm in COMPARED[task]}
        there = {run["seed"] for run in past() if (run["kind"], run["task"]) == ("race", task)}
        for seed in range(options.seeds):
            if seed not in there:
                race(task, seed, rates, options.movielens)
    if options.report or not options.tasks:
        report()


if __name__ == "__main__":
    main()
