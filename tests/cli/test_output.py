"""Output that cannot be shown or written: near signs, and one sentence instead of a bug report."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_onnx.cli.main import VERBS, main
from kfac_onnx.markup import quantity

GRAPH = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm.onnx"
PROGRAM = "import sys; from kfac_onnx.cli.main import main; sys.exit(main(sys.argv[1:]))"


def command(*words: object, redirections: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a verb in a process of its own; `redirections` as a shell writes them."""
    script = f'exec "$@" {redirections}'
    return subprocess.run(  # noqa: S603  our own program
        ["/bin/sh", "-c", script, "sh", sys.executable, "-c", PROGRAM, *map(str, words)],
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import kfac_onnx as kx

    path = tmp_path_factory.mktemp("step") / "k.onnx"
    kx.save(kx.transform(GRAPH, lr=0.01), path)
    return path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_every_terminal_can_be_written_to(step: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams are as Python opens them for a terminal of this encoding: strict on stdout, escapes on stderr."""
    for words in (("inspect", step), ("inspect", step, "--json"), ("check", GRAPH), ("scan", GRAPH)):
        out, err = io.BytesIO(), io.BytesIO()
        streams = io.TextIOWrapper(out, encoding), io.TextIOWrapper(err, encoding, "backslashreplace")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            status = main([*map(str, words)])
        for stream in streams:
            stream.flush()
        check_text(words, encoding, status, out.getvalue(), err.getvalue())


def test_a_terminal_of_ascii_in_a_process_of_its_own(step: Path) -> None:
    done = command("inspect", step, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    check_text(("inspect", step), "ascii", done.returncode, done.stdout, done.stderr)


def check_text(words: tuple[object, ...], encoding: str, status: int, out: bytes, err: bytes) -> None:
    """Assert that a verb ended well and wrote what a terminal of the encoding can show."""
    assert (status, b"Traceback" in err) == (0, False), err
    text = out.decode(encoding)
    if "--json" in words:
        assert json.loads(text)["sites"]
    elif words[0] == "inspect":
        assert "m.emb.weight: 100 x 16 float32" in text
        assert encoding == "utf-8" or "\\u" not in text, "our own signs have near ones"


@pytest.mark.parametrize(
    "words", [("scan", GRAPH), ("scan", "--json", GRAPH), ("--help",), ("transform", "--help")]
)
def test_a_full_disk_behind_stdout(words: tuple[object, ...]) -> None:
    done = command(*words, redirections="> /dev/full")
    assert (
        done.stderr.decode()
        == "error: the result cannot be written to standard output: No space left on device\n"
    )
    assert done.returncode == 1


def test_stdout_that_is_closed(tmp_path: Path) -> None:
    done = command("transform", GRAPH, "-o", tmp_path / "out.onnx", redirections=">&-")
    assert done.stderr.decode() == (
        "error: standard output is closed, so that no result can be written\n"
        "  help: `>/dev/null` takes what nobody wants to see\n"
    )
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_stderr_that_is_closed() -> None:
    assert command("scan", GRAPH, redirections="2>&-").returncode == 0


def test_a_reader_that_has_seen_enough() -> None:
    done = subprocess.run(  # noqa: S603  our own program
        [
            "/bin/bash",
            "-c",
            '"$@" | true; exit ${PIPESTATUS[0]}',
            "sh",
            sys.executable,
            "-c",
            PROGRAM,
            "scan",
            str(GRAPH),
        ],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("number", "text"),
    [(1.25e6, "1.25 MB"), (3.2e9, "3.20 GB"), (999.0, "999 B"), (-2e3, "-2.00 kB"), (0.0, "0 B")],
)
def test_quantities(number: float, text: str) -> None:
    assert quantity(number, "B") == text


def test_help_names_every_verb() -> None:
    text = command("--help").stdout.decode()
    assert all(f"  {verb} " in text for verb in VERBS)
