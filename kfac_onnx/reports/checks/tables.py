"""Checks of accepted tables: what is exact only up to float32, what a step costs, what counts twice."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.reports.checks.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kfac_onnx.reports.checks.subject import Subject

__all__ = ["double_precision", "equal_ids", "wide_rows"]

WIDE: Final = 2048
"""Rows of so many columns or more are reported: the root of G then takes seconds on a few cores."""


def double_precision(subject: Subject) -> Iterator[Finding]:
    """Report float64 tables, whose rows are preconditioned in float32."""
    for verdict in subject.verdicts:
        if verdict.site is not None and verdict.weight.dtype is ir.DataType.DOUBLE:
            yield Finding(
                "double-table",
                "note",
                f"'{verdict.weight.name}' is a float64 table, and its update is computed in float32",
                (str(verdict.weight.name),),
                "the values keep float64, but an update is exact to about 7 digits only",
                "cast the model to float32, or leave the table to the ordinary optimizer: "
                f"--allow-fallback {verdict.weight.name}",
            )


def wide_rows(subject: Subject) -> Iterator[Finding]:
    """Report tables whose rows are so wide that the factor G costs much, in memory and at a refresh."""
    for verdict in subject.verdicts:
        if verdict.site is None or (width := verdict.site.pulled.embedding_dim) < WIDE:
            continue
        # G and its root, float32[D, D] each
        size = 2 * 4 * width**2 / 1e6
        yield Finding(
            "wide-table",
            "warning",
            f"rows of '{verdict.weight.name}' have {width} columns",
            (str(verdict.weight.name),),
            f"G and its root are {width} x {width} ({size:.0f} MB together), and each refresh multiplies "
            "such matrices some tens of times",
            "refresh less often (--refresh-every), or leave the table to the ordinary optimizer: "
            f"--allow-fallback {verdict.weight.name}",
        )


def equal_ids(subject: Subject) -> Iterator[Finding]:
    """Report two lookups of one table by the same ids: each counts, unless an exporter merges them."""
    for verdict in subject.verdicts:
        if verdict.site is None:
            continue
        lookups = [use.lookup for use in verdict.site.uses]
        pairs = [
            (one, other)
            for one, other in combinations(lookups, 2)
            if one.ids is not None and one.ids is other.ids
        ]
        if pairs:
            one, other = pairs[0]
            yield Finding(
                "equal-ids",
                "note",
                f"'{one.output.name}' and '{other.output.name}' look the same ids up in "
                f"'{verdict.weight.name}'",
                (str(verdict.weight.name), str(one.output.name), str(other.output.name)),
                "both count as lookups; an exporter that merges them leaves one, whose gradient is the sum: "
                "the K-FAC step then differs, though the loss does not",
                "look the rows up once in the model, and both exports train alike",
            )
