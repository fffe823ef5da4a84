"""Fuzz the command line with damaged files: `python tests/trust/fuzz.py --cases 20000 --seed 1 --jobs 2`.

Each case gives a damaged model (or arrays, or a text) to one or two verbs. It holds when a verb succeeds, or
ends with exit code 1 and an error in sentences; it fails on a bug report (exit code 3), a traceback, a crash of
the process, no end within the time limit, more memory than the limit, raw control characters on the terminal,
a file left behind by a failed verb, or bytes of a file outside the model's folder in its output.

Cases run in long-living worker processes, which are started again when one dies. The table counts verdicts by
level; failing cases are written to a folder, with their files and what happened.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

SECONDS = 30.0
"""Limit of a case; a sound one takes some 0.05 s on an idle core."""
STARTING = 60.0
"""Seconds that a new worker has besides: it imports the package and transforms its models."""
MEMORY: Final = 3 << 30
"""Bytes of address space that a case may take beyond what the worker holds when it starts."""
CASES_PER_WORKER: Final = 1000
LONGEST: Final = 30_000
"""Characters of an error."""
RAW: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal may act on; none may come out of a file."""

# ------------------------------------------------------------------------------------------- in a worker


def _write_files(case: Any, folder: Path) -> None:
    for name, content in case.files.items():
        if name == "OUTSIDE":
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def _place_outside(case: Any, outside: Path) -> None:
    """Name the file outside the folder where a case says `OUTSIDE` (a model's location)."""
    model = case.files["model.onnx"]
    if "OUTSIDE" in case.files and b"OUTSIDE" in model:
        import onnx

        proto = onnx.ModelProto.FromString(model)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entry.value.replace("OUTSIDE", str(outside))
        case.files["model.onnx"] = proto.SerializeToString()


def _call(words: list[str]) -> tuple[int, str, str]:
    from kfac_onnx.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def _problem(code: int, out: str, err: str, folder: Path, before: set[Path]) -> str | None:
    """Return what is wrong with the way that a command ended, None if nothing is."""
    if code not in (0, 1, 2):
        report = re.search(r"help: report it with the file (\S+)", err)
        trace = json.loads(Path(report[1]).read_text())["traceback"] if report else [err[-2000:]]
        return f"exit code {code}\n" + "".join(trace)
    if "the memory ran out" in err:
        return "memory: it ran out before anybody looked at the sizes\n" + err
    if "Traceback" in err:
        return "traceback\n" + err
    if raw := RAW.search(out + err):
        return f"raw control character {raw[0]!r}\n" + err[-500:]
    if code == 1:
        if not re.search(r"^error: \S", err, re.MULTILINE):
            return "exit code 1 without an error\n" + err
        if len(err) > LONGEST:
            return f"an error of {len(err)} characters\n{err[:300]}"
        if left := set(folder.rglob("*")) - before:
            return f"a failed command left files behind: {sorted(map(str, left))}"
    return None


