"""`mpiexec -n P kfac-onnx train` makes the steps of `kfac-onnx train` with the same batch size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import kfac_onnx as kx
from kfac_onnx.bench.graphs import factorisation
from kfac_onnx.cli.main import main

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install -e '.[mpi]'")

V, N = 40, 64
SHAPES = {"user": (V, 4), "item": (V, 4), "bias": ()}
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def run(size: int, *words: object) -> subprocess.CompletedProcess[str]:
    # With more ranks than cores, a rank that waits gives its core away.
    environment = {**os.environ, "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "PYTHONPATH": str(Path.cwd())}
    command = [str(MPIEXEC), "-n", str(size), sys.executable, *map(str, words)]
    return subprocess.run(  # noqa: S603  our own command
        command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    draw = np.random.default_rng(0)
    kx.save(kx.transform(factorisation(SHAPES), lr=0.02, rest="adam", rest_lr=1e-3), place / "m.onnx")
    values = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in SHAPES.items()}
    np.savez(place / "start.npz", **values)
    users, items = draw.integers(0, V, N), draw.integers(0, V, N)
    np.savez(place / "data.npz", users=users, items=items, ratings=draw.normal(0, 1, N).astype(np.float32))
    users[-1] = V
    np.savez(place / "bad.npz", users=users, items=items, ratings=np.zeros(N, np.float32))
    return place


def words(folder: Path, data: str = "data.npz") -> list[object]:
    return [
        "train", folder / "m.onnx", "--data", folder / data, "--parameters", folder / "start.npz",
        "--batch-size", 16, "--steps", 8, "--threads", 1,
    ]  # fmt: skip


def test_two_processes_train_as_one_does(folder: Path) -> None:
    def options(size: int) -> list[object]:
        return ["--export", folder / f"w{size}.safetensors", "--metrics", folder / f"{size}.jsonl", "--json"]

    assert main([str(word) for word in [*words(folder), *options(1)]]) == 0
    outcome = run(2, "-m", "kfac_onnx", *words(folder), *options(2))
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["steps"] == 8  # of rank 0 alone: two would be no JSON
    made = [
        [json.loads(line)["loss"] for line in (folder / f"{size}.jsonl").read_text("utf-8").splitlines()]
        for size in (1, 2)
    ]
    # 16 float32 examples summed in two groups.
    np.testing.assert_allclose(made[1], made[0], rtol=3e-7)
    one, two = load_file(folder / "w1.safetensors"), load_file(folder / "w2.safetensors")
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_bad_data_on_one_rank_ends_all_with_one_sentence(folder: Path) -> None:
    outcome = run(2, "-m", "kfac_onnx", *words(folder, "bad.npz"), "--no-shuffle")
    assert outcome.returncode == 1
    assert (
        "error: rank 1 of 2: id 40 in input 'users' is not a row of parameter 'user', which has 40 rows\n"
        "  help: ids from -40 to 39 are allowed; nothing was written"
    ) in outcome.stderr
    assert outcome.stderr.count("error:") == 1


def test_an_exception_on_one_rank_ends_all(folder: Path) -> None:
    script = folder / "one_fails.py"
    script.write_text(
        "import kfac_onnx as kx\n"
        f"with kx.RankSession({str(folder / 'm.onnx')!r}, parameters={str(folder / 'start.npz')!r}) as session:\n"
        "    if session.rank == 1:\n"
        "        raise ValueError('no data here')\n"
        "    session.gathered('user')\n",
        encoding="utf-8",
    )
    outcome = run(2, script)
    assert outcome.returncode == 3
    assert "rank 1 of 2 on " in outcome.stderr
    assert "ended all ranks: no data here" in outcome.stderr
