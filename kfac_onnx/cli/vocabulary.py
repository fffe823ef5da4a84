"""`kfac-onnx vocabulary build|show`: rows of a table for ids that are texts, or integers of 64 bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kfac_onnx.cli.data_options import chosen_columns, columns_option
from kfac_onnx.cli.options import common
from kfac_onnx.cli.output import print_json, print_table, say
from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.data.vocabulary import Counts, Vocabulary

__all__ = ["command"]

_log = logging.getLogger(__name__)
SHOWN = 20
"""Keys that `show` prints."""


@click.group("vocabulary", short_help="Make rows of ids that are texts, or integers of 64 bits.")
def command() -> None:
    """Make rows of ids that are texts, or integers of 64 bits: build a vocabulary, show one (also --json)."""


@command.command("build", short_help="Count ids and give each a row.")
@click.argument("model", metavar="MODEL")
@click.option("--data", metavar="DATA", required=True, help="What `train` reads.")
@click.option(
    "--input",
    "inputs",
    metavar="INPUT[+INPUT...]",
    multiple=True,
    required=True,
    help="Batch inputs whose ids are counted; 'a+b' share one vocabulary; may be given several times.",
)
@click.option("--min-count", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="How often an id must be seen to get a row of its own.")  # fmt: skip
@click.option("--buckets", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Rows that all other ids share by their hash; 0: they share one row.")  # fmt: skip
@click.option("--first-row", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Row of the most frequent id; rows before it stay free, as for padding.")  # fmt: skip
@click.option("--unknown-row", type=click.IntRange(min=0), metavar="N",
              help="Row, before the first, of all other ids (default: the one behind the last).")  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1), metavar="N",
              help="Rows of the table: so many of the most frequent ids as fit get their own.")  # fmt: skip
@click.option("-o", "--output", metavar="OUT",
              help="The file to write, for one --input (default: MODEL.INPUT.vocabulary).")  # fmt: skip
@columns_option
@common
@click.pass_context
def build(
    ctx: click.Context,
    model: str,
    data: str,
    inputs: tuple[str, ...],
    min_count: int,
    buckets: int,
    first_row: int,
    unknown_row: int | None,
    rows: int | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Count the ids of DATA that fill inputs of MODEL, and write a vocabulary beside MODEL.

    `train` uses it: ids become rows, the most frequent first, and all others go to a row, or to buckets.
    """
    from kfac_onnx.data.vocabulary import SUFFIX, write_vocabulary
    from kfac_onnx.disk.models import load_proto, refuse_overwrite

    groups = [tuple(name.strip() for name in word.split("+")) for word in inputs]
    if output is not None and len(groups) > 1:
        raise UserError("--output is given, but there is more than one --input: each has its own file")
    if output is None and model == "-":
        raise UserError("the model is read from standard input, so --output must name the file")
    graph = load_proto(model, external=False).graph
    names = [value.name for value in graph.input]
    for name in (name for group in groups for name in group):
        if name not in names:
            raise UserError(f"the model has no input '{name}'{did_you_mean(name, names)}")
    stem = Path(model).with_suffix("")
    paths = {
        group: Path(f"{stem}.{'+'.join(group)}{SUFFIX}" if output is None else output) for group in groups
    }
    for path in paths.values():
        refuse_overwrite(path, model, data)
    built = {
        group: counts.vocabulary(
            group, minimum=min_count, first=first_row, buckets=buckets, unknown=unknown_row, rows=rows
        )
        for group, counts in _counted(data, chosen_columns(ctx), groups).items()
    }
    for group, vocabulary in built.items():
        write_vocabulary(paths[group], vocabulary)
    if as_json:
        print_json([{"file": str(paths[group]), **_facts(word)} for group, word in built.items()])
        return
    for group, vocabulary in built.items():
        say(f"{paths[group]}: {_sentence(vocabulary)}")


def _counted(data: str, columns: str, groups: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Counts]:
    from kfac_onnx.data.filling import Filling, parse_columns
    from kfac_onnx.data.lists import Lists
    from kfac_onnx.data.readers import files_of, open_files
    from kfac_onnx.data.vocabulary import Counts

    files = files_of(data)
    source = open_files(files, {})
    by_input: dict[str, Filling] = {name: f for f in parse_columns(columns) for name in f.inputs}
    chosen = {name: by_input.get(name, Filling(name, name)).column for group in groups for name in group}
    for name, column in chosen.items():
        if column not in source.names:
            listed = ", ".join(f"'{item}'" for item in source.names)
            raise UserError(
                f"'{data}' has no column '{column}'{did_you_mean(column, source.names)}",
                help=f"its columns are {listed}: --columns 'COLUMN={name}'",
            )
    counts = {group: Counts() for group in groups}
    wanted = list(dict.fromkeys(chosen.values()))
    for piece in range(len(source.rows)):
        for block in source.read(piece, wanted):
            for group in groups:
                for column in dict.fromkeys(chosen[name] for name in group):
                    part = block[column]
                    values = part.values if isinstance(part, Lists) else part
                    counts[group].add(values, f"column '{column}' of '{data}'")
    return counts


def _facts(word: Vocabulary) -> dict[str, object]:
    return {
        "inputs": list(word.inputs),
        "ids": "texts" if word.texts else "integers",
        "keys": len(word.keys),
        "first_row": word.first,
        "unknown_row": word.unknown_row,
        "buckets": word.buckets,
        "rows": word.size,
    }


def _sentence(word: Vocabulary) -> str:
    last = word.unknown_row + word.buckets - 1
    rest = f"rows {word.unknown_row} to {last} by hash" if word.buckets > 1 else f"row {word.unknown_row}"
    keys = f"{len(word.keys)} ids have rows from {word.first} on" if len(word.keys) else "no id has a row"
    return f"{keys}, all others share {rest}; the table needs {word.size} rows"


@command.command("show", short_help="Show a vocabulary.")
@click.argument("file", metavar="FILE")
@common
def show(file: str, as_json: bool) -> None:
    """Show how many rows a vocabulary needs, where unknown ids go, and its most frequent ids."""
    from kfac_onnx.data.vocabulary import read_vocabulary

    word = read_vocabulary(file)
    top = list(zip(word.keys[:SHOWN].tolist(), word.counts[:SHOWN].tolist(), strict=True))
    if as_json:
        print_json({**_facts(word), "top": [{"id": key, "count": count} for key, count in top]})
        return
    say(_sentence(word))
    print_table(
        f"The most frequent ids of {', '.join(word.inputs)}",
        ["id", "count ", "row "],
        [(key, count, word.first + place) for place, (key, count) in enumerate(top)],
    )
