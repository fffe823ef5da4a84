"""Run the convergence sweep; every finished run is one line of results.jsonl, and is not run again.

    python benchmarks/convergence/sweep.py                    the grid on seed 0, then its best on all seeds
    python benchmarks/convergence/sweep.py --processes 2      two runs at a time, one thread each
    python benchmarks/convergence/sweep.py --only half,plain-adam --schedule constant
    python benchmarks/convergence/sweep.py --setting half,constant,0.012,0.003 --seeds 0,1,2

A run takes about 10 s of one core, the whole sweep about an hour.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: one thread per run

import argparse
import dataclasses
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

from grid import BATCH, EVERY, SEEDS, STEPS, Setting, settings

RESULTS = Path(__file__).parent / "results.jsonl"
TOP = 3
"""Settings of each preset and schedule, best on the first seed, that run on the other seeds."""


def run(setting: Setting, seed: int, **options: Any) -> dict[str, Any]:
    """Train once and return the line of the results: the held-out losses in nats, ms per step, skips.

    `options` are further options of `transform`.
    """
    from importlib import resources

    from kfac_onnx.api import transform
    from kfac_onnx.demo.corpus import load_corpus
    from kfac_onnx.demo.model import initial_parameters
    from kfac_onnx.runtime import TrainingSession

    corpus = load_corpus()
    held_out = corpus.held_out()
    packed = resources.files("kfac_onnx.demo").joinpath("data/lm.onnx")
    with resources.as_file(packed) as path:
        rates = {"lr": setting.lr, "rest_lr": setting.rest_lr}
        model = transform(path, preset=setting.preset, rest="adam", **rates, **options)
    schedule = "constant" if setting.schedule == "constant" else f"linear:steps={STEPS}"
    at: list[int] = []
    losses: list[float] = []
    spent = 0.0
    skipped = 0
    with TrainingSession(model, parameters=initial_parameters(seed), threads=1, schedule=schedule) as session:
        for step, batch in zip(range(1, STEPS + 1), corpus.batches(BATCH, seed), strict=False):
            start = time.perf_counter()
            skipped += session.step(batch)["skipped"]
            spent += time.perf_counter() - start
            if step % EVERY == 0:
                at.append(step)
                losses.append(round(float(session.evaluate(held_out)), 6))
                if not math.isfinite(losses[-1]) or losses[-1] > 1.3 * min(losses):
                    break  # diverged: what came before stays in the results
    return {
        **dataclasses.asdict(setting),
        "seed": seed,
        "at": at,
        "losses": losses,
        "ms_per_step": round(1e3 * spent / step, 3),
        "skipped": skipped,
    }


def read(path: Path = RESULTS) -> dict[tuple[Setting, int], dict[str, Any]]:
    """Return the finished runs by setting and seed."""
    runs: dict[tuple[Setting, int], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            data = json.loads(line)
            setting = Setting(data["schedule"], data["preset"], data["lr"], data["rest_lr"])
            runs[setting, data["seed"]] = data
    return runs


def best(done: dict[tuple[Setting, int], dict[str, Any]], wanted: list[Setting]) -> list[Setting]:
    """Return the `TOP` settings of each preset and schedule with the lowest loss on the first seed."""
    groups: dict[tuple[str, str], list[tuple[float, Setting]]] = {}
    for setting in wanted:
        if (setting, SEEDS[0]) in done:
            loss = min(done[setting, SEEDS[0]]["losses"])
            groups.setdefault((setting.schedule, setting.preset), []).append((loss, setting))
    return [setting for group in groups.values() for _, setting in sorted(group)[:TOP]]


def work(jobs: list[tuple[Setting, int]], processes: int) -> None:
    """Run the jobs that are not done yet, and append each to the results as it ends."""
    done = read()
    todo = [job for job in jobs if job not in done]
    start = time.perf_counter()
    with (
        multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8) as pool,
        RESULTS.open("a") as out,
    ):
        for count, result in enumerate(pool.imap_unordered(_run, todo), 1):
            out.write(json.dumps(result) + "\n")
            out.flush()
            print(
                f"{count}/{len(todo)} {time.perf_counter() - start:.0f}s seed {result['seed']} "
                f"{result['preset']} {result['schedule']} lr={result['lr']:g} rest={result['rest_lr']:g} "
                f"best {min(result['losses']):.4f} at {result['ms_per_step']:.1f} ms/step",
                flush=True,
            )


def _run(job: tuple[Setting, int]) -> dict[str, Any]:
    return run(*job)


def main() -> None:
    """Parse the command line and run the sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", help="presets, separated by commas")
    parser.add_argument("--schedule", choices=("constant", "linear"))
    parser.add_argument("--setting", help="PRESET,SCHEDULE,LR,REST_LR: one setting outside the grid")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="seeds of --setting")
    options = parser.parse_args()
    if options.setting is not None:
        preset, schedule, lr, rest_lr = options.setting.split(",")
        setting = Setting(schedule, preset, float(lr), float(rest_lr))
        work([(setting, int(seed)) for seed in options.seeds.split(",")], options.processes)
        return
    presets = None if options.only is None else options.only.split(",")
    wanted = [
        setting
        for setting in settings()
        if (presets is None or setting.preset in presets) and options.schedule in (None, setting.schedule)
    ]
    work([(setting, SEEDS[0]) for setting in wanted], options.processes)
    work([(setting, seed) for setting in best(read(), wanted) for seed in SEEDS[1:]], options.processes)


if __name__ == "__main__":
    main()
