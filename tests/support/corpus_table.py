"""The rows of `tests/corpus/table.md`: what is expected of every committed graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parents[1] / "corpus" / "table.md"
VERDICTS = ("trained", "random", "forward", "nothing left", "invalid")
_ENTRY = re.compile(r"`(?P<name>[^`]+)` (?P<rows>\d+)x(?P<columns>\d+)(?: x(?P<uses>\d+))?(?P<tied> tied)?")


@dataclass(frozen=True)
class Table:
    """One expected table: vocabulary, embedding dimension, lookups, and whether it is tied."""

    vocab_size: int
    embedding_dim: int
    uses: int
    tied: bool


@dataclass(frozen=True)
class Row:
    """One graph: its verdict, the reduction of its loss, its tables and its refused parameters."""

    name: str
    verdict: str
    reduction: str
    tables: dict[str, Table]
    refused: frozenset[str]


def read_table() -> dict[str, Row]:
    """Return the rows by the names of the graphs."""
    rows: dict[str, Row] = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if "__" not in cells[0]:
            continue
        cells += [""] * (5 - len(cells))
        name, verdict, reduction, tables, refused = cells
        assert verdict in VERDICTS, f"{name}: {verdict}"
        entries = [entry.strip() for entry in tables.split(";") if entry.strip()]
        rows[name] = Row(name, verdict, reduction, dict(map(_entry, entries)), _names(refused))
    return rows


def _entry(text: str) -> tuple[str, Table]:
    found = _ENTRY.fullmatch(text)
    assert found is not None, text
    uses = int(found["uses"] or 1)
    return found["name"], Table(int(found["rows"]), int(found["columns"]), uses, bool(found["tied"]))


def _names(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"`([^`]+)`", text))


ROWS = read_table()


def names(*verdicts: str) -> list[str]:
    """Return the graphs with one of these verdicts."""
    return [row.name for row in ROWS.values() if row.verdict in verdicts]
