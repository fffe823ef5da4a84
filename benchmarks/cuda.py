"""Everything about CUDA in one command: where nodes run, whether the numbers are right, what a step costs.

    python benchmarks/cuda.py [--device N] [--minutes 10] [--cuda-graph] [--output benchmarks/cuda]

1. Placement: every node that was inserted, by ONNX Runtime's own account, for the demo's language model and
   matrix factorisation under each preset; one that falls back to the CPU, or a copy within a step, is a
   failure.
2. Parity: the tests in tests/cuda (golden files, exporters' graphs, twenty steps), on the GPU alone.
3. Cost: `kfac-onnx bench --provider cuda` beside PyTorch's optimizers on the same GPU, in a process for each
   size: the language model at 1,024 examples a step; matrix factorisation of 65,536 lookups, D = 128, from
   1e5 to 2e7 rows in each table.

Prints a short table, and writes results.json and results.md. Exit code 2: a check failed. Without a GPU it
says why, writes nothing, and exits with 0, so that a machine without one can run it all the same. It ends
when its minutes are over, and says what it left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kfac_onnx.fisher.presets import PRESETS as REGISTRY

ROOT = Path(__file__).resolve().parents[1]
PRESETS = tuple(REGISTRY)
LOOKUPS, WIDTH, LM_EXAMPLES = 65_536, 128, 1_024
VOCABULARIES = (100_000, 1_000_000, 10_000_000, 20_000_000)
ARMS = ("plain-sgd", "half", "adagrad", "plain-adagrad")
TORCH_ARMS = ("torch-sgd", "torch-sparse-adam", "torch-sparse-adagrad", "torch-adagrad", "torch-fused-adam")
LARGE = 10_000_000
"""From so many rows on, loading takes most of the time, and fewer arms are run."""
LARGE_ARMS = ("plain-sgd", "half", "torch-sgd", "torch-sparse-adam", "torch-fused-adam")
TESTS_SHARE = 0.4
"""Of the minutes, at most for the tests."""


@dataclass
class Report:
    """What was found; `left_out` says what was not run, and why, `problems` what ended with an error."""

    machine: dict[str, str] = field(default_factory=dict)
    placement: list[dict[str, Any]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    bench: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a check did not hold."""
        away = any(row["fallbacks"] or row["copies"] for row in self.placement)
        return away or bool(self.parity.get("failed")) or bool(self.problems)


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def no_gpu(device: int) -> str | None:
    """Return why nothing can run on that GPU, in words; None where it can."""
    from kfac_onnx.device.providers import provider_list
    from kfac_onnx.errors import UserError

    try:
        provider_list([("cuda", {"device_id": device})])
    except UserError as e:
        return f"{e.message}; {e.help}" if e.help else e.message
    return None


def placement(device: int) -> list[dict[str, Any]]:
    """Return a row for each graph and preset: inserted nodes by provider, and what is not on the GPU."""
    from kfac_onnx.api import transform
    from kfac_onnx.bench.workloads import cases
    from kfac_onnx.device.placement import measure
    from kfac_onnx.step.plan import partition

    rows: list[dict[str, Any]] = []
    chosen = [*cases("lm", vocab_sizes=()), *cases("mf", vocab_sizes=(100_000,), widths=(WIDTH,))]
    for case in chosen:
        for preset in PRESETS:
            for deterministic in (False, True):
                model = transform(case.graph(), preset=preset, target="cuda", deterministic=deterministic)
                stages = [(s.name, s.model) for s in partition(model, sequential=False).stages]
                found = measure(stages, ("cuda", {"device_id": str(device)}))
                rows.append(
                    {
                        "graph": case.workload,
                        "preset": preset,
                        "deterministic": deterministic,
                        "inserted": found.by_provider(inserted=True),
                        "fallbacks": [f"{node.stage}: {node.name}" for node in found.fallbacks],
                        "copies": [f"{copy.stage}: {copy.value}" for copy in found.own_copies],
                        "users": [f"{node.stage}: {node.name}" for node in found.user_fallbacks],
                    }
                )
    return rows


def parity(seconds: float) -> dict[str, Any]:
    """Run the tests of CUDA; return how many passed and failed, and the names of those that failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"left_out": "pytest is missing: pip install -e '.[dev]'"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        words = ["-n0", "-q", "-m", "cuda", "-k", "not every_graph", "--no-header", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "tests/cuda", *words]
        try:
            done = subprocess.run(  # noqa: S603  its words are ours
                command, cwd=ROOT, timeout=seconds, check=False, stdout=sys.stderr
            )
        except subprocess.TimeoutExpired:
            return {"left_out": f"the tests took more than {seconds:.0f} s"}
        if not report.exists():
            return {"failed": [f"pytest ended with {done.returncode}"], "passed": 0, "skipped": 0}
        return outcome(report)


def outcome(report: Path) -> dict[str, Any]:
    """Return what a file of results in JUnit's form says."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314  pytest wrote it
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in bad],
    }


def bench_words(options: argparse.Namespace, *, torch: bool, rows: int | None = None) -> list[str]:
    """Return the words of `kfac-onnx bench` for tables of so many rows; None is the language model."""
    if rows is None:
        words = ["lm", "--lm-examples", str(LM_EXAMPLES)]
    else:
        words = ["mf", "--vocab-sizes", str(rows), "--widths", str(WIDTH), "--lookups", str(LOOKUPS)]
    arms = [*ARMS, *TORCH_ARMS] if rows is None or rows < LARGE else LARGE_ARMS
    chosen = [name for name in arms if torch or not name.startswith("torch-")]
    words += ["--provider", "cuda", "--provider-option", f"device_id={options.device}"]
    words += ["--arms", ",".join(chosen), "--steps", str(options.steps), "--seconds", str(options.seconds)]
    return [*words, *(["--cuda-graph"] if options.cuda_graph else [])]


