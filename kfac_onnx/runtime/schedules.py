"""Learning-rate schedules: one factor per batch that multiplies every learning rate.

With warm-up over w batches and a horizon of n batches, batch p = 0, 1, ... gets

    (p + 1) / w                              while p < w
    1                                        constant
    1 - (1 - final) · x                      linear    x = (p - w) / (n - w), at most 1
    final + (1 - final) · (1 + cos πx) / 2   cosine
    1 - (1 - final) · y                      wsd       y = (p - (n - d)) / d, 0 before the last d batches

`wsd` is warm-up, stable, decay: d is `decay`, a fifth of n if not given. Text form: `constant`,
`cosine:warmup=100`, `linear:steps=2000,final=0.1,warmup=50`, `wsd:warmup=50,decay=400`.

Source of wsd: Hu et al. 2024 (MiniCPM), section 4, https://arxiv.org/abs/2404.06395
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final, Literal, assert_never, get_args

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.errors.arguments import finite_number, shown, whole_number

__all__ = ["Schedule", "parse"]

Kind = Literal["constant", "linear", "cosine", "wsd"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_OPTIONS: Final = ("warmup", "steps", "final", "decay")


@dataclass(frozen=True)
class Schedule:
    """A schedule; `steps` is the horizon in batches, warm-up included, `final` the factor at its end.

    `decay` is how many of the last batches of `wsd` decay: a fifth of the horizon if None.

    Raises UserError for values out of range.
    """

    kind: Kind = "constant"
    warmup: int = 0
    steps: int | None = None
    final: float = 0.0
    decay: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):  # pyright: ignore[reportUnnecessaryIsInstance]  it comes from the user
            raise UserError(f"the kind of a schedule is a word, not {shown(self.kind)}")
        if self.kind not in KINDS:
            raise _unknown(self.kind)
        plain: dict[str, object] = {
            "warmup": whole_number(self.warmup, "a schedule's warmup", least=0),
            "final": finite_number(self.final, "a schedule's final"),
        }
        for name in ("steps", "decay"):
            if getattr(self, name) is not None:
                plain[name] = whole_number(getattr(self, name), f"a schedule's {name}", least=1)
        for name, value in plain.items():  # a checkpoint holds the text of Python's numbers, not of NumPy's
            object.__setattr__(self, name, value)
        if not 0.0 <= self.final <= 1.0:
            raise UserError(f"a schedule's final must lie between 0 and 1, got {self.final}")
        if self.decay is not None and self.kind != "wsd":
            raise UserError(f"a schedule's decay belongs to 'wsd', not to '{self.kind}'")

    def __str__(self) -> str:
        defaults = Schedule()
        options = [
            f"{name}={getattr(self, name)}"
            for name in _OPTIONS
            if getattr(self, name) != getattr(defaults, name)
        ]
        return self.kind + (f":{','.join(options)}" if options else "")

    def within(self, steps: int | None) -> Schedule:
        """Return the schedule with this horizon, unless it has one of its own or needs none."""
        if self.steps is not None or steps is None or self.kind == "constant":
            return self
        return dataclasses.replace(self, steps=steps)

    def factor(self, position: int) -> float:
        """Return the factor for batch `position` = 0, 1, ...

        Raises UserError where the horizon is not known.
        """
        if position < self.warmup:
            return (position + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if self.steps is None:
            raise UserError(
                f"the schedule '{self}' needs the number of steps",
                help=f"write '{self.kind}:steps=N', or give steps= or epochs= to fit",
            )
        x = min(1.0, (position - self.warmup) / max(1, self.steps - self.warmup))
        match self.kind:
            case "linear":
                return 1.0 - (1.0 - self.final) * x
            case "cosine":
                return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * x)) / 2.0
            case "wsd":
                decay = max(1, self.steps // 5) if self.decay is None else self.decay
                y = min(1.0, max(0.0, (position - (self.steps - decay)) / decay))
                return 1.0 - (1.0 - self.final) * y
            case _:
                assert_never(self.kind)


def _unknown(name: str) -> UserError:
    return UserError(
        f"unknown schedule '{name}'{did_you_mean(name, KINDS)}", help=f"schedules are {', '.join(KINDS)}"
    )


def parse(text: str) -> Schedule:
    """Return the schedule that `str(schedule)` wrote.

    Raises UserError for an unknown kind or option, or a value that is no number.
    """
    name, _, rest = text.strip().partition(":")
    kind: Kind | None = next((kind for kind in KINDS if kind == name), None)
    if kind is None:
        raise _unknown(name)
    values: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if option not in _OPTIONS:
            message = f"unknown option '{option}' of schedule '{name}'{did_you_mean(option, _OPTIONS)}"
            raise UserError(message)
        try:
            values[option] = float(value) if option == "final" else int(value)
        except ValueError as e:
            message = f"option '{option}' of schedule '{name}' must be a number, got '{value}'"
            raise UserError(message) from e
    steps, decay = (None if values.get(key) is None else int(values[key]) for key in ("steps", "decay"))
    return Schedule(kind, int(values.get("warmup", 0)), steps, values.get("final", 0.0), decay)
