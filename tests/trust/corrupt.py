"""Damage checkpoints and read them: `python tests/trust/corrupt.py --cases 5000 --seed 0`.

Each case damages the newest checkpoint of a folder: bits flipped in any region of the file, cut short at any
length, blocks zeroed, moved, put in or taken out, other files in its place. It holds when

- reading the file is an error in a sentence, or gives, bit by bit, what was written (a byte that nothing reads);
- reading the folder gives the checkpoint before it, bit by bit, with a warning that names the damaged file.

Every so many cases the folder is resumed for real, and the next step must be the one of a run that was not
damaged. `places` then tries what is no damage of bytes: folders, links in circles, pipes, files that may not be
read, newer versions, other graphs, a full disk and a folder that may not be written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.saved.checkpoint import read_checkpoint
from kfac_onnx.runtime.saved.checkpoint_folder import read_newest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GRAPHS: Final = Path(__file__).parents[1] / "data" / "graphs"
RESUMED_EVERY: Final = 100
LONGEST: Final = 2000
"""Characters of an error."""
NOBODY: Final = 65534


# ------------------------------------------------------------------------------------------------------ damage


@dataclass(frozen=True)
class File:
    """A checkpoint's bytes and where its regions lie."""

    data: bytes
    regions: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, path: Path) -> File:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        regions = {"length": (0, 8), "header": (8, 8 + length)}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                regions[name] = (8 + length + first, 8 + length + last)
        return cls(data, regions)


def flipped(file: File, rng: random.Random, region: str) -> bytes:
    data = bytearray(file.data)
    first, last = file.regions[region]
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(data)


def flipped_in_length(file: File, rng: random.Random) -> bytes:
    return flipped(file, rng, "length")


def flipped_in_header(file: File, rng: random.Random) -> bytes:
    return flipped(file, rng, "header")


def flipped_in_model(file: File, rng: random.Random) -> bytes:
    return flipped(file, rng, "model")


def flipped_in_a_tensor(file: File, rng: random.Random) -> bytes:
    names = [
        name
        for name, (first, last) in file.regions.items()
        if name not in ("length", "header", "model") and last > first
    ]
    return flipped(file, rng, rng.choice(names))


def cut_short(file: File, rng: random.Random) -> bytes:
    edges = [edge for region in file.regions.values() for edge in region]
    length = rng.choice(
        [rng.randrange(len(file.data)), rng.choice(edges), rng.randrange(64), len(file.data) - 1]
    )
    return file.data[: min(length, len(file.data) - 1)]


def block(file: File, rng: random.Random) -> tuple[int, int]:
    size = min(rng.choice([1, 16, 512, 4096]), len(file.data))
    first = rng.randrange(len(file.data) - size + 1)
    if size >= 512:
        first -= first % 512  # as disks lose them
    return first, first + size


def zeroed(file: File, rng: random.Random) -> bytes:
    first, last = block(file, rng)
    return file.data[:first] + bytes(last - first) + file.data[last:]


def filled(file: File, rng: random.Random) -> bytes:
    first, last = block(file, rng)
    return file.data[:first] + rng.choice([b"\xff", b"\x41", b"{"]) * (last - first) + file.data[last:]


def moved(file: File, rng: random.Random) -> bytes:
    first, last = block(file, rng)
    other = rng.randrange(len(file.data) - (last - first) + 1)
    return file.data[:first] + file.data[other : other + last - first] + file.data[last:]


def taken_out(file: File, rng: random.Random) -> bytes:
    first, last = block(file, rng)
    return file.data[:first] + file.data[last:]


def put_in(file: File, rng: random.Random) -> bytes:
    first, last = block(file, rng)
    return file.data[:first] + rng.randbytes(last - first) + file.data[first:]


def continued(file: File, rng: random.Random) -> bytes:
    return file.data + rng.randbytes(rng.choice([1, 8, 4096]))


def twice(file: File, rng: random.Random) -> bytes:
    return file.data + file.data


def random_bytes(file: File, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 8, 100, 5000]))


def another_length(file: File, rng: random.Random) -> bytes:
    length = rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(file.data)])
    return struct.pack("<Q", length) + file.data[8:]


