"""Every verb that writes: whole files or none, never over what it reads, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.api import save, transform
from kfac_onnx.bench import report
from kfac_onnx.cli import bench
from kfac_onnx.disk import atomic
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

    Run = Callable[..., Outcome]

DATA = Path(__file__).parents[1] / "data"
GRAPH = "torchjoint_in__nplm"

WRITING = {
    "transform": ("transform train.onnx -o out.onnx --lr 0.01 --parameters values.npz", "out.onnx"),
    "differentiate": (
        "differentiate forward.onnx --loss cross-entropy --logits pred -o out.onnx",
        "out.onnx",
    ),
    "opt": ("opt train.onnx -p dce -o out.onnx", "out.onnx"),
    "opt, text": ("opt train.onnx -p dce -o out.onnxtxt", "out.onnxtxt"),
    "train, export": (
        "train step.onnx --parameters values.npz --data data.npz --batch-size 6 --steps 1 --export out.onnx",
        "out.onnx",
    ),
    "train, into": (
        "train step.onnx --parameters values.npz --data data.npz --batch-size 6 --steps 1 --export out.onnx "
        "--into step_values.onnx",
        "out.onnx",
    ),
    "train, a checkpoint": (
        "train step.onnx --parameters values.npz --data data.npz --batch-size 6 --steps 1 --checkpoint out.ckpt",
        "out.ckpt",
    ),
    "train, a folder": (
        "train step.onnx --data data.npz --batch-size 6 --steps 2 --checkpoint saved --resume",
        "saved/step-0000000002.ckpt",
    ),
}
READING = (
    "scan train.onnx",
    "scan train.onnx --json",
    "check train.onnx",
    "inspect step.onnx",
    "why train.onnx m.emb.weight",
    "diff train.onnx step.onnx",
    "opt train.onnx -p dce",
    "verify train.onnx --data data.npz --parameters values.npz --batch-size 6",
    "train step.onnx --parameters values.npz --data data.npz --batch-size 6 --steps 1",
)


@dataclass(frozen=True)
class Sources:
    """Bytes of the files that the verbs read."""

    files: dict[str, bytes]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    from kfac_onnx.runtime import TrainingSession

    folder = tmp_path_factory.mktemp("sources")
    with np.load(DATA / "graphs" / f"{GRAPH}.npz") as arrays:
        given = {name[3:]: arrays[name] for name in arrays.files if name.startswith("in:")}
    batch = {name: given.pop(name) for name in ("ids", "labels")}
    np.savez(folder / "data.npz", **{name: np.concatenate([array, array]) for name, array in batch.items()})
    np.savez(folder / "values.npz", **given)
    graph = DATA / "graphs" / f"{GRAPH}.onnx"
    (folder / "train.onnx").write_bytes(graph.read_bytes())
    (folder / "forward.onnx").write_bytes((DATA / "graphs" / "fwd_dyncore__nplm.onnx").read_bytes())
    step = transform(graph, lr=0.01)
    save(step, folder / "step.onnx")
    save(transform(graph, lr=0.01, parameters=given), folder / "step_values.onnx")
    with TrainingSession(step, parameters=given, threads=1) as session:
        session.step(batch)
        session.save(folder / "saved")
    files = {str(item.relative_to(folder)): item.read_bytes() for item in folder.rglob("*") if item.is_file()}
    return Sources(files)


@pytest.fixture
def folder(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "saved").mkdir()
    for name, data in sources.files.items():
        (tmp_path / name).write_bytes(data)
    for name in ("out.onnx", "out.onnxtxt", "out.ckpt"):
        (tmp_path / name).write_bytes(b"what was there before")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return each file's bytes, and each folder, by its path."""
    return {
        str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None
        for item in folder.rglob("*")
    }


def fails(run: Run, folder: Path, words: str, code: int, *sentence: str) -> None:
    before = everything(folder)
    outcome = run(*words.split())
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for part in sentence:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert everything(folder) == before


every_writer = pytest.mark.parametrize(("words", "output"), WRITING.values(), ids=WRITING.keys())


@every_writer
def test_each_writes_whole_files(run: Run, folder: Path, words: str, output: str) -> None:
    before = everything(folder)
    outcome = run(*words.split())
    assert outcome.code == 0, outcome.err
    after = everything(folder)
    assert after.pop(output) != before.pop(output, None)
    assert after == before, "it writes nothing else, and leaves nothing behind"


