"""The same run again is the same, bit for bit: in this process and in others, with one thread and with four.

Same machine, same versions, same number of threads. (Another number of threads may add in another order.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_cases import marked
from preset_names import ALL

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession

STEPS = 22  # roots are refreshed at steps 1, 2, 4, 8, 10 and 20
SETTINGS: dict[str, dict[str, Any]] = {
    **{
        name: {"preset": name, "rest": rest}
        for name, rest in zip(ALL, itertools.cycle(("adam", "momentum", "adagrad")), strict=False)
    },
    "half, renormalized": {"preset": "half", "decay_a": 0.5},
    "plain-sgd": {"preset": "plain-sgd"},
    "plain-adam": {"preset": "plain-adam"},
    "plain-adagrad": {"preset": "plain-adagrad"},
}
TWOTOWER, DROPOUT, TIED = (
    "ortart_legcore__twotower",
    "ortart_dyncore__nplm_dropout",
    "ortart_legloss__gpt_tied",
)


def grown(name: str, batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Batches large enough to be split over threads, with rows that repeat; one of them cannot be kept."""
    rng = np.random.default_rng(0)
    if name != TWOTOWER:
        return [batch] * STEPS
    made = []
    for number in range(STEPS):
        size = 1 if number == 5 else 4096
        target = rng.normal(size=size).astype(np.float32)
        target[0] = np.nan if number == 9 else target[0]
        user, item = (np.minimum(rng.zipf(1.3, size) - 1, top) for top in (119, 149))
        made.append({"user": user, "item": item, "target": target})
    return made


def run(name: str, setting: str, threads: int) -> dict[str, str]:
    """Train; return the hash of every state, of all losses, and of what was said of the skipped step."""
    case, graph = marked(name)
    weights = graph.initial(case)
    with TrainingSession(
        transform(case.path, **SETTINGS[setting]), parameters=weights, threads=threads, seed=7
    ) as session:
        feed = case.feed()
        batches = grown(name, {item.name: feed[item.name] for item in session.batch_inputs})
        made = [session.step(batch) for batch in batches]
        said = repr([(item["loss"], item["skipped"], [*map(str, item.get("skip", ()))]) for item in made])
        found = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in session.states.items()}
        assert session.skipped == (1 if name == TWOTOWER else 0)
    return found | {"steps": hashlib.sha256(said.encode()).hexdigest()}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_run_twice(setting: str, threads: int) -> None:
    assert run(TWOTOWER, setting, threads) == run(TWOTOWER, setting, threads)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", [DROPOUT, TIED])
def test_graphs_with_dropout_and_with_tied_weights(name: str, threads: int) -> None:
    assert run(name, "half", threads) == run(name, "half", threads)


def test_the_hashes_see_one_bit() -> None:
    once = run(TWOTOWER, "half", 1)
    SETTINGS["another"] = {"preset": "half", "lr": float(np.nextafter(np.float32(0.01), np.float32(1)))}
    try:
        other = run(TWOTOWER, "another", 1)
    finally:
        del SETTINGS["another"]
    assert once["user_emb.weight"] != other["user_emb.weight"]


def test_the_same_run_in_other_processes() -> None:
    """Twice in fresh processes, with other hash seeds, the presets with one thread and with four."""
    command = [sys.executable, str(Path(__file__).resolve())]
    results = []
    for hash_seed in ("1", "2"):
        environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "support"), "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(  # noqa: S603  our own interpreter
            command, capture_output=True, text=True, check=False, env={**_inherited(), **environment}
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    assert results[0]["half 1"] == run(TWOTOWER, "half", 1)
    assert results[0]["half 4"] == run(TWOTOWER, "half", 4)


def _inherited() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}


if __name__ == "__main__":
    import logging

    logging.getLogger("kfac_onnx").setLevel(logging.ERROR)
    everything = {
        f"{setting} {threads}": run(TWOTOWER, setting, threads) for setting in ALL for threads in (1, 4)
    }
    sys.stdout.write(json.dumps(everything))
