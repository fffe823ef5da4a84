"""Long runs on hostile data: `python tests/trust/soak.py --steps 100000 [--presets half,r1.7] [--seed 0]`.

A small training graph is stepped through batches as bad as data get: ids by Zipf's law, so that some rows are
looked up all the time and some never; one id for a whole batch; batches of one; targets a million times too
large; targets of NaN, which must be skipped, and nothing else may be. A twin in float64 takes the same gradient
rows at the same weights and keeps its own averages from the first step to the last, so that what float32, the
running scales and their renormalization lose adds up over the whole run and shows. The table has one line per
window of steps:

    rss       resident memory in MB: flat after the first window
    scale     running scale of A, 1 after each renormalization, never below 2⁻²⁰
    min eig   smallest eigenvalue of G over the largest: never below what rounding explains
    asym      max|G − Gᵀ| over max|G|
    drift A, G   largest difference to the twin since the last line, over the twin's largest entry
    hist      the same for the row scales of `adagrad` and `adaptive`, row by row
    root      difference of a refreshed root to float64's of the same G, over its largest entry
    update    difference of one step's change of the tables to the twin's with that root, over its largest entry
    skipped   steps that were skipped: as many as batches held a NaN
    host      roots that the graph could not be trusted with

It fails (exit code 1) where a number passes its limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from corpus_cases import Case, MarkedGraph, StepReference
from preset_names import ALL

from kfac_onnx.api import transform
from kfac_onnx.fisher.presets import PRESETS as REGISTRY
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Iterator

GRAPH: Final = "ortart_legcore__twotower"
PRESETS: Final = tuple(ALL)
TABLES: Final = ("user_emb.weight", "item_emb.weight")
LEARNING_RATES: Final = {name: 0.3 * preset.lr for name, preset in REGISTRY.items()}
EPS: Final = float(np.finfo(np.float32).eps)
NAN_EVERY, HUGE_EVERY, ONE_EVERY, SAME_EVERY = 97, 211, 13, 17

LIMITS: Final = {
    "rss_growth": 24.0,  # MB after the first window: the allocator's own slack, measured 0 to 6
    "scale": 2.0**-20,
    "min_eigenvalue": -1e-6,  # rounding of entries, eps/2 · √D; measured -1e-7
    "asymmetry": 1e-6,
    "drift_a": 2e-5,  # float32 increments, some 300 in the memory of decay 0.99; measured 2e-6
    "drift_g": 2e-5,  # 20 steps of memory at decay 0.95, roundings of eps each; measured 3e-6
    "drift_history": 1e-3,  # a sum of 1e5 squares in float32 (adagrad); decaying windows (adaptive)
    "root": 5e-4,  # the root's tolerance 2·eps·(1 + D/ρ) = 4e-4; r1.7's inverse is exact to eps
    "update": 2e-4,  # rounding of entries 1e4 times smaller than the row's largest, which cancel in rows · root
}
"""What a line may show. Below is worse for `scale` and `min_eigenvalue`, above for the rest."""


@dataclass
class Window:
    """One line of the table."""

    preset: str
    step: int
    rss: float
    rss_growth: float
    scale: float
    min_eigenvalue: float
    asymmetry: float
    drift_a: float
    drift_g: float
    drift_history: float
    root: float
    update: float
    skipped: int
    bad_batches: int
    fallbacks: int
    loss: float
    ms: float

    def problems(self) -> list[str]:
        """Say which numbers pass their limits."""
        found = [
            f"{name} {getattr(self, name):.3g} (limit {limit:.3g})"
            for name, limit in LIMITS.items()
            if not (
                getattr(self, name) >= limit
                if name in ("scale", "min_eigenvalue")
                else getattr(self, name) <= limit
            )
        ]
        if self.skipped != self.bad_batches:
            found.append(f"{self.skipped} steps skipped, {self.bad_batches} batches held a NaN")
        return found


def resident() -> float:
    """Return this process's resident memory in MB (Linux; 0 elsewhere)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20


def batches(seed: int) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    """Yield batches without end, each with whether it holds a NaN."""
    rng = np.random.default_rng(seed)
    users = 1.0 / np.arange(1, 121) ** 1.2
    items = 1.0 / np.arange(1, 151) ** 1.2
    users[100:], items[100:] = 0.0, 0.0  # never looked up
    number = 0
    while True:
        number += 1
        size = 1 if number % ONE_EVERY == 0 else int(rng.integers(2, 17))
        user = rng.choice(120, size, p=users / users.sum())
        item = rng.choice(150, size, p=items / items.sum())
        if number % SAME_EVERY == 0:
            user[:], item[:] = user[0], item[0]
        target = rng.normal(size=size)
        if number % HUGE_EVERY == 0:
            target[rng.integers(size)] *= 10.0 ** rng.uniform(3, 6)
        bad = number % NAN_EVERY == 0
        if bad:
            target[rng.integers(size)] = rng.choice([np.nan, np.inf, -np.inf])
        yield {"user": user, "item": item, "target": target.astype(np.float32)}, bad