def swapped_tensors(file: File, rng: random.Random) -> bytes:
    """Two tensors of one size change places."""
    by_size: dict[int, list[str]] = {}
    for name, (first, last) in file.regions.items():
        if name not in ("length", "header") and last > first:
            by_size.setdefault(last - first, []).append(name)
    pairs = [names for names in by_size.values() if len(names) > 1]
    one, other = rng.sample(rng.choice(pairs), 2)
    (a, b), (c, d) = file.regions[one], file.regions[other]
    data = bytearray(file.data)
    data[a:b], data[c:d] = file.data[c:d], file.data[a:b]
    return bytes(data)


def changed_number(file: File, rng: random.Random) -> bytes:
    """A digit of the header becomes another: it is still JSON."""
    first, last = file.regions["header"]
    digits = [at for at in range(first, last) if file.data[at : at + 1].isdigit()]
    at = rng.choice(digits)
    other = rng.choice([digit for digit in b"0123456789" if digit != file.data[at]])
    return file.data[:at] + bytes([other]) + file.data[at + 1 :]


DAMAGE: Final[tuple[Callable[[File, random.Random], bytes], ...]] = (
    flipped_in_length, flipped_in_header, flipped_in_model, flipped_in_a_tensor, flipped_in_a_tensor, cut_short,
    zeroed, filled, moved, taken_out, put_in, continued, twice, random_bytes, another_length, swapped_tensors,
    changed_number,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- the harness


@dataclass
class Tally:
    """Verdicts by kind of damage, and what went wrong."""

    verdicts: dict[str, Counter[str]] = field(default_factory=dict[str, "Counter[str]"])
    problems: list[str] = field(default_factory=list[str])

    def note(self, kind: str, verdict: str) -> None:
        self.verdicts.setdefault(kind, Counter())[verdict] += 1


class Heard(logging.Handler):
    """Keeps the warnings of a block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    handler, logger = Heard(), logging.getLogger("kfac_onnx")
    logger.addHandler(handler)
    try:
        yield handler.said
    finally:
        logger.removeHandler(handler)


def contents(found: Any) -> dict[str, object]:
    """Return everything that a checkpoint holds, comparable."""
    plain: dict[str, object] = {
        name: value for name, value in vars(found).items() if name not in ("states", "constants")
    }
    for part in ("states", "constants"):
        plain |= {
            f"{part} {name}": (str(array.dtype), tuple(array.shape), np.asarray(array).tobytes())
            for name, array in getattr(found, part).items()
        }
    return plain


@dataclass
class Run:
    """A run with two checkpoints, and what comes after each."""

    folder: Path
    before: dict[str, object]
    after: dict[str, object]
    batches: list[dict[str, np.ndarray]]
    third: dict[str, bytes]
    """The states after the third step, whichever checkpoint it is made from."""

    @property
    def older(self) -> Path:
        return self.folder / "step-0000000001.ckpt"

    @property
    def newest(self) -> Path:
        return self.folder / "step-0000000002.ckpt"


def bits(session: TrainingSession) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.states.items()}


def session_of(graph: str, **options: Any) -> tuple[TrainingSession, list[dict[str, np.ndarray]]]:
    with np.load(GRAPHS / f"{graph}.npz") as data:
        arrays = {key: data[key] for key in data.files}
    model = kx.transform(GRAPHS / f"{graph}.onnx", **options)
    step = metadata.read(model, "step", metadata.Step)
    assert step is not None
    own = {item.name for item in metadata.read_list(model, "parameters", metadata.Parameter)}
    own.update(step.constants)
    values = {key[3:]: array for key, array in arrays.items() if key[:3] == "in:" and key[3:] in own}
    batches = [
        {key: arrays.get(f"{part}:{key}", arrays[f"in:{key}"]) for key in step.batch}
        for part in ("in", "in2")
    ]
    return TrainingSession(model, parameters=values, threads=1), batches


def prepared(folder: Path, graph: str = "torchjoint_in__nplm", rest: str = "adam") -> Run:
    session, batches = session_of(graph, rest=rest)
    with session:
        for batch in batches:
            session.step(batch)
            session.save(folder)
        session.step(batches[0])
        third = bits(session)
    run = Run(folder, {}, {}, [batches[0], batches[1], batches[0]], third)
    run.before, run.after = contents(read_checkpoint(run.older)), contents(read_checkpoint(run.newest))
    return run


def judge(run: Run, kind: str, tally: Tally, label: str) -> None:
    """Read the damaged newest checkpoint, alone and in its folder."""
    wrong = tally.problems.append
    intact = False
    try:
        intact = contents(read_checkpoint(run.newest)) == run.after
        if not intact:
            wrong(f"{label}: read, with other contents")
        tally.note(kind, "read as it was")
    except UserError as e:
        tally.note(kind, "refused")
        if len(str(e)) > LONGEST or "\n" in e.message or str(run.newest) not in e.message:
            wrong(f"{label}: the error is no sentence that names the file: {e}")
    except Exception as e:  # what the harness looks for
        wrong(f"{label}: {type(e).__name__}: {e}")
        return
    with heard() as said:
        try:
            path, found, damaged = read_newest(run.folder)
        except Exception as e:
            wrong(f"{label}: the folder cannot be read: {type(e).__name__}: {e}")
            return
    if intact:
        return
    if path != run.older or contents(found) != run.before or damaged != (run.newest,):
        wrong(f"{label}: the folder gives something else than the checkpoint before")
    if not any(run.newest.name in line and run.older.name in line for line in said):
        wrong(f"{label}: no warning says what is taken instead: {said}")


def resumed(run: Run, tally: Tally, label: str) -> None:
    """Resume the folder for real and make the steps up to the third."""
    with heard(), TrainingSession.resume(run.folder, threads=1) as session:
        for batch in run.batches[session.position :]:
            session.step(batch)
        if bits(session) != run.third:
            tally.problems.append(f"{label}: the resumed run came to other numbers")


def harness(cases: int, *, seed: int, folder: Path, resumed_every: int = RESUMED_EVERY) -> Tally:
    """Damage and read so many times."""
    run, tally = prepared(folder / "run"), Tally()
    whole = File.of(run.newest)
    for number in range(cases):
        rng = random.Random(hash((seed, number)))  # noqa: S311  not for secrets
        damage = DAMAGE[number % len(DAMAGE)]
        data = damage(whole, rng)
        kind, label = damage.__name__.replace("_", " "), f"case {number} ({damage.__name__}) of seed {seed}"
        run.newest.write_bytes(data)
        if data == whole.data:
            tally.note(kind, "no damage")
        else:
            judge(run, kind, tally, label)
        if number % resumed_every == 0:
            resumed(run, tally, label)
            tally.note("resumed for real", "as it would have gone on")
    run.newest.write_bytes(whole.data)
    resumed(run, tally, "undamaged")
    return tally


# -------------------------------------------------------------------------------------------------- the places


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint's header, with the right checksum."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    notes = header["__metadata__"]
    fields = json.loads(notes["kfac_onnx"])
    change(fields)
    notes["kfac_onnx"] = json.dumps(fields)
    notes["sha256"] = hashlib.sha256(notes["kfac_onnx"].encode()).hexdigest()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def places(folder: Path) -> Tally:
    """Put something else in the place of the newest checkpoint; each is refused or passed over, never used."""
    run, tally = prepared(folder / "run"), Tally()
    newest, whole = run.newest, run.newest.read_bytes()
    other = prepared(folder / "other", graph="torchjoint_in__siamese").newest
    damaged = folder / "damaged"
    damaged.write_bytes(whole[:-1])

    def remove() -> None:
        if newest.is_dir() and not newest.is_symlink():
            newest.rmdir()
        else:
            newest.unlink(missing_ok=True)

    ways: dict[str, Callable[[], object]] = {
        "an empty file": lambda: newest.write_bytes(b""),
        "a folder": newest.mkdir,
        "a link to itself": lambda: newest.symlink_to(newest.name),
        "a link to nothing": lambda: newest.symlink_to("nothing"),
        "a link to a damaged file": lambda: newest.symlink_to(damaged),
        "a pipe": lambda: os.mkfifo(newest),
        "a device": lambda: newest.symlink_to("/dev/zero"),
        "a text": lambda: newest.write_text("{}"),
    }
    for name, put in ways.items():
        remove()
        put()
        judge(run, name, tally, name)
    remove()
    newest.write_bytes(whole)
    rewritten(newest, lambda fields: fields.update(version=fields["version"] + 1))
    _expect(tally, "a newer version", run, "version")
    newest.write_bytes(other.read_bytes())
    _expect(tally, "another graph", run, "another model", model=True)
    newest.write_bytes(run.older.read_bytes())
    resumed(run, tally, "the older checkpoint under the newer name")
    tally.note("an older one under its name", "goes on from there")
    newest.write_bytes(whole)
    _other_process(tally)
    return tally


def _expect(tally: Tally, kind: str, run: Run, words: str, *, model: bool = False) -> None:
    graph = kx.transform(GRAPHS / "torchjoint_in__nplm.onnx", rest="adam") if model else None
    for place in (run.newest, run.folder):
        try:
            TrainingSession.resume(place, model=graph, threads=1).close()
        except UserError as e:
            tally.note(kind, "refused")
            if words not in e.message:
                tally.problems.append(f"{kind}: the error says something else: {e}")
        else:
            tally.problems.append(f"{kind}: '{place}' was taken")


def _other_process(tally: Tally) -> None:
    """Save where nothing can be written, in a process that may be limited and lose its rights."""
    with tempfile.TemporaryDirectory(prefix="kfac-corrupt-") as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run(  # noqa: S603  our own program
            [sys.executable, __file__, "--place", folder], capture_output=True, text=True, check=False
        )
    for line in done.stdout.splitlines():
        kind, verdict = line.split(": ", 1)
        tally.note(kind, verdict)
        if not verdict.startswith("refused: "):
            tally.problems.append(line)
    if done.returncode != 0:
        tally.problems.append(done.stderr)


def limited(folder: Path) -> int:
    """Be that process: try to save or read, and compare the folder before and after."""
    session, batches = session_of("torchjoint_in__nplm", rest="adam")
    session.step(batches[0])
    for name in ("a full disk", "a read-only folder", "an unreadable file"):
        saved = folder / name
        session.save(saved)
        (file,) = (
            path for path in saved.iterdir() if not path.name.startswith(".")
        )  # the lock lies beside it
        before, states = {file.name: file.read_bytes()}, bits(session)
        verdict = "it was taken"
        session.step(batches[1])  # the run goes on, whatever became of the save before
        file.chmod(0o000 if name == "an unreadable file" else 0o644)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        rights = os.geteuid()
        if name == "a full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[file.name]) // 2, limits[1]))
        else:
            saved.chmod(0o555)
            if rights == 0:
                os.seteuid(NOBODY)
        try:
            if name == "an unreadable file":
                TrainingSession.resume(saved, threads=1)
            else:
                session.save(saved)
        except UserError as e:
            verdict = f"refused: {e.message.replace(str(folder), 'DIR')}"
        finally:
            os.seteuid(rights)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saved.chmod(0o755)
        file.chmod(0o644)
        if {item.name: item.read_bytes() for item in saved.iterdir() if item.name[0] != "."} != before:
            verdict = "the folder changed"
        with TrainingSession.resume(saved, threads=1) as again:
            if bits(again) != states:
                verdict = "the checkpoint before does not resume"
        sys.stdout.write(f"{name}: {verdict}\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="kfac-corrupt-"))
    try:
        found = [
            harness(options.cases, seed=options.seed, folder=folder / "bytes"),
            places(folder / "places"),
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out = sys.stdout.write
    out("| damage | cases | verdicts |\n|---|---|---|\n")
    for tally in found:
        for kind, verdicts in tally.verdicts.items():
            listed = "; ".join(f"{verdict}: {count}" for verdict, count in verdicts.most_common())
            out(f"| {kind} | {verdicts.total()} | {listed} |\n")
    problems = [problem for tally in found for problem in tally.problems]
    out(f"{options.cases} damaged files, {len(problems)} problems, {time.perf_counter() - start:.0f} s\n")
    for problem in problems:
        out(f"PROBLEM {problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--place"]:
        sys.exit(limited(Path(sys.argv[2])))
    sys.exit(main())
