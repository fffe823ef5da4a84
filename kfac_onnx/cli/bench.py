"""`kfac-onnx bench [WORKLOAD...]`: what a step costs here, beside what else could be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kfac_onnx.cli.options import chosen_providers, common, given_options, provider_option
from kfac_onnx.cli.output import print_json, print_table, say
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from kfac_onnx.bench.results import Results

__all__ = ["command"]

_log = logging.getLogger(__name__)
_MEASURED = (
    "workloads", "vocab_sizes", "widths", "lookups", "steps", "threads", "arms", "torch", "memory", "profile",
    "seconds", "provider", "cuda_graph", "lm_examples", "zipf",
)  # fmt: skip
"""What a run to compare with has settled."""


class Numbers(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  it takes none before click 8.4
    """Whole numbers between commas; `1e6` is one too."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers; a tuple stays as it is."""
        if isinstance(value, tuple):
            return tuple(int(number) for number in value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]  click's defaults
        numbers: list[int] = []
        for word in str(value).split(","):
            try:
                number = float(word)
            except ValueError:
                number = 0.5
            if not number.is_integer():
                self.fail(f"'{word}' is not a whole number", param, ctx)
            numbers.append(int(number))
        return tuple(numbers)


@click.command("bench", short_help="Measure what a step costs, beside what else could be used.")
@click.argument("workloads", metavar="[mf] [lm] [dlrm] [movielens]", nargs=-1)
@click.option(
    "--vocab-sizes", type=Numbers(), metavar="N,...", default="1e4,1e5", show_default=True,
    help="Rows of each table of mf and dlrm.",
)  # fmt: skip
@click.option(
    "--widths", type=Numbers(), metavar="N,...", default="64", show_default=True, help="Widths D of mf."
)
@click.option(
    "--lookups", type=Numbers(), metavar="N,...", default="4096", show_default=True,
    help="Lookups per table and step of mf.",
)  # fmt: skip
@click.option("--steps", type=int, metavar="N", default=60, show_default=True, help="Timed steps of an arm.")
@click.option(
    "--seconds", type=float, metavar="X", default=4.0, show_default=True,
    help="The most that one arm of one case is timed for; slow ones then have fewer steps.",
)  # fmt: skip
@click.option("--threads", type=int, metavar="N", help="Threads (default: all cores).")
@click.option(
    "--arms", metavar="NAME,...", default="",
    help="What trains the tables (default: plain-sgd, half, adagrad, adaptive, plain-adam, plain-adagrad).",
)  # fmt: skip
@click.option(
    "--zipf", type=click.FloatRange(min=0.1, max=5.0), metavar="X",
    help="Ids of mf whose frequency falls as rank^-X (default: uniform).",
)  # fmt: skip
@click.option(
    "--torch", is_flag=True, help="PyTorch's optimizers too, and FBGEMM's (extras 'torch', 'fbgemm')."
)
@click.option(
    "--lm-examples", type=int, metavar="N", default=256, show_default=True, help="Examples of a step of lm."
)
@click.option("--cuda-graph", is_flag=True, help="On CUDA, capture the stages that can be.")
@provider_option
@click.option("--memory/--no-memory", default=False, help="Measure peak memory, in a process for each arm.")
@click.option("--profile", is_flag=True, help="Show time by phase and by inserted operator.")
@click.option(
    "--movielens", type=click.Path(path_type=Path), metavar="FILE",
    help="MovieLens-100k: u.data, or ml-100k.inter of the recbole wheel.",
)  # fmt: skip
@click.option(
    "--compare", type=click.Path(path_type=Path), metavar="FILE",
    help="Run again what this results.json holds, and report ratios that moved.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0), metavar="X", default=0.15, show_default=True,
    help="Of --compare: how much a ratio may move.",
)  # fmt: skip
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Folder for initial values, as large as the tables (default: the system's).",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write results.json, results.md and pictures (extra 'plot') here.",
)  # fmt: skip
@common
@click.pass_context
def command(
    ctx: click.Context,
    workloads: tuple[str, ...],
    vocab_sizes: tuple[int, ...],
    widths: tuple[int, ...],
    lookups: tuple[int, ...],
    steps: int,
    seconds: float,
    threads: int | None,
    arms: str,
    zipf: float | None,
    torch: bool,
    lm_examples: int,
    cuda_graph: bool,
    provider: tuple[str, ...],
    memory: bool,
    profile: bool,
    movielens: Path | None,
    compare: Path | None,
    tolerance: float,
    scratch: Path | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure steps of plain SGD, of the presets and of other optimizers, in turn, on the same batches.

    Times are medians; the ratios to plain SGD on the rows are what carries over to other machines. Without
    any option it takes about a minute. Exit code 2: --compare found a ratio that became worse.
    """
    from kfac_onnx.bench import Settings, run
    from kfac_onnx.bench.machine import busy
    from kfac_onnx.bench.results import read_results
    from kfac_onnx.disk.models import refuse_overwrite, require_folder

    before = None
    if compare is not None:
        for option in given_options(ctx, _MEASURED):
            raise UserError(
                f"--compare runs what '{compare}' holds, so {option.removeprefix('--workloads')} cannot be "
                "given with it" if option != "--workloads" else
                f"--compare runs what '{compare}' holds, so no workload can be given with it",
                help="leave it out, or run without --compare",
            )  # fmt: skip
        before = read_results(compare)
        if output is not None:
            refuse_overwrite(output / "results.json", compare)
        settings = before.settings
    else:
        settings = Settings(
            workloads=workloads or (*Settings().workloads, *(["movielens"] if movielens else [])),
            vocab_sizes=vocab_sizes,
            widths=widths,
            lookups=lookups,
            steps=steps,
            threads=threads,
            arms=tuple(word.strip() for word in arms.split(",") if word.strip()),
            torch=torch,
            memory=memory,
            profile=profile,
            seconds=seconds,
            lm_examples=lm_examples,
            zipf=zipf,
            cuda_graph=cuda_graph,
            **_place(ctx, provider),
        )
    for folder in (output, scratch):
        if folder is not None:
            _make(folder)
            require_folder(folder)
    results = run(settings, movielens=movielens, scratch=scratch)
    waiting = busy()
    if waiting is not None and waiting > 0.5:
        _log.warning("other programs wanted the processor meanwhile: the times are not to be trusted")
    if output is not None:
        _write(results, output)
    if before is None:
        _print(results, as_json)
        return 0
    return _compared(before, results, tolerance, as_json)


def _place(ctx: click.Context, words: tuple[str, ...]) -> dict[str, Any]:
    """Return the provider and its options as settings have them."""
    from kfac_onnx.device.providers import SHORT_NAMES

    first, *others = chosen_providers(ctx, words)
    if others:
        raise UserError("a benchmark runs on one provider", help="give one: --provider cuda")
    name, options = (first, dict[str, str]()) if isinstance(first, str) else first
    short = {full: word for word, full in SHORT_NAMES.items()}
    return {"provider": short.get(name, name), "provider_options": options}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"the folder '{folder}' cannot be made: {first_line(e)}") from e


def _write(results: Results, folder: Path) -> None:
    from kfac_onnx.bench.pictures import can_draw, draw
    from kfac_onnx.bench.report import markdown
    from kfac_onnx.disk.json_lines import plain_json
    from kfac_onnx.disk.models import atomic_path

    texts = {
        "results.json": json.dumps(plain_json(results.to_json()), indent=1, allow_nan=False) + "\n",
        "results.md": markdown(results),
    }
    made: list[Path] = []
    for name, text in texts.items():
        with atomic_path(folder / name) as place:
            place.write_text(text, encoding="utf-8")
        made.append(folder / name)
    if can_draw():
        made += draw(results, folder)
    else:
        _log.warning("no pictures are drawn: matplotlib is missing (pip install 'kfac-onnx[plot]')")
    _log.info("wrote %s", ", ".join(str(path) for path in made))


def _print(results: Results, as_json: bool) -> None:
    from kfac_onnx.bench.report import sheets

    if as_json:
        print_json(results.to_json())
        return
    for sheet in sheets(results):
        print_table(sheet.title, sheet.columns, sheet.rows)
        if sheet.note:
            say(sheet.note + "\n")


def _compared(before: Results, now: Results, tolerance: float, as_json: bool) -> int:
    from kfac_onnx.bench.compare import compare

    drifts, missing = compare(before, now, tolerance=tolerance)
    if as_json:
        print_json(
            {
                "drifts": [vars(drift) | {"change": drift.change, "worse": drift.worse} for drift in drifts],
                "missing": missing,
                "results": now.to_json(),
            }
        )
    else:
        for drift in drifts:
            say(f"{'worse' if drift.worse else 'better'}: {drift}")
        for item in missing:
            say(f"missing: {item}")
        if not drifts and not missing:
            say(f"all ratios are within {tolerance:.0%} of what they were")
    return 2 if missing or any(drift.worse for drift in drifts) else 0
