"""The examples run, with a few steps."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"recommender": ("pyarrow",), "language_model": ("torch", "transformers"), "from_artifacts": ()}
LEAVES = {
    "recommender": {"run.html", "inspect.html", "rows.jsonl", "trained.onnx"},
    "language_model": {"trained.safetensors"},
    "from_artifacts": {"trained.safetensors"},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example '{name}' needs {package}")
    command = [sys.executable, EXAMPLES / f"{name}.py", "--steps", "20", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own script
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= LEAVES[name]
    if (
        losses := re.search(r"loss ([\d.]+) at the first step, ([\d.]+) at the last", done.stdout)
    ) is not None:
        assert float(losses[2]) < float(losses[1])
    else:
        assert "20 steps" in done.stdout


def test_the_list_of_examples_is_whole() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\| \[(\w+)\.py\]\(\1\.py\) \|", text)) == {
        path.stem for path in EXAMPLES.glob("*.py")
    }
