"""Run the benchmark: every workload at every vocabulary, with all arms."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.bench.arms import choose
from kfac_onnx.bench.machine import describe
from kfac_onnx.bench.measure import available_bytes, groups_that_fit, measure
from kfac_onnx.bench.place import place_of
from kfac_onnx.bench.results import CaseResult, Memory, Profile, Results, Settings
from kfac_onnx.bench.workloads import cases, write_parameters
from kfac_onnx.device.providers import provider_list
from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import thread_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.bench.arms import Arm
    from kfac_onnx.bench.place import Place
    from kfac_onnx.bench.results import Growth
    from kfac_onnx.bench.roofline import Rates
    from kfac_onnx.bench.workloads import Case

__all__ = ["run"]

_log = logging.getLogger(__name__)
_LARGEST: Final = 1_000_000_000


def check(settings: Settings) -> None:
    """Raise UserError for settings out of range."""
    for name, values in (
        ("vocabulary", settings.vocab_sizes),
        ("width", settings.widths),
        ("number of lookups", settings.lookups),
    ):
        for value in values:
            if not 1 <= value <= _LARGEST:
                raise UserError(f"a {name} must be between 1 and {_LARGEST:,}, not {value:,}")
    if settings.steps < 1:
        raise UserError(f"steps must be at least 1, not {settings.steps}")
    if settings.lm_examples < 1:
        raise UserError(f"lm examples must be at least 1, not {settings.lm_examples}")
    if settings.provider not in ("cpu", "cuda"):
        raise UserError(
            f"the benchmark runs on cpu or cuda, not on '{settings.provider}'",
            help="PyTorch's arms have no other provider to be compared with",
        )
    if settings.provider == "cuda":
        for name, wanted in (
            ("memory", settings.memory),
            ("profile", settings.profile),
            ("the workload movielens", "movielens" in settings.workloads),
        ):
            if wanted:
                raise UserError(
                    f"{name} is measured on the CPU alone", help="leave it out with --provider cuda"
                )
    elif settings.cuda_graph or settings.provider_options:
        raise UserError("CUDA graphs and options are for the CUDA provider", help="give --provider cuda")
    thread_count(settings.threads)


def run(
    settings: Settings,
    *,
    movielens: Path | None = None,
    scratch: Path | None = None,
    tell: Callable[[str], None] = _log.info,
) -> Results:
    """Measure what the settings ask for.

    Args:
        settings: workloads, sizes, arms.
        movielens: the file of ratings, for the workload `movielens`.
        scratch: a folder for the initial values, which take as much as the tables; the system's if None.
        tell: hears what is being done.

    Raises:
        UserError: a setting is out of range, a file is missing, or something does not fit.

    """
    from kfac_onnx.bench.convergence import LEVEL, converge
    from kfac_onnx.bench.gpu_rates import GpuRates
    from kfac_onnx.bench.growth import measure_growth
    from kfac_onnx.bench.movielens import read_ratings
    from kfac_onnx.bench.roofline import Machine

    check(settings)
    place = place_of(settings.provider, settings.provider_options, cuda_graph=settings.cuda_graph)
    provider_list(place.providers)
    arms = choose(settings.arms, torch=settings.torch, gpu=place.on_gpu)
    wanted = "movielens" in settings.workloads
    data = read_ratings(movielens) if movielens is not None and wanted else None
    todo = [
        case
        for workload in settings.workloads
        for case in cases(
            workload,
            vocab_sizes=settings.vocab_sizes,
            widths=settings.widths,
            lookups=settings.lookups,
            data=data,
            lm_examples=settings.lm_examples,
            zipf=settings.zipf,
        )
    ]
    machine = GpuRates(place) if place.on_gpu else Machine(settings.threads)
    done: list[CaseResult] = []
    results = Results(settings, describe(torch=not all(arm.ours for arm in arms), place=place), ())
    for case in todo:
        with tempfile.TemporaryDirectory(prefix="kfac-bench-", dir=scratch) as folder:
            parameters = Path(folder) / "parameters.safetensors"
            write_parameters(case, parameters)
            done.append(_case(case, arms, parameters, machine, settings, movielens, tell, place))
            if case.workload == "movielens" and data is not None:
                found = converge(case, arms, data, parameters, threads=settings.threads, tell=tell)
                results = replace(results, convergence=found, level=LEVEL)
    growth: list[Growth] = []
    for small, large in _extremes(todo) if {"half", "plain-sgd"} <= {arm.name for arm in arms} else ():
        tell(f"{small.name}: what half adds at V={small.vocab_size:,} and at V={large.vocab_size:,}, in turn")
        with tempfile.TemporaryDirectory(prefix="kfac-bench-", dir=scratch) as folder:
            found_growth = measure_growth(
                small,
                large,
                Path(folder),
                steps=settings.steps,
                threads=settings.threads,
                seconds=settings.seconds,
                place=place,
            )
        growth += [] if found_growth is None else [found_growth]
    return replace(results, cases=tuple(done), growth=tuple(growth))


def _extremes(todo: Sequence[Case]) -> list[tuple[Case, Case]]:
    """Return each case of more than one vocabulary at its smallest and its largest."""
    by_name: dict[str, list[Case]] = {}
    for case in todo:
        by_name.setdefault(case.name, []).append(case)
    pairs: list[tuple[Case, Case]] = []
    for same in by_name.values():
        small = min(same, key=lambda case: case.vocab_size)
        large = max(same, key=lambda case: case.vocab_size)
        if large.vocab_size > small.vocab_size:
            pairs.append((small, large))
    return pairs


def _case(
    case: Case,
    arms: Sequence[Arm],
    parameters: Path,
    machine: Rates,
    settings: Settings,
    movielens: Path | None,
    tell: Callable[[str], None],
    place: Place,
) -> CaseResult:
    from kfac_onnx.bench.profile import profile
    from kfac_onnx.bench.roofline import achieved, floor_of

    threads = settings.threads
    timings = measure(
        case,
        arms,
        parameters,
        steps=settings.steps,
        threads=threads,
        seconds=settings.seconds,
        tell=tell,
        place=place,
    )
    floor = None
    if "half" in timings:
        tell(f"{case.name} V={case.vocab_size:,}: the machine's own rates")
        floor = achieved(floor_of(case, machine), timings["half"], timings["plain-sgd"])
        machine.forget_tables()
    memory: list[Memory] = []
    if settings.memory:
        _, left_out = groups_that_fit(arms, case.table_bytes, available_bytes())
        for arm in arms:
            if arm.name in left_out:
                continue
            tell(f"{case.name} V={case.vocab_size:,}: memory of {arm.name}")
            found = _memory(case, arm, parameters, threads, movielens)
            if found is not None:
                memory.append(found)
    profiles: list[Profile] = []
    if settings.profile:
        for arm in (arm for arm in arms if arm.ours and timings[arm.name].ms is not None):
            tell(f"{case.name} V={case.vocab_size:,}: profile of {arm.name}")
            profiles.append(profile(case, arm, parameters, steps=settings.steps, threads=threads))
    return CaseResult(
        workload=case.workload,
        name=case.name,
        vocab_size=case.vocab_size,
        tables=dict(case.tables),
        table_bytes=case.table_bytes,
        timings=tuple(timings.values()),
        memory=tuple(memory),
        roofline=floor,
        profiles=tuple(profiles),
    )


def _memory(
    case: Case, arm: Arm, parameters: Path, threads: int | None, movielens: Path | None
) -> Memory | None:
    from kfac_onnx.bench.memory import measure_memory

    found = measure_memory(case, arm.name, parameters, threads=threads, movielens=movielens)
    if isinstance(found, Memory):
        return found
    _log.warning("the memory of %s in %s is not known: %s", arm.name, case.name, found)
    return None
