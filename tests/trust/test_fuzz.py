"""The fuzz harness: a seeded few hundred damaged files end in success or in a sentence, and it notices if not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _fuzz(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  our own script
        [sys.executable, str(HERE / "fuzz.py"), "--failures", str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("first", "count"), [(0, 110), (110, 110)])
def test_no_damaged_file_gets_through(tmp_path: Path, first: int, count: int) -> None:
    outcome = _fuzz(tmp_path, "--first", str(first), "--cases", str(count), "--seed", "11")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    total = next(line.split() for line in outcome.stdout.splitlines() if line.startswith("all "))
    accepted, refused, failed, cases = map(int, total[1:])
    assert (failed, cases) == (0, count)
    assert accepted > count // 10
    assert refused > count // 3


def test_cases_depend_on_seed_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    from cases import make_case

    first, again, other = make_case(5, 17), make_case(5, 17), make_case(6, 17)
    assert (first.files, first.commands, first.what) == (again.files, again.commands, again.what)
    assert first.files != other.files


BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import os, signal, time
import fuzz
import cases
from kfac_onnx.cli import main

def fail(words):
    match {kind!r}:
        case "bug":
            raise KeyError("a rule that expects too much")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(60)
        case "memory":
            bytearray(1 << 40)
        case "escape":
            print("\\x1b[2J")
        case "leftover":
            from kfac_onnx.errors import UserError
            open("left.tmp", "w").close()
            raise UserError("no")

fuzz.SECONDS = 1.0
main.cli.main = lambda arguments, **settings: fail(arguments)
fuzz.work(1)
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bug", "exit code 3"),
        ("crash", "signal 11"),
        ("hang", "no end after 1 s"),
        ("memory", "memory: it ran out"),
        ("escape", "raw control character '\\x1b'"),
        ("leftover", "left files behind"),
    ],
)
def test_the_harness_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import fuzz

    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(folder=str(HERE), kind=kind))
    monkeypatch.setattr(fuzz, "__file__", str(script))
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "STARTING", 2.0 if kind == "hang" else 60.0)
    tally = fuzz.fuzz(range(1), 1, 1)
    assert [failure["case"] for failure in tally.failures] == [0]
    assert said in tally.failures[0]["problem"]
    assert tally.table().splitlines()[-1].split() == ["all", "0", "0", "1", "1"]
