"""`train --checkpoint` and `--resume`: the same command goes on, with the same data, to the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from kfac_onnx.api import save, transform
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET
from kfac_onnx.runtime.saved import checkpoint
from kfac_onnx.runtime.saved.checkpoint_folder import numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.cli.conftest import Outcome

    Run = Callable[..., Outcome]

DATA = Path(__file__).parents[1] / "data" / "graphs"
GRAPH = DATA / "torchjoint_in__nplm.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, first weights, and a transformed graph."""
    with np.load(DATA / "torchjoint_in__nplm.npz") as file:
        weights = {name[3:]: file[name] for name in file.files if name.startswith("in:m.")}
    np.savez(tmp_path / "weights.npz", **weights)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, (70, 4))
    np.savez(tmp_path / "data.npz", ids=ids, labels=rng.integers(0, 50, 70))
    save(transform(GRAPH, lr=0.05), tmp_path / "step.onnx")
    return tmp_path


def words(folder: Path, *more: object, model: Path | None = None) -> Sequence[object]:
    return (
        "train", model or folder / "step.onnx", "--data", folder / "data.npz", "--threads", 1, "--json", *more,
    )  # fmt: skip


def begun(folder: Path, *more: object, model: Path | None = None) -> Sequence[object]:
    """A command that begins a run: batches of 16, so that an epoch is four full ones and one of 6."""
    first = ("--parameters", folder / "weights.npz", "--batch-size", 16, "--seed", 4)
    return words(folder, *first, *more, model=model)


def states(place: Path) -> dict[str, bytes]:
    found = checkpoint.read_checkpoint(numbered(place)[0][1])
    return {name: np.asarray(array).tobytes() for name, array in found.states.items()}


@pytest.mark.parametrize("graph", ["transformed", "training graph"])
def test_a_resumed_command_ends_bit_equal(run: Run, folder: Path, graph: str) -> None:
    """Batch size, seed and schedule are not repeated: they come with the checkpoint."""
    model = GRAPH if graph == "training graph" else folder / "step.onnx"
    plan = ("--schedule", "cosine:steps=50,warmup=3")
    assert run(*begun(folder, *plan, "--steps", 50, "--checkpoint", folder / "a", model=model)).code == 0
    first = run(*begun(folder, *plan, "--steps", 23, "--checkpoint", folder / "b", model=model))
    assert first.code == 0, first.err
    rest = run(*words(folder, "--steps", 50, "--resume", folder / "b", "--json", model=model))
    assert (rest.code, rest.err) == (0, "")
    assert (rest.data["steps"], rest.data["position"]) == (27, 50)
    assert states(folder / "a") == states(folder / "b")
    names = sorted(path.name for path in (folder / "b").iterdir())
    assert names == ["step-0000000023.ckpt", "step-0000000050.ckpt"]  # where it went on is where it saves


def test_epochs_are_those_of_the_whole_run(run: Run, folder: Path) -> None:
    keep = ("--checkpoint", folder / "run")
    assert run(*begun(folder, "--steps", 7, *keep)).code == 0
    rest = run(*words(folder, "--epochs", 3, "--resume", *keep)).data
    assert (rest["steps"], rest["position"]) == (8, 15)
    outcome = run(*words(folder, "--epochs", 3, "--resume", *keep, "--held-out", folder / "data.npz"))
    assert (outcome.code, outcome.data["steps"], outcome.data["loss"]) == (0, 0, None)
    assert list(outcome.data["held_out"]) == ["15"]


def test_every_keep_and_one_file(run: Run, folder: Path) -> None:
    given = ("--steps", 9, "--checkpoint-every", 2)
    assert run(*begun(folder, *given, "--checkpoint", folder / "run", "--keep", 2)).code == 0
    names = sorted(path.name for path in (folder / "run").iterdir())
    assert names == ["step-0000000008.ckpt", "step-0000000009.ckpt"]
    assert run(*begun(folder, *given, "--checkpoint", folder / "one" / "run.ckpt")).code == 0
    assert [path.name for path in (folder / "one").iterdir()] == ["run.ckpt"]
    rest = run(*words(folder, "--steps", 10, "--resume", folder / "one" / "run.ckpt"))
    assert rest.data["position"] == 10


def test_other_data_than_before_is_said(run: Run, folder: Path) -> None:
    run(*begun(folder, "--steps", 3, "--checkpoint", folder / "run"))
    outcome = run(*words(folder, "--steps", 4, "--resume", folder / "run", "--batch-size", 8, "--seed", 9))
    assert outcome.code == 0
    assert outcome.err == (
        "warning: the data are not those of the run so far: batches 5 is now 9, batch_size 16 is now 8,"
        " seed 4 is now 9; it goes on with other batches\n"
    )