class Soak:
    """A session and its twin; `run` makes steps and yields a line per window."""

    def __init__(self, preset: str, *, seed: int = 0, threads: int = 1, decay_a: float | None = None) -> None:
        case = Case(GRAPH)
        self.preset = preset
        self.graph = MarkedGraph(case)
        weights = self.graph.initial(case)
        lr = LEARNING_RATES[preset]
        options: dict[str, Any] = {} if decay_a is None else {"decay_a": decay_a}
        model = transform(case.path, preset=preset, lr=lr, rest="adam", rest_lr=1e-4, **options)
        self.session = TrainingSession(model, parameters=weights, threads=threads, seed=seed)
        self.twin = StepReference(self.graph, weights, preset, lr, "adam", 1e-4)
        if decay_a is not None:
            for table in self.twin.tables.values():
                table.settings = type(table.settings)(**{**vars(table.settings), "input_decay": decay_a})
        self.batches = batches(seed)
        self.bad = 0
        self.worst = dict.fromkeys(("drift_a", "drift_g", "drift_history", "root", "update"), 0.0)
        for table in self.twin.tables.values():
            table._refresh = lambda: None  # type: ignore[method-assign]  the session's roots are taken instead
        self.base: float | None = None

    def run(self, steps: int, window: int) -> Iterator[Window]:
        """Make steps; yield a line after each window of them."""
        start, loss = time.perf_counter(), float("nan")
        for number in range(1, steps + 1):
            loss = self._step(compare=number % 50 == 0 or number <= 50, loss=loss)
            if number % window == 0 or number == steps:
                ms = 1000 * (time.perf_counter() - start) / number
                yield self._line(number, loss, ms)
                self.worst = dict.fromkeys(self.worst, 0.0)

    def _step(self, *, compare: bool, loss: float) -> float:
        batch, bad = next(self.batches)
        self.bad += bad
        session, twin = self.session, self.twin
        before = {key: session.parameters[key] for key in session.parameters}
        twin.weights = {key: array.astype(np.float64) for key, array in before.items()}
        out = {} if bad else self.graph.run(twin.feed(batch))
        records = session._stepper.roots.records
        counted = {name: (records[name].refreshes, records[name].fallbacks) for name in TABLES}
        made = session.step(batch)
        if made["skipped"] or bad:
            return loss
        for name in TABLES:
            root = session._holders[f"kfac/{name}/root"].live.view()
            twin.tables[name].root = root.astype(np.float64)
        twin.step(out)
        for name, (refreshes, fallbacks) in counted.items():
            if records[name].refreshes > refreshes:
                self._check_root(name, clipped=records[name].fallbacks > fallbacks)
        if compare:
            self._compare(before)
        return float(made["loss"] if made["loss"] is not None else np.nan)

    def _compare(self, before: dict[str, np.ndarray]) -> None:
        states = self.session.states

        def worse(what: str, got: np.ndarray, want: np.ndarray, rounding: float = 0.0) -> None:
            size = float(np.abs(want).max())
            if size > 0:
                error = max(0.0, float(np.abs(got - want).max()) - rounding)
                self.worst[what] = max(self.worst[what], error / size)

        for name in TABLES:
            twin = self.twin.tables[name]
            if f"kfac/{name}/A" in states:
                scale = float(states.get(f"kfac/{name}/A.scale", 1.0))
                counts = states[f"kfac/{name}/A"].astype(np.float64) * scale
                worse("drift_a", counts, twin.input_factor)
                if f"kfac/{name}/A.total" in states:
                    worse("drift_a", states[f"kfac/{name}/A.total"], np.asarray(twin.input_factor.sum()))
            worse("drift_g", states[f"kfac/{name}/G"].astype(np.float64), twin.output_factor)
            for what, scale_name in (("squares", ""), ("window", "window.scale")):
                if f"kfac/{name}/{what}" in states:
                    scale = float(states[f"kfac/{name}/{scale_name}"]) if scale_name else 1.0
                    history = states[f"kfac/{name}/{what}"].astype(np.float64) * scale
                    self._history(history, twin.history, what)
            change = states[name].astype(np.float64) - before[name]
            # the change is read off float32 tables: sixteen lookups of a row round sixteen times
            rounding = 16 * EPS / 2 * float(np.abs(before[name]).max())
            worse("update", change, self.twin.weights[name] - before[name], rounding)

    def _check_root(self, name: str, *, clipped: bool) -> None:
        """Compare a root that was just refreshed with float64's of the session's own G.

        Negative eigenvalues that rounding made are 0 for the host, and what they are for the graph.
        """
        table = self.twin.tables[name]
        kept = table.output_factor
        table.output_factor = self.session._holders[f"kfac/{name}/G"].live.view().astype(np.float64)
        _, damping = table.damping()
        w, Q = np.linalg.eigh(table.g_hat())
        table.output_factor = kept
        w = (np.maximum(w, 0.0) if clipped else w) + damping
        exact = (Q * w**table.settings.exponent) @ Q.T
        error = float(np.abs(table.root - exact).max() / np.abs(exact).max())
        self.worst["root"] = max(self.worst["root"], error)

    def _history(self, got: np.ndarray, want: np.ndarray, what: str) -> None:
        """Compare each row's own scale; a window that decays is compared where its row was looked up lately."""
        seen = want > (0 if what == "squares" else want.max() * 1e-12)
        if seen.any():
            error = float((np.abs(got - want)[seen] / want[seen]).max())
            self.worst["drift_history"] = max(self.worst["drift_history"], error)

    def _line(self, step: int, loss: float, ms: float) -> Window:
        gc.collect()
        rss = resident()
        growth = 0.0 if self.base is None else rss - self.base
        self.base = rss if self.base is None else self.base
        states = self.session.states
        smallest, asymmetry, scale = 1.0, 0.0, 1.0
        for name in TABLES:
            G = states[f"kfac/{name}/G"].astype(np.float64)
            w = np.linalg.eigvalsh((G + G.T) / 2)
            smallest = min(smallest, float(w[0] / w[-1]))
            asymmetry = max(asymmetry, float(np.abs(G - G.T).max() / np.abs(G).max()))
            for what in ("A.scale", "window.scale"):
                scale = min(scale, float(states.get(f"kfac/{name}/{what}", 1.0)))
        for key, array in states.items():
            if not np.isfinite(np.asarray(array, np.float64)).all():
                message = f"state {key} is not finite after {step} steps"
                raise AssertionError(message)
        return Window(
            preset=self.preset,
            step=step,
            rss=rss,
            rss_growth=growth,
            scale=scale,
            min_eigenvalue=smallest,
            asymmetry=asymmetry,
            skipped=self.session.skipped,
            bad_batches=self.bad,
            fallbacks=self.session.root_fallbacks,
            loss=loss,
            ms=ms,
            **self.worst,
        )

    def close(self) -> None:
        """Release the session."""
        self.session.close()


