"""What a check reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["CheckReport", "Finding", "Severity"]

Severity: TypeAlias = Literal["error", "warning", "note"]
"""`error`: training this graph gives wrong numbers, or none. `warning`: it probably is not what was meant.
`note`: true of the graph, harmless or repaired on reading."""


@dataclass(frozen=True)
class Finding:
    """One thing about a graph: `what` is true at the places `where`, `why` it matters, and what to do."""

    id: str
    severity: Severity
    what: str
    where: tuple[str, ...]
    why: str
    remedy: str


@dataclass(frozen=True)
class CheckReport:
    """Everything that was found, errors first; `checks` are the ids of the checks that ran."""

    findings: tuple[Finding, ...]
    checks: tuple[str, ...]

    def count(self, severity: Severity) -> int:
        """Return how many findings have this severity."""
        return sum(item.severity == severity for item in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data: what `kfac-onnx check --json` prints."""
        return {
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "findings": [asdict(item) for item in self.findings],
            "checks": list(self.checks),
        }