@pytest.mark.parametrize("kind", ["a file", "a folder", "a file a batch"])
def test_other_examples_of_the_same_shapes_are_said(run: Run, folder: Path, kind: str) -> None:
    with np.load(folder / "data.npz") as file:
        arrays = dict(file)
    place, size = folder / "data.npz", ("--batch-size", 16)
    if kind != "a file":
        place = folder / "shards"
        place.mkdir()
        for number in range(2):
            np.savez(
                place / f"{number}.npz", **{k: a[number * 35 : number * 35 + 35] for k, a in arrays.items()}
            )
        size = size if kind == "a folder" else ()
    graph = GRAPH if kind == "a file a batch" else folder / "step.onnx"
    first = ("train", graph, "--data", place, "--threads", 1, "--json", *size)
    assert (
        run(*first, "--parameters", folder / "weights.npz", "--steps", 1, "--checkpoint", folder / "run").code
        == 0
    )
    again = run(*first, "--steps", 2, "--resume", folder / "run")
    assert (again.code, again.err) == (0, "")
    file = place if place.is_file() else place / "1.npz"
    with np.load(file) as stored:
        other = dict(stored)
    other["labels"][-1] ^= 1
    np.savez(file, **other)
    changed = run(*first, "--steps", 3, "--resume", folder / "run")
    assert changed.code == 0
    assert changed.err == (
        "warning: the data are not those of the run so far: they hold other examples; it goes on with other"
        " batches\n"
    )


SETTINGS = (
    "--preset", "adagrad", "--damping", 0.02, "--lr", 0.03, "--rest", "adamw", "--rest-lr", 0.002, "--weight-decay", 0.1,
    "--schedule", "cosine:warmup=1", "--clip-norm", 5,
)  # fmt: skip


def test_the_same_options_are_quiet_and_changed_ones_said(run: Run, folder: Path) -> None:
    first = begun(folder, "--steps", 2, "--checkpoint", folder / "run", *SETTINGS, model=GRAPH)
    assert run(*first).code == 0
    again = run(*first[: first.index("--steps")], "--steps", 3, "--resume", folder / "run", *SETTINGS)
    assert (again.code, again.err) == (0, "")
    other = (
        "--preset", "half", "--damping", 0.01, "--lr", 0.01, "--rest", "adam", "--rest-lr", 0.002, "--schedule", "linear",
        "--clip-norm", 4,
    )  # fmt: skip
    changed = run(*words(folder, "--steps", 4, "--resume", folder / "run", *other, model=GRAPH))
    assert changed.code == 0
    assert changed.err == (
        "warning: the run goes on as it was begun, without --preset half (it is adagrad), --lr 0.01 (it is 0.03),"
        " --rest adam (it is adamw), --schedule linear (it is cosine:warmup=1), --damping 0.01 (it is 0.02),"
        " --clip-norm 4.0 (it is another)\n"
    )


def test_a_default_that_is_given_is_no_change(run: Run, folder: Path) -> None:
    run(*begun(folder, "--steps", 2, "--checkpoint", folder / "run", model=GRAPH))
    same = (
        "--preset",
        DEFAULT_PRESET,
        "--damping",
        0.01,
        "--lr",
        0.01,
        "--rest",
        "adam",
        "--schedule",
        "constant",
    )
    again = run(*words(folder, "--steps", 3, "--resume", folder / "run", *same, model=GRAPH))
    assert (again.code, again.err) == (0, "")


def test_a_damaged_newest_is_passed_over_with_a_warning(run: Run, folder: Path) -> None:
    run(*begun(folder, "--steps", 6, "--checkpoint-every", 3, "--checkpoint", folder / "run"))
    newest = folder / "run" / "step-0000000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-9])
    outcome = run(*words(folder, "--steps", 6, "--resume", folder / "run"))
    assert (outcome.code, outcome.data["steps"]) == (0, 3)
    assert outcome.err.startswith("warning: checkpoint 'DIR/run/step-0000000006.ckpt' is damaged: ")
    assert outcome.err.endswith("; 'step-0000000003.ckpt' is taken instead\n")


def changed_graph(folder: Path) -> Path:
    """The training graph with another activation."""
    model = onnx.load(GRAPH)
    node = next(node for node in model.graph.node if node.op_type == "Gather")
    node.doc_string = "another"
    model.graph.name += "2"
    onnx.save(model, folder / "other.onnx")
    return folder / "other.onnx"


def test_another_graph_is_refused(run: Run, folder: Path) -> None:
    run(*begun(folder, "--steps", 2, "--checkpoint", folder / "a"))
    run(*begun(folder, "--steps", 2, "--checkpoint", folder / "b", model=GRAPH))
    save(transform(GRAPH, preset="adagrad"), folder / "adagrad.onnx")
    remedy = "  help: resume with the model that it was made with, or start without --resume\n"
    other = changed_graph(folder)
    for place, model, message in (
        ("a", folder / "adagrad.onnx", "the checkpoint was made with another model"),
        ("b", folder / "adagrad.onnx", "the checkpoint was made with another model"),
        ("b", other, "the checkpoint was made with another model than 'DIR/other.onnx'"),
        ("a", GRAPH, f"the checkpoint was made with another model than '{GRAPH}'"),
    ):
        outcome = run(*words(folder, "--steps", 4, "--resume", folder / place, model=model))
        assert (outcome.code, outcome.err) == (1, f"error: {message}\n{remedy}"), (place, model)


