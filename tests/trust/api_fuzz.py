"""Wrong values to every public function and method: each call succeeds, or ends in a sentence or Python's own error.

    python tests/trust/api_fuzz.py --calls 5000 --seed 1

What is public is read from the package: the functions of `kfac_onnx.__all__`, the methods of `TrainingSession`,
`Batches` and `Schedule`, their parameters from their signatures. One or two arguments of a call that works are
replaced by something else. A call holds if it returns, if it raises UserError with a sentence, or if Python
refuses it before it begins (TypeError of the call itself). Everything else is a problem: other exceptions,
a session that does not step afterwards, a file that is left in the folder.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import math
import os
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kfac_onnx as kx
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.schedules import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GRAPH = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm"


class Rude:
    """Something of a user's that has no text."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


WRONG: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: 0, lambda: -1, lambda: 10**30, lambda: 10**5000, lambda: 1.5, lambda: math.nan,
    lambda: -math.inf, lambda: 1e39, lambda: 1j, lambda: "", lambda: "x", lambda: "a\0b", lambda: "\ud800", lambda: "x" * 5000,
    lambda: "../..", lambda: "/dev/null", lambda: b"x", list, lambda: [None], lambda: ["x", 5], lambda: (), dict,
    lambda: {"x": 1}, lambda: {1: "x"}, lambda: {"x": None}, lambda: {"ids": "x"}, lambda: set(), lambda: object(),
    Rude, lambda: int, lambda: len, lambda: (x for x in ()), lambda: iter([5]), lambda: np.int64(3), lambda: np.float32(0.5),
    lambda: np.bool_(True), lambda: np.array([]), lambda: np.array([{}], object), lambda: np.array("2020", "M8[Y]"),
    lambda: np.zeros((3, 4)), lambda: Path("none"), lambda: Path(), lambda: memoryview(b"x"), lambda: slice(1),
)  # fmt: skip
"""What nobody means; each is made anew, for some can be read only once."""


@dataclass(frozen=True)
class Target:
    """A public callable, and arguments by name with which it works."""

    name: str
    call: Callable[..., Any]
    good: dict[str, Any]

    @property
    def parameters(self) -> list[str]:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(self.call).parameters.values()
        return [
            item.name
            for item in parameters
            if item.kind not in kinds and item.name not in ("self", "log", "trace")
        ]


@dataclass
class World:
    """A model, a step, a session and a folder, in which calls are made."""

    folder: Path
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with np.load(f"{GRAPH}.npz") as case:
            self.values = {name[3:]: case[name] for name in case.files if name.startswith("in:")}
        self.batch = {name: self.values.pop(name) for name in ("ids", "labels")}
        self.graph = f"{GRAPH}.onnx"
        self.step = kx.transform(self.graph, lr=0.01)
        self.forward = f"{GRAPH.parents[1]}/graphs_forward/fwd_dyncore__nplm.onnx"
        self.open()

    def open(self) -> None:
        self.session = kx.TrainingSession(self.step, parameters=self.values, threads=1)
        self.saved = self.session.save(self.folder / "saved.ckpt")

    def targets(self) -> Iterator[Target]:
        """Yield what is public; what it needs to work is listed here, what it takes is asked of its signature."""
        graph, step, batches = {"source": self.graph}, self.step, [self.batch]
        out = self.folder / "out"
        good: dict[str, dict[str, Any]] = {
            "TrainingSession": {"model": step, "parameters": self.values, "threads": 1},
            "check": graph, "scan": graph, "transform": graph, "why": {**graph, "parameter": "m.emb.weight"},
            "differentiate": {"source": self.forward},
            "diff": {"before": step, "after": step}, "inspect": {"model": step},
            "parse_pipeline": {"text": "dce"}, "save": {"model": step, "path": out / "m.onnx"},
            "step": {"batch": self.batch}, "forward": {"batch": self.batch}, "prepared": {"batch": self.batch},
            "fit": {"batches": batches}, "evaluate": {"batches": batches}, "assign": {"values": {}},
            "save_": {"path": out / "c.ckpt"}, "export": {"path": out / "e.onnx"}, "require_place": {"path": out / "c"},
            "resume": {"path": self.saved, "threads": 1}, "require_model": {"model": step}, "reserve": {"ahead": 1},
            "Batches": {"source": self.batch, "batch_size": 2}, "Schedule": {}, "require_loss": {"what": "fit"},
        }  # fmt: skip
        for name in kx.__all__:
            if callable(getattr(kx, name)) and not issubclass_of_exception(getattr(kx, name)):
                yield Target(name, getattr(kx, name), good.get(name, {}))
        yield Target("Batches", Batches, good["Batches"])
        yield Target("Schedule", Schedule, {})
        for name, _ in inspect.getmembers(kx.TrainingSession, callable):
            if not name.startswith("_") and name not in ("close", "fit_as", "alone_in", "decide_by"):
                key = "save_" if name == "save" else name
                yield Target(f"TrainingSession.{name}", getattr(self.session, name), good.get(key, {}))
        supply = Batches(self.batch, 2)
        for name in ("epoch", "since"):
            yield Target(f"Batches.{name}", first_batches(getattr(supply, name)), {})


