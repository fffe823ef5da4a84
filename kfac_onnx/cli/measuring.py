"""Options of `train` about what is measured and where the numbers go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

from kfac_onnx.cli.options import given_options, is_given
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["chosen_logs", "chosen_measures", "measure_options", "require_measures"]

P = ParamSpec("P")
R = TypeVar("R")

_MEASURES: Final = "kfac_onnx.measures"
_LOGGING: Final = ("log", "log_every", "histograms")


def _keep(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    ctx.meta.setdefault(_MEASURES, {})[str(parameter.name)] = value


_OPTIONS: Final[tuple[tuple[tuple[str, ...], dict[str, Any]], ...]] = (
    (("--metric", "measures"), {"metavar": "NAME", "multiple": True, "help":
        "A metric of held-out data: accuracy, perplexity, auc, rmse, recall@K, ndcg@K; several at will."}),
    (("--scores",), {"metavar": "VALUE", "help":
        "The graph's value that metrics are of (default: what its loss over classes reads)."}),
    (("--labels",), {"metavar": "VALUE", "help": "The graph's value that scores are held against."}),
    (("--monitor",), {"metavar": "NAME", "default": "loss", "show_default": True, "help":
        "What is best by: loss, or one of --metric."}),
    (("--patience",), {"type": click.IntRange(min=1), "metavar": "N", "help":
        "Stop after so many evaluations without a better one."}),
    (("--best",), {"metavar": "FILE.ckpt", "help": "Keep the checkpoint that was best."}),
    (("--log",), {"metavar": "KIND:PLACE", "multiple": True, "help":
        "Send numbers to tensorboard:DIR, mlflow:URI, wandb[:PROJECT] or csv:FILE; several at will."}),
    (("--log-every",), {"type": click.IntRange(min=1), "metavar": "N", "default": 50, "show_default": True,
        "help": "Log every N steps; only those pay for it."}),
    (("--histograms",), {"is_flag": True, "help": "Log the distribution of each table's entries too."}),
)  # fmt: skip


def measure_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add what `chosen_measures` and `chosen_logs` read."""
    for names, settings in reversed(_OPTIONS):
        function = click.option(*names, expose_value=False, callback=_keep, **settings)(function)
    return function


def chosen_measures(ctx: click.Context) -> dict[str, Any]:
    """Return the options about held-out data by the names that `FitOptions` has."""
    return {name: value for name, value in ctx.meta[_MEASURES].items() if name not in _LOGGING}


def chosen_logs(ctx: click.Context) -> dict[str, Any]:
    """Return the options about logs by the names that `FitOptions` has."""
    return {name: ctx.meta[_MEASURES][name] for name in _LOGGING}


def require_measures(ctx: click.Context, held_out: str | None, eval_every: int | None) -> None:
    """Raise UserError for options that need another one."""
    names = ("scores", "labels", "patience", "best", "monitor")
    wanted = given_options(ctx, names) + (["--metric"] if is_given(ctx, "measures") else [])
    for option in wanted if held_out is None else ():
        raise UserError(f"{option} is given, but no --held-out to evaluate on")
    if is_given(ctx, "patience") and eval_every is None:
        raise UserError(
            "--patience counts evaluations, and there is one at the end only", help="give --eval-every"
        )