def bench(name: str, words: list[str], clock: Clock, report: Report) -> None:
    """Run one benchmark in a process of its own, so that all memory of the GPU is free before the next."""
    if clock.left < 20:
        report.left_out.append(f"{name}: the time is over")
        return
    need = 1.2 * 8 * WIDTH * int(words[words.index("--vocab-sizes") + 1]) if "--vocab-sizes" in words else 1e8
    with tempfile.TemporaryDirectory(dir=scratch(need)) as folder:
        command = [sys.executable, "-m", "kfac_onnx", "bench", *words, "--scratch", folder, "-o", folder]
        try:
            done = subprocess.run(  # noqa: S603  its words are ours
                command, cwd=ROOT, timeout=clock.left, check=False, stdout=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            report.left_out.append(f"{name}: the time is over")
            return
        if done.returncode != 0:
            report.problems.append(f"{name}: `kfac-onnx bench` ended with {done.returncode}")
            return
        report.bench.append(json.loads((Path(folder) / "results.json").read_text()))


def scratch(needed: float) -> Path | None:
    """Return a folder in memory for initial values where there is room; None is the system's own."""
    shared = Path("/dev/shm")  # noqa: S108  a folder with a name of its own is made in it
    if shared.is_dir() and shutil.disk_usage(shared).free > needed:
        return shared
    return None


def markdown(report: Report) -> str:
    """Return everything as a page: the machine, placement, parity, and the benchmark's own tables."""
    from kfac_onnx.bench.report import sheets
    from kfac_onnx.bench.results import Results

    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    lines = ["# On CUDA", "", f"On: {machine}.", "", "### Placement of inserted nodes", ""]
    lines += [
        "| graph | preset | rows summed | on the GPU | elsewhere | copied in a step |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in report.placement:
        there = row["inserted"].get("CUDAExecutionProvider", 0)
        away = sum(row["inserted"].values()) - there
        order = "in one order" if row["deterministic"] else "atomically"
        lines.append(
            f"| {row['graph']} | {row['preset']} | {order} | {there} | "
            f"{away} ({len(row['fallbacks'])} without a kernel) | {len(row['copies'])} |"
        )
    lines += ["", "### Parity", ""]
    if "left_out" in report.parity:
        lines.append(f"Not run: {report.parity['left_out']}.")
    else:
        failed = report.parity.get("failed", [])
        lines.append(f"{report.parity.get('passed', 0)} tests passed, {len(failed)} failed.")
        lines += [f"- failed: {name}" for name in failed]
    lines.append("")
    whole = merged(report)
    if whole is not None:
        lines += [sheet.markdown() for sheet in sheets(Results.from_json(whole))]
    for title, items in (("Failed", report.problems), ("Left out", report.left_out)):
        if items:
            lines += [f"### {title}", "", *(f"- {item}" for item in items), ""]
    return "\n".join(lines)


def merged(report: Report) -> dict[str, Any] | None:
    """Return the benchmarks as one; None where there is none."""
    if not report.bench:
        return None
    first, *others = report.bench
    whole = {**first, "cases": [*first["cases"]]}
    for other in others:
        whole["cases"] += other["cases"]
    return whole


def write(report: Report, folder: Path) -> None:
    """Write results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    data = asdict(report) | {"failed": report.failed}
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(report), encoding="utf-8")


def run(options: argparse.Namespace) -> Report:
    """Do everything in its order; what is quick and decides comes first."""
    from kfac_onnx.bench.machine import describe
    from kfac_onnx.bench.place import place_of
    from kfac_onnx.errors import UserError

    clock, report = Clock(options.minutes), Report()
    torch = importlib.util.find_spec("torch") is not None
    where = place_of("cuda", {"device_id": str(options.device)}, cuda_graph=options.cuda_graph)
    report.machine = describe(torch=torch, place=where)
    tell(f"on {report.machine.get('gpu', 'an unknown GPU')}")
    try:
        report.placement = placement(options.device)
    except UserError as e:
        report.left_out.append(f"placement: {e.message}")
    tell("the tests of tests/cuda")
    report.parity = parity(TESTS_SHARE * 60 * options.minutes)
    if not torch:
        report.left_out.append("PyTorch's optimizers: PyTorch is missing (pip install 'kfac-onnx[torch]')")
    for rows in (None, *VOCABULARIES):
        name = "lm" if rows is None else f"mf V={rows:,}"
        tell(name)
        bench(name, bench_words(options, torch=torch, rows=rows), clock, report)
    return report


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> int:
    """Run as a command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=int, default=0, help="number of the GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="end after so many")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of an arm")
    parser.add_argument("--seconds", type=float, default=2.0, help="the most that an arm is timed for")
    parser.add_argument("--cuda-graph", action="store_true", help="capture the stages that can be")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "cuda")
    options = parser.parse_args(words)
    reason = no_gpu(options.device)
    if reason is not None:
        print(f"SKIPPED: benchmarks/cuda.py needs a GPU, and there is none that works here: {reason}")
        return 0
    report = run(options)
    write(report, options.output)
    print(markdown(report))
    return 2 if report.failed else 0


if __name__ == "__main__":
    # This file's folder comes first on the path, and NVIDIA's own packages are named `cuda` too.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
