"""A run that is saved, and resumed by a new session, is bit for bit the run that went on."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from preset_names import ALL

from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.data import Batches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Case = Any

STEPS = 50
PRESETS = [
    *ALL,
    "plain-sgd",
    "plain-momentum",
    "plain-adam",
    "plain-adagrad",
]
MEAN, SUM = "ortart_dyncore__nplm", "ortart_legloss__nplm_sum"
DROPOUT = "ortart_dyncore__nplm_dropout"


def bits(session: TrainingSession) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.states.items()}


def check(case: Case, folder: Path, saves: tuple[int, ...], *, threads: int, **options: Any) -> None:
    """Run 50 steps, saving on the way; go on from each checkpoint; compare every loss and all states."""
    options.setdefault("schedule", f"cosine:steps={STEPS},warmup=5")
    rows: list[object] = []
    with case.open(threads=threads, **options) as whole:
        for step in range(STEPS):
            if step in saves:
                whole.save(folder / f"{step}.ckpt")
            rows.append(whole.step(case.batches[step % 2]))
        want = bits(whole)
    for start in saves:
        with TrainingSession.resume(folder / f"{start}.ckpt", threads=threads, model=case.model) as resumed:
            assert resumed.position == start
            for step in range(start, STEPS):
                assert resumed.step(case.batches[step % 2]) == rows[step], step
            assert bits(resumed) == want


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(graph_case: Callable[..., Case], tmp_path: Path, preset: str, threads: int) -> None:
    check(graph_case(MEAN, preset=preset), tmp_path, (20,), threads=threads)


@pytest.mark.parametrize("preset", ["half", "adaptive", "r1.7"])
def test_before_at_and_after_a_refresh(graph_case: Callable[..., Case], tmp_path: Path, preset: str) -> None:
    """Every 8th step refreshes the roots: 23 steps are just before the refresh of step 24, 24 just after."""
    case = graph_case(MEAN, preset=preset, refresh_every=8)
    check(case, tmp_path, (0, 3, 22, 23, 24, 25), threads=1)


@pytest.mark.parametrize("name", [SUM, "ortart_dyncore__nplm_bf16", "ortart_dyncore__twotower"])
def test_other_losses_types_and_tables(graph_case: Callable[..., Case], tmp_path: Path, name: str) -> None:
    options = {"rest": "momentum"} if name == SUM else {}
    check(graph_case(name, **options), tmp_path, (20, 31), threads=1)


@pytest.mark.parametrize("seed", [7, None])
def test_dropout(graph_case: Callable[..., Case], tmp_path: Path, seed: int | None) -> None:
    """Without a seed the run draws one of its own, which the checkpoint keeps."""
    check(graph_case(DROPOUT), tmp_path, (1, 20), threads=4 if seed is None else 1, seed=seed)


def test_dropout_through_skipped_steps(graph_case: Callable[..., Case], tmp_path: Path) -> None:
    """The draw belongs to the data position: a skipped step uses its own up, in both runs."""
    case = graph_case(DROPOUT)
    rows: list[object] = []

    def nudge(session: TrainingSession, step: int) -> None:
        if step == 3:
            table = session.parameters
            name = next(iter(table))
            session.assign({name: np.full_like(table[name], 1e30)})
        if step == 5:
            session.assign(start)

    with case.open(seed=1) as whole:
        start = dict(whole.parameters)
        for step in range(8):
            if step == 4:
                whole.save(tmp_path / "run.ckpt")
            nudge(whole, step)
            rows.append(whole.step(case.batches[0])["loss"])
        assert whole.skipped
        want = bits(whole)
    with TrainingSession.resume(tmp_path / "run.ckpt", threads=1) as resumed:
        for step in range(4, 8):
            nudge(resumed, step)
            np.testing.assert_equal(resumed.step(case.batches[0])["loss"], rows[step])
        assert bits(resumed) == want


PROGRAM = """
import sys
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.data import Batches
with TrainingSession.resume(sys.argv[1], threads=1) as session:
    session.fit(Batches(sys.argv[2], 5, seed=3), steps=30, checkpoint=sys.argv[1])
"""


def test_a_new_process_and_the_data_position(graph_case: Callable[..., Case], tmp_path: Path) -> None:
    """Batches of 5 of 17 examples, shuffled anew in each epoch; position 20 is inside of one."""
    case = graph_case(DROPOUT)
    rng = np.random.default_rng(0)
    size = 17
    arrays = {name: np.resize(array, (size, *array.shape[1:])) for name, array in case.batches[0].items()}
    arrays = {name: array[rng.permutation(size)] for name, array in arrays.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    with case.open(seed=5) as whole:
        whole.fit(Batches(tmp_path / "data.npz", 5, seed=3), steps=STEPS)
        want = bits(whole)
    with case.open(seed=5) as first:
        first.fit(Batches(tmp_path / "data.npz", 5, seed=3), steps=20, checkpoint=tmp_path / "run")
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(tmp_path / "data.npz")]
    subprocess.run(words, check=True)  # noqa: S603  our own interpreter
    with TrainingSession.resume(tmp_path / "run", threads=1) as second:
        assert second.position == STEPS
        assert bits(second) == want
