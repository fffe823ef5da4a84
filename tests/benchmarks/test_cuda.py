"""The command for machines with a GPU, as far as one without can tell: it skips aloud, and reports what it is told."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kfac_onnx.bench.results import CaseResult, Results, Roofline, Settings, Timing
from kfac_onnx.bench.targets import targets
from kfac_onnx.cli.main import main as command_line
from kfac_onnx.device import placement as placements

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[2]
NO_CUDA = "this onnxruntime has no execution provider 'CUDAExecutionProvider'"


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_cuda", ROOT / "benchmarks" / "cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(device=1, minutes=10.0, steps=3, seconds=0.5, cuda_graph=True)


def results(**settings: Any) -> Results:
    timings = (
        Timing("plain-sgd", 1.0, 0.9, 1.1, 1.0, 3, 0, 1.0, 0.5),
        Timing("half", 1.2, 1.1, 1.3, 1.2, 3, 0, 1.2, 0.6),
        Timing("torch-fused-adam", 3.0, 2.9, 3.1, 3.0, 3, 0, 3.0, 1.5),
    )
    case = CaseResult(
        "lm", "lm D=64 batch 1,024", 12_762, {"e": (12_762, 64)}, 1, timings,
        roofline=Roofline({"count": 0.1}, {}, 0.1, 0.2, 0.5),
    )  # fmt: skip
    return Results(Settings(provider="cuda", **settings), {"gpu": "NVIDIA Test"}, (case,))


def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    pytest.importorskip("onnxruntime")
    done = subprocess.run(  # noqa: S603  its words are ours
        [sys.executable, str(ROOT / "benchmarks" / "cuda.py")], capture_output=True, text=True, check=False
    )
    if "SKIPPED" not in done.stdout:
        pytest.skip("there is a GPU")
    assert done.returncode == 0
    assert done.stdout.startswith(
        "SKIPPED: benchmarks/cuda.py needs a GPU, and there is none that works here: this onnxruntime has no"
    )
    assert done.stderr == ""


@pytest.mark.parametrize("rows", [None, 100_000, 20_000_000])
@pytest.mark.parametrize("torch", [False, True])
def test_the_words_of_the_benchmark_are_understood(
    cuda: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, rows: int | None, torch: bool,
) -> None:  # fmt: skip
    """By the command itself, up to the settings of the run."""
    seen: list[Settings] = []

    def run(settings: Settings, **_: object) -> Results:
        seen.append(settings)
        return results()

    monkeypatch.setattr("kfac_onnx.bench.run", run)
    assert command_line(["bench", *cuda.bench_words(options, torch=torch, rows=rows), "--json"]) == 0
    (settings,) = seen
    assert (settings.provider, settings.provider_options) == ("cuda", {"device_id": "1"})
    assert settings.cuda_graph
    assert {"plain-sgd", "half"} <= {*settings.arms}
    assert ("torch-fused-adam" in settings.arms) == torch
    if rows is None:
        assert (settings.workloads, settings.lm_examples) == (("lm",), 1024)
    else:
        assert (settings.workloads, settings.vocab_sizes) == (("mf",), (rows,))
        assert (settings.widths, settings.lookups) == ((128,), (65_536,))


def test_placement_is_of_every_preset_and_both_sums(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the prediction in the place of the measurement."""
    asked: list[Any] = []

    def measure(stages: Any, provider: Any) -> Any:
        asked.append(provider)
        return placements.predict(stages)

    monkeypatch.setattr(placements, "measure", measure)
    monkeypatch.setattr(cuda, "PRESETS", ("half", "r1.7"))
    rows = cuda.placement(1)
    assert set(map(str, asked)) == {"('cuda', {'device_id': '1'})"}
    assert [(row["graph"], row["preset"], row["deterministic"]) for row in rows] == [
        (graph, preset, order)
        for graph in ("lm", "mf") for preset in ("half", "r1.7") for order in (False, True)
    ]  # fmt: skip
    assert all(row["inserted"]["CUDAExecutionProvider"] > 0 for row in rows)
    assert [row["fallbacks"] + row["copies"] for row in rows] == [[]] * len(rows)
    assert not cuda.Report(placement=rows).failed
    rows[0]["copies"].append("commit: x")
    assert cuda.Report(placement=rows).failed


def test_what_tests_said(cuda: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two">'
        '<failure/></testcase><testcase classname="a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert cuda.outcome(tmp_path / "t.xml") == {"passed": 1, "skipped": 1, "failed": ["a.two"]}


def test_the_tests_are_found_by_their_mark(cuda: ModuleType) -> None:
    """Without a GPU they are skipped, which is no failure."""
    found = cuda.parity(120.0)
    assert found["failed"] == []
    assert found["passed"] + found["skipped"] > 60


def test_a_benchmark_that_fails_fails_the_run(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        calls.append(command)
        folder = Path(command[command.index("-o") + 1])
        if "lm" in command:
            (folder / "results.json").write_text(json.dumps(results().to_json()))
            return subprocess.CompletedProcess(command, 0)
        if "100" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cuda.subprocess, "run", run)
    report, clock = cuda.Report(), cuda.Clock(1.0)
    cuda.bench("lm", ["lm"], clock, report)
    assert len(report.bench) == 1
    assert not report.failed
    cuda.bench("slow", ["mf", "--vocab-sizes", "100"], clock, report)
    assert report.left_out == ["slow: the time is over"]
    assert not report.failed
    cuda.bench("mf", ["mf", "--vocab-sizes", "200"], clock, report)
    assert report.problems == ["mf: `kfac-onnx bench` ended with 3"]
    assert report.failed
    cuda.bench("late", ["lm"], cuda.Clock(0.0), report)
    assert report.left_out[-1] == "late: the time is over"
    assert len(calls) == 3


def test_the_page(cuda: ModuleType, tmp_path: Path) -> None:
    row = {
        "graph": "lm", "preset": "half", "deterministic": False, "fallbacks": [], "copies": [], "users": [],
        "inserted": {"CUDAExecutionProvider": 90, "CPUExecutionProvider": 4},
    }  # fmt: skip
    data = results().to_json()
    report = cuda.Report(
        {"gpu": "NVIDIA Test"},
        [row],
        {"passed": 5, "skipped": 0, "failed": ["x.y"]},
        [data, data],
        ["mf: late"],
    )
    cuda.write(report, tmp_path / "new")
    page = (tmp_path / "new" / "results.md").read_text()
    assert "On: gpu NVIDIA Test." in page
    assert "| lm | half | atomically | 90 | 4 (0 without a kernel) | 0 |" in page
    assert "5 tests passed, 1 failed." in page
    assert "- failed: x.y" in page
    assert page.count("torch-fused-adam") >= 2
    assert "### Left out\n\n- mf: late" in page
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["failed"] is True
    assert written["machine"] == {"gpu": "NVIDIA Test"}


def test_aims_on_a_gpu() -> None:
    found = {target.aim.split(": ")[1]: (round(target.value, 6), target.met) for target in targets(results())}
    assert found == {
        "torch-fused-adam over half": (2.5, True),
        "half over SGD rows": (1.2, True),
        "what half adds over its floor": (2.0, False),
    }
