"""The site: its pages do what they say, one after the other as a reader would, and it can be built."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx.cli.main import VERBS, main
from kfac_onnx.dialect.operators import OPERATORS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    str(path.relative_to(DOCS))
    for path in (DOCS / "first-hour.md", *DOCS.glob("how-to/*.md"), *DOCS.glob("coming-from/*.md"))
    if path.exists()
)
REFERENCE = runpy.run_path(str(DOCS / "reference_pages.py"))
FORWARD = """<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch, 3] ids) => (float[batch, 5] logits) <int64[1] axis = {1}> {
    rows = Gather (emb.weight, ids)
    mean = ReduceMean <keepdims = 0> (rows, axis)
    hidden = Gemm (mean, fc1.weight, fc1.bias)
    active = Tanh (hidden)
    logits = Gemm (active, fc2.weight, fc2.bias)
}"""
SHAPES = {
    "emb.weight": (50, 8),
    "fc1.weight": (8, 8),
    "fc1.bias": (8,),
    "fc2.weight": (8, 5),
    "fc2.bias": (5,),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the pages begin with: a forward model, its training graph and data."""
    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(re.sub(r"\b(emb|fc1|fc2)\.", r"\1_", FORWARD))
    for name, shape in SHAPES.items():
        tensor = rng.normal(0, 0.3, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(tensor, name))
    for node in model.graph.node:
        node.input[:] = [re.sub(r"^(emb|fc1|fc2)_", r"\1.", name) for name in node.input]
    onnx.save(model, folder / "forward.onnx")
    kx.save(kx.differentiate(folder / "forward.onnx", logits="logits"), folder / "train.onnx")
    np.savez(folder / "train.npz", ids=rng.integers(0, 50, (64, 3)), labels=rng.integers(0, 5, 64))
    return folder


def blocks(page: str) -> list[tuple[str, str]]:
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(
    page: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in re.findall(r"<!-- needs: ([\w.]+) -->", (DOCS / page).read_text(encoding="utf-8")):
        try:
            missing = importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            pytest.skip(f"'{name}' is not installed")
    folder = shutil.copytree(files, tmp_path / "reader")
    monkeypatch.chdir(folder)
    with np.load("train.npz") as data:
        batches = [{name: data[name][:16] for name in data.files}] * 3
    namespace: dict[str, Any] = {"batches": batches, "__name__": "page"}
    for kind, code in blocks(page):
        if kind == "python":
            exec(compile(code, page, "exec"), namespace)  # noqa: S102  our own document
        elif kind == "sh":
            for line in code.splitlines():
                program, *arguments = shlex.split(line, comments=True) or [""]
                if program == "kfac-onnx":
                    assert main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
                else:
                    assert not program, (
                        f"{page} runs {program}; what a test cannot run stands in a block of kind 'console'"
                    )


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_of_a_page_exists(page: str) -> None:
    commands = re.findall(r"kfac-onnx (\w[\w-]*)", "".join(code for _, code in blocks(page)))
    assert set(commands) <= set(VERBS)


def test_the_reference_names_everything() -> None:
    pages = {name: page() for name, page in REFERENCE["PAGES"].items()}
    assert all(f"\n## {verb}\n" in pages["reference/commands.md"] for verb in VERBS)
    assert all(f"\n## {name}\n" in pages["reference/dialect.md"] for name in OPERATORS)
    assert all(f"\n## {name}\n" in pages["reference/python.md"] for name in kx.__all__ if name[0] != "_")
    assert "`kfac.sites`" in pages["reference/metadata.md"]
    folders = [path.parent.name for path in (ROOT / "benchmarks").glob("*/README.md")]
    assert all(f"`benchmarks/{folder}`" in pages["reference/benchmarks.md"] for folder in folders)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)  # noqa: S603  MkDocs
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "embedding tables" in home
    assert not re.findall(r'(?:src|href)="https?://(?:fonts|unpkg|cdn)', home), "a page asks other hosts"