@every_writer
def test_a_full_disk(run: Run, folder: Path, words: str, output: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        fails(run, folder, words, 1, f"error: '{output}' cannot be written: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@every_writer
@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "cannot be written: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["error", "Ctrl-C"],
)
@pytest.mark.parametrize("where", ["sync", "replace"])
def test_a_fault_at_the_last_moment(
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    output: str,
    where: str,
    error: BaseException,
    code: int,
    sentence: str,
) -> None:
    def fault(*_: object) -> None:
        raise error

    if where == "sync":
        monkeypatch.setattr(atomic, "sync", fault)
    else:
        monkeypatch.setattr(atomic.os, "replace", fault)
    fails(run, folder, words, code, sentence)


@every_writer
def test_a_folder_that_may_not_be_written(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, output: str
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", refused)
    fails(run, folder, words, 1, f"error: '{output}' cannot be written: Permission denied")


@pytest.mark.parametrize("verb", ["transform", "train, a folder"])
def test_a_killed_process_leaves_the_old_file(folder: Path, run: Run, verb: str) -> None:
    words, _ = WRITING[verb]
    before = everything(folder)
    program = (
        "import os, signal, sys; from kfac_onnx.disk import atomic; from kfac_onnx.cli.main import main; "
        "atomic.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL); main(sys.argv[1:])"
    )
    done = subprocess.run(  # noqa: S603  our own program
        [sys.executable, "-c", program, *words.split()], check=False, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = everything(folder)
    left = {name for name in after if ".tmp" in name or name.endswith("/.lock")}
    assert left, "it was killed within its write"
    assert {name: data for name, data in after.items() if name not in left} == before
    assert run(*words.split()).code == 0
    assert not left & everything(folder).keys(), "the next write removes what was left"


def links(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return names that all are this file."""
    (folder / "soft.onnx").symlink_to(source)
    (folder / "hard.onnx").hardlink_to(folder / source)
    (folder / "below").mkdir()
    return [source, "soft.onnx", "hard.onnx", f"below/../{source}", str(folder / source)]


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("transform train.onnx -o OUT --parameters values.npz", "train.onnx"),
        ("transform train.onnx -o OUT --parameters values.npz", "values.npz"),
        ("differentiate forward.onnx --loss cross-entropy --logits pred -o OUT", "forward.onnx"),
        ("opt train.onnx -p dce -o OUT", "train.onnx"),
        ("train step.onnx --parameters values.npz --data data.npz --export OUT", "step.onnx"),
        ("train step.onnx --parameters values.npz --data data.npz --export OUT", "data.npz"),
        ("train step.onnx --parameters values.npz --data data.npz --held-out train.onnx --export OUT", "train.onnx"),
        ("train step.onnx --parameters values.npz --data data.npz --metrics OUT", "data.npz"),
        ("train step.onnx --parameters values.npz --data data.npz --metrics OUT", "step.onnx"),
        ("train step.onnx --parameters values.npz --data data.npz --export new.onnx --into train.onnx --metrics OUT", "train.onnx"),
    ],
)  # fmt: skip
def test_nothing_is_written_over_its_input(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, source: str
) -> None:
    for name in links(folder, source, monkeypatch):
        fails(run, folder, words.replace("OUT", name), 1, "will not be overwritten")


def test_two_outputs_of_one_name(run: Run, folder: Path) -> None:
    words = "train step.onnx --parameters values.npz --data data.npz --export new --metrics ./new"
    fails(run, folder, words, 1, "error: 'new' is named for two outputs")


@pytest.mark.parametrize("words", READING)
def test_what_only_reads_writes_nothing(run: Run, folder: Path, words: str) -> None:
    before = everything(folder)
    assert run(*words.split()).code in (0, 2)
    assert everything(folder) == before


ROWS = "train step.onnx --parameters values.npz --data data.npz --batch-size 6 --metrics rows.jsonl --steps 2"


def test_metrics_are_whole_lines_on_a_full_disk(run: Run, folder: Path) -> None:
    assert run(*ROWS.split()).code == 0
    whole = (folder / "rows.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))  # in the middle of the next row
    try:
        outcome = run(*ROWS.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1
    assert "error: metrics cannot be written to 'rows.jsonl': " in outcome.err
    assert (folder / "rows.jsonl").read_bytes() == whole


def test_metrics_go_on_after_half_a_line(run: Run, folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(b'{"step": 1, "lo')
    assert run(*ROWS.split()).code == 0
    first, *others = (folder / "rows.jsonl").read_text().splitlines()
    assert first == '{"step": 1, "lo'
    assert [json.loads(line)["step"] for line in others] == [1, 2]


def test_pictures_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from kfac_onnx.demo.curves import Curve, draw_png

    place = tmp_path / "curves.png"
    place.write_bytes(b"before")

    def fault(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync", fault)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        draw_png([("adam", Curve((1, 2), (2.0, 1.0)))], place, title="t")
    assert everything(tmp_path) == {"curves.png": b"before"}


def test_results_of_the_bench_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_bytes(b"before")
    results: Any = SimpleNamespace(to_json=lambda: {"new": 1})
    monkeypatch.setattr(report, "markdown", lambda _: "new")

    def fault(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync", fault)
    with pytest.raises(UserError, match=r"results\.json' cannot be written: No space left on device"):
        bench._write(results, tmp_path)
    assert everything(tmp_path) == {"results.json": b"before"}


def test_the_bench_does_not_write_over_what_it_compares_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfac_onnx.bench import results

    (tmp_path / "results.json").write_bytes(b"before")
    monkeypatch.setattr(results, "read_results", lambda _: SimpleNamespace(settings=None))
    words = f"bench --compare {tmp_path / 'results.json'} -o {tmp_path}"
    fails(run, tmp_path, words, 1, "'DIR/results.json' is the input and will not be overwritten")