def first_batches(method: Callable[..., Any]) -> Callable[..., list[Any]]:
    @functools.wraps(method)
    def call(*arguments: Any, **keywords: Any) -> list[Any]:
        return list(itertools.islice(method(*arguments, **keywords), 3))

    return call


def issubclass_of_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def before_it_began(error: TypeError) -> bool:
    """Say whether a TypeError is Python's own, about the call: an unknown or a missing argument."""
    words = str(error)
    return any(part in words for part in ("argument", "positional")) and "NoneType" not in words


def problem_of(target: Target, arguments: dict[str, Any]) -> str | None:
    """Make a call; return what is wrong with how it ended, None if nothing is."""
    try:
        target.call(**arguments)
    except kx.UserError as error:
        sentence = error.message
        if len(sentence.split()) < 3 or sentence.endswith("."):
            return f"no sentence: {sentence!r}"
    except TypeError as error:
        if not before_it_began(error):
            return f"TypeError: {error}"
    except MemoryError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except Exception:
        return type(value).__name__


def calls(world: World, number: int, seed: int) -> Iterator[tuple[Target, dict[str, Any]]]:
    """Yield each target with each wrong value once, and then at random two at a time, `number` of them in all."""
    targets = [target for target in world.targets() if target.parameters]
    single = [(t, name, make) for t in targets for name in t.parameters for make in WRONG]
    source = random.Random(seed)  # noqa: S311  no secret
    source.shuffle(single)
    for target, name, make in single[:number]:
        yield target, {**target.good, name: make()}
    for _ in range(number - len(single)):
        target = source.choice(targets)
        names = source.choices(target.parameters, k=2)
        yield target, {**target.good, **{name: source.choice(WRONG)() for name in names}}


def harness(number: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """Make calls; return how many, and a line for each that does not hold."""
    os.chdir(folder)
    (folder / "out").mkdir()
    world = World(folder)
    problems: list[str] = []
    count = 0
    for target, arguments in calls(world, number, seed):
        count += 1
        problem = problem_of(target, arguments)
        if problem is not None:
            changed = {name: shown(v) for name, v in arguments.items() if target.good.get(name) is not v}
            problems.append(f"{target.name}({changed}): {problem}")
    if not math.isfinite(world.session.step(world.batch)["loss"] or math.nan):
        problems.append("the session does not step any more")
    return count, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kfac-api-fuzz-") as folder:
        count, problems = harness(options.calls, options.seed, Path(folder))
        os.chdir("/")
    for problem in sorted(problems):
        sys.stdout.write(f"PROBLEM {problem[:300]}\n")
    sys.stdout.write(f"{count} calls, {len(problems)} problems\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