COLUMNS: Final = (
    ("preset", "{:<9}"), ("step", "{:>7}"), ("rss", "{:>7.1f}"), ("scale", "{:>8.1e}"),
    ("min_eigenvalue", "{:>9.1e}"), ("asymmetry", "{:>8.1e}"), ("drift_a", "{:>8.1e}"),
    ("drift_g", "{:>8.1e}"), ("drift_history", "{:>8.1e}"), ("root", "{:>8.1e}"), ("update", "{:>8.1e}"), ("skipped", "{:>8}"),
    ("fallbacks", "{:>6}"), ("loss", "{:>9.3g}"), ("ms", "{:>6.2f}"),
)  # fmt: skip
HEADS: Final = (
    "preset   ", "   step", "    rss", "   scale", "  min eig", "    asym", " drift A", " drift G", "    hist",
    "    root", "  update", " skipped", "  host", "     loss", "ms/step",
)  # fmt: skip


def main() -> int:
    """Run the presets one after the other; return 1 if a number passed its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--windows", type=int, default=10, help="lines per preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write the lines to this file")
    options = parser.parse_args()
    import logging

    logging.getLogger("kfac_onnx").setLevel(logging.ERROR)
    failed = False
    lines: list[dict[str, Any]] = []
    sys.stdout.write(" ".join(HEADS) + "\n")
    for preset in options.presets.split(","):
        soak = Soak(preset, seed=options.seed, threads=options.threads)
        for line in soak.run(options.steps, max(1, options.steps // options.windows)):
            sys.stdout.write(" ".join(form.format(getattr(line, name)) for name, form in COLUMNS) + "\n")
            sys.stdout.flush()
            lines.append(asdict(line))
            for problem in line.problems():
                failed = True
                sys.stdout.write(f"  FAILED: {problem}\n")
        soak.close()
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
