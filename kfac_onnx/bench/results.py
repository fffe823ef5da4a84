"""What a run of the benchmark measured, as data: settings, machine, timings, memory, roofline.

`Results.to_json` and `Results.from_json` are each other's inverse; times are milliseconds, sizes bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kfac_onnx.disk.records import parse
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CaseResult",
    "Convergence",
    "Growth",
    "Memory",
    "OperatorTime",
    "PhaseTime",
    "Profile",
    "Results",
    "Roofline",
    "Settings",
    "Timing",
    "read_results",
]

VERSION: Final = 2


@dataclass(frozen=True)
class Settings:
    """What was asked for; `seconds` is the most that one arm of one case is timed for."""

    workloads: tuple[str, ...] = ("mf", "lm", "dlrm")
    vocab_sizes: tuple[int, ...] = (10_000, 100_000)
    widths: tuple[int, ...] = (64,)
    lookups: tuple[int, ...] = (4_096,)
    steps: int = 60
    threads: int | None = None
    arms: tuple[str, ...] = ()
    torch: bool = False
    memory: bool = False
    profile: bool = False
    seconds: float = 4.0
    provider: str = "cpu"
    provider_options: dict[str, str] = field(default_factory=dict[str, str])
    cuda_graph: bool = False
    lm_examples: int = 256
    zipf: float | None = None

    def command(self) -> str:
        """Return the command that makes this run; files are left for the reader to fill in."""
        words = ["kfac-onnx bench", *self.workloads]
        words.append("--vocab-sizes " + ",".join(map(str, self.vocab_sizes)))
        words.append("--widths " + ",".join(map(str, self.widths)))
        words.append("--lookups " + ",".join(map(str, self.lookups)))
        words.append(f"--steps {self.steps} --seconds {self.seconds:g}")
        words += [] if self.threads is None else [f"--threads {self.threads}"]
        words += ["--arms " + ",".join(self.arms)] if self.arms else []
        words += ["--torch"] if self.torch else []
        words += ["--memory"] if self.memory else []
        words += ["--profile"] if self.profile else []
        words += ["--movielens FILE"] if "movielens" in self.workloads else []
        words += [f"--lm-examples {self.lm_examples}"] if self.lm_examples != 256 else []
        words += [] if self.zipf is None else [f"--zipf {self.zipf:g}"]
        words += [f"--provider {self.provider}"] if self.provider != "cpu" else []
        words += [f"--provider-option {name}={value}" for name, value in self.provider_options.items()]
        words += ["--cuda-graph"] if self.cuda_graph else []
        return " ".join(words)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one arm's steps: median, percentiles, mean; or why it was not run.

    `ratio_sgd` is to `plain-sgd`, `ratio_torch` to `torch-sgd` and `ratio_fbgemm` to
    `fbgemm-rowwise-adagrad` of the same group, that is of the same minutes. `state_bytes` is what the
    optimizer keeps for the tables.
    """

    arm: str
    ms: float | None = None
    p10: float | None = None
    p90: float | None = None
    mean: float | None = None
    steps: int = 0
    group: int = 0
    ratio_sgd: float | None = None
    ratio_torch: float | None = None
    ratio_fbgemm: float | None = None
    state_bytes: int | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Memory:
    """Highest resident memory of one arm in a process of its own, at the end of each part of a run.

    `start` is after the imports, before anything is opened.
    """

    arm: str
    start: int
    opened: int
    stepped: int
    saved: int
    resumed: int


@dataclass(frozen=True)
class Roofline:
    """The least time that the work added by `half` can take here, and the share of it that is achieved.

    `parts` maps each piece of work to its milliseconds at the machine's measured rates, `rates` names those.
    `share` is `floor_ms` / `added_ms`; None where no time is added.
    """

    parts: dict[str, float]
    rates: dict[str, float]
    floor_ms: float
    added_ms: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class OperatorTime:
    """Milliseconds per step in one operator: of the dialect, or `graph` for the user's own nodes."""

    phase: str
    operator: str
    ms: float
    nodes: int