def _run_case(case: Any, folder: Path) -> dict[str, Any]:
    from cases import SECRET

    home = folder / "home"
    home.mkdir()
    outside = folder / "outside.bin"
    outside.write_bytes(SECRET * 1000)
    _place_outside(case, outside)
    _write_files(case, home)
    os.chdir(home)
    verdict, code = "accepted", 0
    for words in case.commands:
        verb = words[0]
        if verb.startswith("?"):
            if code:
                break
            words = [verb[1:], *words[1:]]
        before = set(home.rglob("*"))
        code, out, err = _call(words)
        problem = _problem(code, out, err, home, before)
        written = home / "out.onnx"
        if problem is None and written.is_file() and SECRET in written.read_bytes():
            problem = "bytes from outside the folder were read"
        if problem is None and SECRET.decode() in out + err:
            problem = "bytes from outside the folder were printed"
        if problem is not None:
            return {"verdict": "failed", "problem": problem, "command": words}
        if code == 1:
            verdict = "refused"
    return {"verdict": verdict}


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(seed: int) -> None:
    """Read case numbers from stdin, run them, and answer with one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    from cases import make_case

    import kfac_onnx.runtime.session  # noqa: F401  what a case needs is loaded before its time counts

    make_case(seed, 0)
    _limit_memory()
    temporary = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tempfile.tempdir = str(temporary)
    try:
        for line in sys.stdin:
            folder = temporary / "case"
            folder.mkdir()
            start = time.perf_counter()
            case = make_case(seed, int(line))
            made = time.perf_counter()
            answer = _run_case(case, folder)
            answer |= {"making": made - start, "seconds": time.perf_counter() - made}
            answer |= {"level": case.level, "source": case.source, "what": case.what}
            os.chdir("/")
            for item in temporary.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        os.chdir("/")
        shutil.rmtree(temporary, ignore_errors=True)


# --------------------------------------------------------------------------------------------- the driver


@dataclass
class _Worker:
    """A process that runs cases, and the one that it runs now."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    number: int | None = None
    until: float = 0.0
    done: int = 0

    @classmethod
    def start(cls, seed: int) -> _Worker:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        process = subprocess.Popen(  # noqa: S603  this file itself
            [sys.executable, __file__, "--seed", str(seed), "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return cls(process, errors)

    def give(self, number: int) -> None:
        if self.process.stdin is None:
            raise AssertionError("a worker has a stdin")
        starting = STARTING if not self.done else 0.0
        self.number, self.until = number, time.monotonic() + SECONDS + starting
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return what the worker says of its case; of one that died, how."""
        line = self.process.stdout.readline() if self.process.stdout is not None else b""
        self.done += 1
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read()[-3000:].decode(errors="replace")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"verdict": "failed", "problem": f"crash: the process ended with {how}\n{said}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@dataclass
class Tally:
    """Verdicts by level, the failures, and the slowest case."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    kinds: Counter[str] = field(default_factory=Counter[str])
    failures: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    slowest: tuple[float, int] = (0.0, -1)

    def add(self, number: int, answer: dict[str, Any], seed: int) -> None:
        if "level" not in answer:
            from cases import make_case

            case = make_case(seed, number)
            answer |= {
                "level": case.level,
                "source": case.source,
                "what": case.what,
                "command": case.commands,
            }
        self.counts[answer["level"], answer["verdict"]] += 1
        self.kinds[answer["what"]] += 1
        self.slowest = max(self.slowest, (answer.get("seconds", 0.0), number))
        if answer["verdict"] == "failed":
            self.failures.append({"case": number, **answer})

    def table(self) -> str:
        """Return the counts as text."""
        verdicts = ("accepted", "refused", "failed")
        lines = [f"{'level':10}" + "".join(f"{name:>10}" for name in (*verdicts, "cases"))]
        levels = sorted({level for level, _ in self.counts})
        for level in [*levels, "all"]:
            numbers = [
                sum(n for (of, got), n in self.counts.items() if got == verdict and level in (of, "all"))
                for verdict in verdicts
            ]
            lines.append(f"{level:10}" + "".join(f"{n:10}" for n in (*numbers, sum(numbers))))
        return "\n".join(lines)


def fuzz(numbers: range, seed: int, jobs: int) -> Tally:
    """Run cases in `jobs` processes; return the tally."""
    tally = Tally()
    waiting = iter(numbers)
    workers = [_Worker.start(seed) for _ in range(min(jobs, len(numbers)))]
    try:
        for worker in workers:
            worker.give(next(waiting))
        while busy := [worker for worker in workers if worker.number is not None]:
            streams = {worker.process.stdout: worker for worker in busy}
            ready, _, _ = select.select(list(streams), [], [], 1.0)
            for stream in ready:
                _collect(workers, streams[stream], streams[stream].answer(), tally, waiting, seed)
            for worker in busy:
                if worker.process.stdout not in ready and time.monotonic() > worker.until:
                    answer = {"verdict": "failed", "problem": f"hang: no end after {SECONDS:g} s"}
                    worker.process.kill()
                    worker.process.wait()
                    _collect(workers, worker, answer, tally, waiting, seed)
    finally:
        for worker in workers:
            worker.stop()
    return tally


def _collect(
    workers: list[_Worker], worker: _Worker, answer: dict[str, Any], tally: Tally, waiting: Any, seed: int
) -> None:
    """Note an answer and give the worker, or one in its place, the next case."""
    if worker.number is None:
        raise AssertionError("a worker that answers has a case")
    tally.add(worker.number, answer, seed)
    worker.number = None
    following = next(waiting, None)
    if following is None:
        return
    if worker.process.poll() is not None or worker.done >= CASES_PER_WORKER:
        worker.stop()
        workers[workers.index(worker)] = worker = _Worker.start(seed)
    worker.give(following)


def _keep(failure: dict[str, Any], seed: int, folder: Path) -> None:
    """Write a failing case with its files."""
    from cases import make_case

    case = make_case(seed, failure["case"])
    place = folder / f"{seed}-{case.number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    _write_files(case, place)
    (place / "what-happened.txt").write_text(
        f"{case.level}: {case.what} of {case.source}\ncommands: {case.commands!r}\n\n{failure['problem']}\n"
    )


def main() -> int:
    """Run the harness; the exit code is 1 if a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="folder for failing cases"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.seed)
        return 0
    start = time.monotonic()
    numbers = range(arguments.first, arguments.first + arguments.cases)
    tally = fuzz(numbers, arguments.seed, arguments.jobs)
    for failure in tally.failures:
        _keep(failure, arguments.seed, arguments.failures)
        last = failure["problem"].strip().splitlines()
        print(f"case {failure['case']} ({failure['level']}, {failure['what']}, {failure['source']}): "  # noqa: T201
              f"{last[0]} ... {last[-1][:200]}")  # fmt: skip
    print(tally.table())  # noqa: T201
    seconds, number = tally.slowest
    print(f"seed {arguments.seed}, {time.monotonic() - start:.0f} s; slowest: case {number}, {seconds:.1f} s")  # noqa: T201
    if tally.failures:
        print(f"failing cases are in {arguments.failures}")  # noqa: T201
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