def test_other_first_values_make_no_other_graph(run: Run, folder: Path) -> None:
    model = onnx.load(DATA / "ortart_dyncore__nplm.onnx")
    from kfac_onnx.runtime.saved.saved_run import source_hash

    onnx.save(model, folder / "a.onnx")
    large = [item for item in model.graph.initializer if np.prod(item.dims) >= 32]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((8, 8), np.float32), "w"))
    onnx.save(model, folder / "b.onnx")
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "w"))
    onnx.save(model, folder / "c.onnx")
    small = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    model.graph.initializer[-1].CopyFrom(small)
    onnx.save(model, folder / "d.onnx")
    hashes = [source_hash(folder / f"{name}.onnx") for name in "abcd"]
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3
    assert large == [] or source_hash("-") is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--checkpoint-every", 2), "--checkpoint-every is given, but no --checkpoint to save to"),
        (("--keep", 2), "--keep is given, but no --checkpoint to save to"),
        (("--checkpoint", "run", "--keep", 0), "keep must be at least 1, got 0"),
        (("--checkpoint", "run.ckpt", "--keep", 2), "keep is for a folder of checkpoints, and 'DIR/run.ckpt' is a file"),
        (("--resume", "run", "--steps", 0), "steps must be at least 1, got 0"),
        (("--resume", "none"), "there is no checkpoint 'DIR/none'"),
        (("--resume", "run", "--checkpoint", "data.npz"),
         "nothing can be written into the folder 'DIR/data.npz': 'DIR/data.npz' is not a folder"),
        (("--checkpoint", "run"),
         "the folder 'DIR/run' holds checkpoints of another run\n"
         "  help: go on from them (resume, `train --resume`), or give another folder"),
    ],
)  # fmt: skip
def test_what_is_refused(run: Run, folder: Path, more: tuple[object, ...], message: str) -> None:
    run(*begun(folder, "--steps", 2, "--checkpoint", folder / "run"))
    before = states(folder / "run")
    given = [folder / item if isinstance(item, str) and item[0] != "-" else item for item in more]
    command = words(folder, *given) if "--resume" in more else begun(folder, *given)
    outcome = run(*command)
    assert (outcome.code, outcome.err) == (1, f"error: {message}\n")
    assert states(folder / "run") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(run: Run, folder: Path) -> None:
    run(*begun(folder, "--steps", 2, "--checkpoint", folder / "run"))
    (folder / "run").chmod(0o500)
    outcome = run(*words(folder, "--steps", 3, "--resume", folder / "run"))
    (folder / "run").chmod(0o700)
    assert outcome.code == 1
    assert outcome.err.startswith("error: nothing can be written into the folder 'DIR/run'")


LIMITED = """
import resource, signal, sys
from kfac_onnx.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_takes_no_more_stops_the_run(run: Run, folder: Path) -> None:
    """The system refuses files above 4 KiB, as a full disk would."""
    run(*begun(folder, "--steps", 2, "--checkpoint", folder / "run"))
    command = [
        str(word) for word in words(folder, "--steps", 9, "--checkpoint-every", 2, "--resume", folder / "run")
    ]
    done = subprocess.run(  # noqa: S603  our own interpreter
        [sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, check=False
    )
    file = folder / "run" / "step-0000000004.ckpt"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: '{file}' cannot be written: File too large\n"
    assert [path.name for path in (folder / "run").iterdir()] == ["step-0000000002.ckpt"]
    rest = run(*words(folder, "--steps", 9, "--resume", folder / "run"))
    assert rest.data["position"] == 9


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_and_the_same_command_with_resume(run: Run, folder: Path, number: int, code: int) -> None:
    """The run is endless until the signal; then it goes on to where a whole run ends."""
    log = folder / "log.jsonl"
    command = begun(folder, "--steps", 10**9, "--checkpoint", folder / "run", "--metrics", log)
    program = "import sys; from kfac_onnx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    running = subprocess.Popen(  # noqa: S603  our own interpreter
        [sys.executable, "-c", program, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end and running.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size:
                break
        time.sleep(0.01)
    running.send_signal(number)
    try:
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, out) == (code, "")
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    at = rows[-1]["position"]
    assert [row["position"] for row in rows] == list(range(1, at + 1))
    place = folder / "run"
    name = signal.Signals(number).name
    assert err == f"stopped by {name} after batch {at}; saved in '{place}'; `--resume {place}` goes on\n"
    assert run(*words(folder, "--steps", at + 3, "--resume", place)).code == 0
    assert run(*begun(folder, "--steps", at + 3, "--checkpoint", folder / "whole")).code == 0
    assert states(place) == states(folder / "whole")
