"""Threads and watchdogs beside a run: what is saved is the state of its position, what is raised is passed on.

`threads.py` has the long mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.runtime import session

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture(scope="module")
def threads() -> ModuleType:
    """The harness."""
    spec = importlib.util.spec_from_file_location("trust_threads", Path(__file__).with_name("threads.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["trust_threads"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["trust_threads"])
    return sys.modules["trust_threads"]


@pytest.mark.parametrize("background", [False, True])
def test_saving_in_a_thread_beside_steps(threads: ModuleType, tmp_path: Path, background: bool) -> None:
    found = threads.save_beside_steps(tmp_path, steps=60, background=background)
    assert found.problems == []
    assert found.checkpoints >= 2


def test_two_threads_that_step(threads: ModuleType) -> None:
    found = threads.step_in_two_threads(steps=60)
    assert found.problems == []
    assert found.taken >= 60


def test_a_watchdog_raises_at_random_moments(threads: ModuleType) -> None:
    found = threads.watchdog(steps=200, seed=2)
    assert found.problems == []
    assert found.raised >= 20


def test_the_harness_sees_a_state_that_is_off(
    threads: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = session.write_checkpoint

    def off(path: Path, checkpoint: Any) -> None:
        states = {**checkpoint.states, "A": checkpoint.states["A"] * np.float32(1.01)}
        write(path, dataclasses.replace(checkpoint, states=states))

    monkeypatch.setattr(session, "write_checkpoint", off)
    found = threads.save_beside_steps(tmp_path, steps=8, background=True)
    assert found.problems[0] == "000001.ckpt at batch 4 has other A"


def test_the_harness_sees_an_exception_that_is_swallowed(
    threads: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = session.TrainingSession.step

    def swallows(self: session.TrainingSession, batch: Any) -> None:
        with contextlib.suppress(Exception):
            step(self, batch)

    monkeypatch.setattr(session.TrainingSession, "step", swallows)
    found = threads.watchdog(steps=60, seed=2)
    assert any(text.endswith("the handler's exception was swallowed") for text in found.problems)
