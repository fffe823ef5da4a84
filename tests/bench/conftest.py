"""Small cases, with their initial values in a file; ratings like MovieLens'; results as they are recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.bench.movielens import read_ratings
from kfac_onnx.bench.results import (
    CaseResult,
    Convergence,
    Growth,
    Memory,
    OperatorTime,
    PhaseTime,
    Profile,
    Results,
    Roofline,
    Settings,
    Timing,
)
from kfac_onnx.bench.workloads import cases, write_parameters

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kfac_onnx.bench.workloads import Case


@pytest.fixture(scope="session")
def ratings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings of 60 users and 40 items: a part of the user, a part of the item and noise."""
    random = np.random.default_rng(0)
    users, items = random.integers(0, 60, 4_000), random.integers(0, 40, 4_000)
    ratings = np.clip(np.round(2 + users % 3 + items % 2 + random.normal(0, 0.3, 4_000)), 1, 5)
    lines = [f"{u + 1}\t{i + 1}\t{r:g}\t8" for u, i, r in zip(users, items, ratings, strict=True)]
    path = tmp_path_factory.mktemp("ratings") / "u.data"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def small(ratings_file: Path, tmp_path: Path) -> Callable[[str], tuple[Case, Path]]:
    """Return a workload's case at V = 1,000 with 64 lookups, and the file of its initial values."""

    def made(workload: str) -> tuple[Case, Path]:
        data = read_ratings(ratings_file)
        case = cases(workload, vocab_sizes=(1_000,), widths=(8,), lookups=(64,), data=data)[0]
        path = tmp_path / f"{workload}.safetensors"
        write_parameters(case, path)
        return case, path

    return made


def case_result(vocab_size: int, half: float, *, adam: float | None = 700.0, peak: int = 300) -> CaseResult:
    """A case where plain SGD takes 1 ms and `half` takes `half` ms; bytes are in millions."""
    timings = [
        Timing("plain-sgd", 1.0, 0.9, 1.2, 1.0, 60, 0, 1.0, 0.5, None, 0),
        Timing("half", half, half * 0.9, half * 1.1, half, 60, 0, half, half / 2, half / 4.5, 40_000_000),
        Timing("torch-sgd", 2.0, 1.9, 2.1, 2.0, 60, 0, 2.0, 1.0, None, 0),
        Timing("torch-sparse-adam", 8.0, 7.0, 9.0, 8.0, 60, 0, 8.0, 4.0, None, 5_120_000_000),
    ]
    if adam is None:
        timings.append(Timing("torch-adam", skipped="needs about 36 GB, 20 GB are free"))
    else:
        timings.append(Timing("torch-adam", adam, adam, adam, adam, 5, 0, adam, adam / 2, None, 10))
    profile = Profile(
        "half",
        half,
        0.25 * half,
        (PhaseTime("gradients", 0.5 * half, 0.4 * half, 1.0), PhaseTime("refresh", 0.25 * half, 0.5, 0.1)),
        (
            OperatorTime("gradients", "graph", 0.3 * half, 40),
            OperatorTime("gradients", "OutputFactorUpdate", 0.1 * half, 6),
            OperatorTime("refresh", "FactorInverseRoot", 0.5, 12),
        ),
    )
    parts = {"gᵀg": 0.3, "rows · root": 0.3}
    return CaseResult(
        "mf",
        "mf D=64 N=4096",
        vocab_size,
        {"user": (vocab_size, 64), "item": (vocab_size, 64)},
        512 * vocab_size,
        tuple(timings),
        (Memory("half", 100, 200, peak * 1_000_000, 250, 260),),
        Roofline(parts, {"copy, GB/s": 9.0}, 0.6, half - 1, 0.6 / (half - 1)),
        (profile,),
    )


@pytest.fixture
def recorded() -> Results:
    """Results of two vocabularies, as a run might give them."""
    return Results(
        Settings(vocab_sizes=(10_000, 1_000_000), workloads=("mf",), torch=True),
        {"cpu": "a processor", "cores": "2"},
        (case_result(10_000, 1.8), case_result(1_000_000, 2.2, adam=None)),
        (
            Convergence("plain-sgd", 8.0, 0.931, 90.0, 0.1, 0.5, (20, 90), (1.0, 0.931)),
            Convergence("half", 0.02, 0.95, None, None, 0.9, (20, 90), (0.98, 0.95)),
        ),
        0.94,
        (Growth("mf D=64 N=4096", 10_000, 1_000_000, 0.8, 1.2, 60),),
    )
