"""The runtime could ship without the compiler: a session on a written model loads no reader and no pass."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kfac_onnx as kx

if TYPE_CHECKING:
    from collections.abc import Callable

ROOMS = tomllib.loads((Path(__file__).parents[2] / "docs" / "rooms.toml").read_text(encoding="utf-8"))["room"]
NEEDED = {
    "errors", "version", "options", "markup", "disk", "dialect", "data", "device", "metadata", "graph", "step", "runtime",
}  # fmt: skip
"""The rooms that a run needs; every other one is the compiler's, the oracle, or a tool."""

PROGRAM = """
import json, sys
import numpy as np
from kfac_onnx import TrainingSession
model, batches, folder = sys.argv[1:]
arrays = dict(np.load(batches))
with TrainingSession(model, threads=1) as session:
    losses = [session.step(arrays)["loss"] for _ in range(3)]
    session.health(), session.describe(), session.evaluate([arrays])
    session.save(folder)
with TrainingSession.resume(folder, threads=1) as session:
    losses.append(session.step(arrays)["loss"])
    session.export(folder + "/forward.onnx")
json.dump([losses, sorted(name for name in sys.modules if name.startswith("kfac_onnx."))], sys.stdout)
"""


def test_a_session_loads_nothing_of_the_compiler(graph_case: Callable[..., Any], tmp_path: Path) -> None:
    case = graph_case("ortart_legcore__twotower")
    kx.save(kx.transform(case.path, parameters=case.values), tmp_path / "model.onnx")
    np.savez(tmp_path / "batch.npz", **case.batches[0])
    arguments = (tmp_path / "model.onnx", tmp_path / "batch.npz", tmp_path / "saved")
    done = subprocess.run(  # noqa: S603  our own program
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    losses, modules = json.loads(done.stdout)
    assert losses[0] == pytest.approx(case.loss, rel=1e-5)  # float32
    assert losses[3] < losses[0]
    assert {name.split(".")[1] for name in modules} <= NEEDED
    assert {room["name"] for room in ROOMS} >= NEEDED
