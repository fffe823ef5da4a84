"""Threads and watchdogs beside a run: `python tests/trust/threads.py [--steps 3000] [--seed 0]`.

    save       a thread saves again and again while another steps: each checkpoint must hold, bit by bit, the
               state of the position that it says
    step       two threads step one session: it must come to what one thread comes to with as many steps
    watchdog   SIGALRM comes at random moments and its handler raises: the exception must be passed on, and the
               state be that of the position, which goes on

What is compared with is a session of one thread that takes the same batches.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import toy

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Generator

    import numpy as np


@dataclass
class Findings:
    """What came out: counts, and a sentence per problem."""

    checkpoints: int = 0
    taken: int = 0
    raised: int = 0
    problems: list[str] = field(default_factory=list[str])


def opened() -> TrainingSession:
    """Return a session on the toy."""
    return TrainingSession(toy.whole_step(), parameters=toy.parameters(), threads=1)


def differences(states: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> list[str]:
    """Return the names of states whose bits differ."""
    return [name for name, array in others.items() if states[name].tobytes() != array.tobytes()]


def save_beside_steps(folder: Path, *, steps: int, background: bool) -> Findings:
    """Save in a thread, with background saves from within the steps' thread if asked for."""
    found, batches, stop = Findings(), toy.batches(steps), threading.Event()
    chance = random.Random(0)  # noqa: S311  of moments
    expected = [opened()]
    states = [expected[0].states]
    for batch in batches:
        expected[0].step(batch)
        states.append(expected[0].states)
    session = opened()

    def save() -> None:
        while not stop.is_set():
            try:
                session.save(folder / f"{found.checkpoints:06d}.ckpt")
                found.checkpoints += 1
            except UserError as e:
                found.problems.append(e.message)
                return
            time.sleep(chance.uniform(0, 2e-3))

    thread = threading.Thread(target=save)
    if not background:
        thread.start()
    for batch in batches:
        if background and session.position % 4 == 0:
            session.save(folder / f"{found.checkpoints:06d}.ckpt", background=True)
            found.checkpoints += 1
        session.step(batch)
        time.sleep(chance.uniform(0, 2e-3))
    stop.set()
    if not background:
        thread.join()
    session.finish_saving()
    for path in sorted(folder.glob("*.ckpt")):
        resumed = TrainingSession.resume(path, threads=1)
        if wrong := differences(resumed.states, states[resumed.position]):
            found.problems.append(f"{path.name} at batch {resumed.position} has other {', '.join(wrong)}")
    if wrong := differences(session.states, states[-1]):
        found.problems.append(f"the run came to other {', '.join(wrong)}")
    return found


def step_in_two_threads(*, steps: int) -> Findings:
    """Step one session from two threads on the same batch."""
    found, (batch,), session = Findings(), toy.batches(1), opened()
    counts = [0, 0]

    def run(index: int) -> None:
        while sum(counts) < steps:
            try:
                session.step(batch)
            except UserError as e:
                found.problems.append(e.message)
                return
            counts[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.taken = sum(counts)
    twin = opened()
    for _ in range(found.taken):
        twin.step(batch)
    if session.position != found.taken:
        found.problems.append(f"{found.taken} steps were made, the position is {session.position}")
    if wrong := differences(session.states, twin.states):
        found.problems.append(f"two threads came to other {', '.join(wrong)}")
    return found


class WatchdogError(Exception):
    """What the handler raises."""


@contextlib.contextmanager
def _handled(armed: list[bool], found: Findings) -> Generator[None]:
    def handler(*_: object) -> None:
        if armed[0]:
            armed[0] = False
            found.raised += 1
            raise WatchdogError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def watchdog(*, steps: int, seed: int) -> Findings:
    """Step under a timer whose handler raises."""
    found, chance, armed = Findings(), random.Random(seed), [False]  # noqa: S311  of moments
    session, twin = opened(), opened()
    batches = toy.batches(steps)
    longest = _longest(batches[:20])
    with _handled(armed, found):
        for batch in batches:
            before, fired, passed_on = session.position, found.raised, False
            armed[0] = True
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, longest))
                session.step(batch)
                armed[0] = False
            except WatchdogError:
                passed_on = True
            except UserError as e:
                found.problems.append(e.message)
            armed[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if found.raised > fired and not passed_on:
                found.problems.append(f"at batch {session.position} the handler's exception was swallowed")
            if session.position != before:
                twin.step(batch)
            if wrong := differences(session.states, twin.states):
                found.problems.append(f"at batch {session.position} there are other {', '.join(wrong)}")
                return found
    found.taken = session.position
    return found


def _longest(batches: list[Any]) -> float:
    """Return how long a step takes, in seconds, and a half."""
    session, times = opened(), list[float]()
    for batch in batches:
        start = time.perf_counter()
        session.step(batch)
        times.append(time.perf_counter() - start)
    return 1.5 * sorted(times)[len(times) // 2]


def main() -> int:
    """Run all three; print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problems = 0
    for name, call in (
        ("save", lambda folder: save_beside_steps(folder, steps=options.steps, background=False)),
        (
            "save in the background",
            lambda folder: save_beside_steps(folder, steps=options.steps, background=True),
        ),
        ("step", lambda _: step_in_two_threads(steps=options.steps)),
        ("watchdog", lambda _: watchdog(steps=options.steps, seed=options.seed)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            found = call(Path(folder))
        print(f"{name}: {found}")  # noqa: T201  the harness prints what it found
        problems += len(found.problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
