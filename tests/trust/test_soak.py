"""The soak run, short: every preset, its limits, and that the limits see what is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from preset_names import ALL

if TYPE_CHECKING:
    from types import ModuleType

HARNESS = Path(__file__).with_name("soak.py")


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    name = "trust_soak"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HARNESS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.mark.parametrize("preset", ALL)
def test_some_hundred_steps_on_hostile_data(soak: ModuleType, preset: str) -> None:
    run = soak.Soak(preset)
    lines = list(run.run(450, 225))
    assert [line.problems() for line in lines] == [[], []]
    assert lines[-1].skipped == 450 // soak.NAN_EVERY == 4
    # 36 kB a step: what a step holds on to. The long mode sees a leak 400 times smaller.
    assert lines[-1].rss_growth < 8
    untouched = run.session.parameters["user_emb.weight"][100:]
    assert untouched.tobytes() == run.graph.initial(soak.Case(soak.GRAPH))["user_emb.weight"][100:].tobytes()
    if preset == "half":
        assert not run.session.states["kfac/user_emb.weight/A"][100:].any()
    run.close()


def test_counts_are_renormalized_many_times(soak: ModuleType) -> None:
    """With decay 0.5 the running scale of A passes 2⁻²⁰ every 20 steps, so 15 times here."""
    run = soak.Soak("half", decay_a=0.5)
    (line,) = run.run(310, 310)
    assert line.problems() == []
    assert line.scale > 2.0**-20
    assert run.session.states["kfac/user_emb.weight/A.count"] == 307
    run.close()


def test_the_scale_of_counts_over_a_hundred_thousand_steps() -> None:
    """The recurrence of one count, as the graph computes it: float32 increments, one rounding a renormalization."""
    rng = np.random.default_rng(0)
    decay = float(np.float32(0.99))
    exact = scale = np.float64(1.0)
    stored, counts, worst = np.float32(0.0), np.float64(0.0), 0.0
    largest = np.float32(0.0)
    for _ in range(100_000):
        count = int(rng.poisson(0.3))
        exact = decay * counts + (1 - decay) * count
        counts = exact
        scale = scale * decay
        stored = np.float32(stored + np.float32(count) * np.float32((1 - decay) / scale))
        if scale < 2.0**-20:
            stored, scale = np.float32(stored * np.float32(scale)), np.float64(1.0)
        largest = max(largest, stored)
        worst = max(worst, abs(float(stored) * scale - counts) / counts if counts > 0 else 0.0)
    # 1380 additions of eps/2 between renormalizations at most, at random: measured 9e-7
    assert worst < 1e-5
    assert largest < 1e7


@pytest.mark.parametrize(
    ("what", "limit"), [("rate", "update"), ("counts", "drift_a"), ("factor", "drift_g"), ("root", "root")]
)
def test_the_limits_see_what_is_wrong(soak: ModuleType, what: str, limit: str) -> None:
    run = soak.Soak("half")
    if what == "rate":
        run.session.learning_rates["kfac/lr"] *= 1.01
    if what in ("counts", "factor"):
        list(run.run(20, 20))
        name = "A" if what == "counts" else "G"
        run.session._holders[f"kfac/user_emb.weight/{name}"].live.view()[...] *= np.float32(1.01)
    if what == "root":
        from kfac_onnx.runtime.step import monitor

        real = monitor.RootMonitor.after_refresh
        with pytest.MonkeyPatch.context() as patch:

            def scaled(self: object, engine: object, outputs: object) -> None:
                real(self, engine, outputs)  # type: ignore[arg-type]
                engine.buffer(self._checks[0].root).view()[...] *= np.float32(1.01)  # type: ignore[attr-defined]

            patch.setattr(monitor.RootMonitor, "after_refresh", scaled)
            (line,) = run.run(30, 30)
    else:
        (line,) = run.run(30, 30)
    assert any(problem.startswith(f"{limit} ") for problem in line.problems())
    run.close()


def test_a_step_that_should_have_been_kept_is_seen(soak: ModuleType) -> None:
    run = soak.Soak("half")
    run.session.skipped += 1
    (line,) = run.run(10, 10)
    assert line.problems() == ["1 steps skipped, 0 batches held a NaN"]
    run.close()


def test_the_harness_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(HARNESS), "--steps", "60", "--windows", "2", "--presets", "half"]
    done = subprocess.run(  # noqa: S603  our own interpreter
        [*command, "--json", str(tmp_path / "lines.json")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3
    lines = json.loads((tmp_path / "lines.json").read_text())
    assert [line["step"] for line in lines] == [30, 60]