@dataclass(frozen=True)
class PhaseTime:
    """Milliseconds per step in one phase: whole, and within its operators as a profiler sees them.

    The median of its runs times `share_of_steps`, the part of the steps that run the phase.
    """

    phase: str
    ms: float
    kernels_ms: float
    share_of_steps: float


@dataclass(frozen=True)
class Profile:
    """Where one arm's step goes: all phases and, outside of them, `host_ms` make up `step_ms`."""

    arm: str
    step_ms: float
    host_ms: float
    phases: tuple[PhaseTime, ...]
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True)
class CaseResult:
    """Everything measured of one workload at one vocabulary."""

    workload: str
    name: str
    vocab_size: int
    tables: dict[str, tuple[int, int]]
    table_bytes: int
    timings: tuple[Timing, ...]
    memory: tuple[Memory, ...] = ()
    roofline: Roofline | None = None
    profiles: tuple[Profile, ...] = ()

    def timing(self, arm: str) -> Timing | None:
        """Return an arm's timing; None if it was not run."""
        return next((item for item in self.timings if item.arm == arm and item.ms is not None), None)


@dataclass(frozen=True)
class Growth:
    """What `half` adds to plain SGD at two vocabularies whose steps took turns: medians of `steps`."""

    name: str
    small: int
    large: int
    added_small_ms: float
    added_large_ms: float
    steps: int


@dataclass(frozen=True)
class Convergence:
    """Held-out RMSE of one arm on MovieLens at the learning rate that was best for it.

    `steps_to_level` and `seconds_to_level` are None where the level was not reached; `seconds` counts
    training alone. `at` and `rmse` are the curve.
    """

    arm: str
    lr: float
    best: float
    steps_to_level: float | None
    seconds_to_level: float | None
    seconds: float
    at: tuple[int, ...]
    rmse: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """A whole run. `level` is the RMSE that convergence is compared at."""

    settings: Settings
    machine: dict[str, str]
    cases: tuple[CaseResult, ...]
    convergence: tuple[Convergence, ...] = ()
    level: float | None = None
    growth: tuple[Growth, ...] = ()
    version: int = field(default=VERSION)

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        """Return the results that `to_json` gave; raises KeyError, TypeError or ValueError for other data."""
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']} of the results, this is version {VERSION}")
        return cls(
            settings=_made(Settings, data["settings"]),
            machine=dict(data["machine"]),
            cases=tuple(_case(item) for item in data["cases"]),
            convergence=tuple(_made(Convergence, item) for item in data["convergence"]),
            level=data["level"],
            growth=tuple(_made(Growth, item) for item in data["growth"]),
        )


T = TypeVar("T")


def _made(kind: type[T], data: dict[str, Any]) -> T:
    """Return a dataclass of JSON data; lists become tuples."""
    names = {item.name for item in fields(kind)}  # pyright: ignore[reportArgumentType]  a dataclass
    known: dict[str, Any] = {}
    for name in names & set(data):
        value: Any = data[name]
        known[name] = tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType]  JSON
    return kind(**known)


def _case(data: dict[str, Any]) -> CaseResult:
    return CaseResult(
        workload=data["workload"],
        name=data["name"],
        vocab_size=data["vocab_size"],
        tables={name: (shape[0], shape[1]) for name, shape in data["tables"].items()},
        table_bytes=data["table_bytes"],
        timings=tuple(_made(Timing, item) for item in data["timings"]),
        memory=tuple(_made(Memory, item) for item in data["memory"]),
        roofline=None if data["roofline"] is None else _made(Roofline, data["roofline"]),
        profiles=tuple(
            Profile(
                arm=item["arm"],
                step_ms=item["step_ms"],
                host_ms=item["host_ms"],
                phases=tuple(_made(PhaseTime, phase) for phase in item["phases"]),
                operators=tuple(_made(OperatorTime, operator) for operator in item["operators"]),
            )
            for item in data["profiles"]
        ),
    )


def read_results(path: Path) -> Results:
    """Return the results in a file that `bench -o` wrote.

    Raises UserError when there is none, or it holds something else.
    """
    try:
        return Results.from_json(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"'{path}' is not a file of results: {first_line(e)}",
            help="give the results.json that `kfac-onnx bench -o DIR` wrote",
        ) from e
