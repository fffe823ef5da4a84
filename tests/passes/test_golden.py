"""Golden files: readable `.onnxtxt` models whose first line says what to run, and what must come out.

`# RUN: kfac-onnx opt %s -p dce` runs the command on the file, and its `# CHECK:` lines (the language of
LLVM's FileCheck) must match its output in order. To write one, copy a file of `golden/` and change it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import filecheck.main
import pytest

from kfac_onnx.cli.main import main

GOLDEN = Path(__file__).parent / "golden"


def check(path: Path, output: Path) -> int:
    with pytest.raises(SystemExit) as left:
        filecheck.main.main(["filecheck", str(path), "--input-file", str(output)])
    return int(left.value.code or 0)


def run(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# RUN: kfac-onnx "), f"{path.name} must begin with '# RUN: kfac-onnx ...'"
    words = shlex.split(first.removeprefix("# RUN: kfac-onnx "))
    code = main([str(path) if word == "%s" else word for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnxtxt")), ids=lambda path: path.stem)
def test_golden(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "output.txt"
    output.write_text(run(path, capsys))
    assert check(path, output) == 0, capsys.readouterr()


def test_a_golden_file_that_does_not_hold_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.onnxtxt"
    wrong.write_text((GOLDEN / "dce.onnxtxt").read_text().replace("%y = Mul(%x, %w)", "%y = Div(%x, %w)"))
    output = tmp_path / "output.txt"
    output.write_text(run(GOLDEN / "dce.onnxtxt", capsys))
    assert check(wrong, output) != 0
