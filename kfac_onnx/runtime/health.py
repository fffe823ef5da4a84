"""How well conditioned the output factors are, and how well their inverse roots fit them: read on demand.

For each table, in float64 on the host, from the states alone (of a session or of a checkpoint):

    M = Ĝ + damping_g·I        condition = λ_max(M)/λ_min(M)        drift = max|P(M, R) − I|

where P(M, R) is R M R for the inverse root and M R for the inverse. M is that of now and R that of the last
refresh, so the drift holds both R's own error and what has changed since. Ĝ and damping_g are what the
model's operators FactorDebias and DampingRelative or DampingPi make of the states:

    Ĝ = G/(1 − decay^count)        relative: ρ·max(tr Ĝ/D, 1e-30)        π: √λ/π, π² = (ΣA/V)/(tr Ĝ/D)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kfac_onnx.metadata import RootCheck, State
    from kfac_onnx.runtime.step.monitor import RootRecord
    from kfac_onnx.step.protos import Item

__all__ = ["RootHealth", "root_health"]


_FLOOR: Final = 1e-30
"""Of the mean eigenvalue, in DampingRelative."""


@dataclass(frozen=True)
class RootHealth:
    """One table's output factor and its inverse (root).

    `smallest` and `largest` are eigenvalues of Ĝ, before `damping` is added; `condition` is that of the
    damped factor, infinite if it is singular or not positive. `asymmetry` is max|G − Gᵀ|/max|G|. `drift` is
    how far the stored root is from the factor of now. `refreshes`, `fallbacks` (the host took over),
    `failures` and `residual` (the last refresh's) are the session's; None where there is none, as for a
    checkpoint.
    """

    parameter: str
    exponent: float
    dim: int
    finite: bool
    smallest: float
    largest: float
    damping: float
    condition: float
    asymmetry: float
    drift: float
    refreshes: int | None = None
    fallbacks: int | None = None
    failures: int | None = None
    residual: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data; what is not finite is null."""
        data: dict[str, object] = dataclasses.asdict(self)
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in data.items()
        }


def root_health(
    items: Iterable[Item],
    checks: Sequence[RootCheck],
    states: Sequence[State],
    value: Callable[[str], np.ndarray],
    records: Mapping[str, RootRecord] | None = None,
) -> tuple[RootHealth, ...]:
    """Return the health of every root.

    `items` are the whole model's nodes, `value` returns a state by the name of its input. A table whose
    factor is made by nodes of another kind is left out.
    """
    nodes: dict[str, dict[str, onnx.NodeProto]] = {}
    dampers: dict[str, onnx.NodeProto] = {}
    wanted = {check.damping for check in checks}
    for item in items:
        site = next((entry.value for entry in item.node.metadata_props if entry.key == "kfac.site"), None)
        if item.node.domain == "ai.kfac" and site is not None:
            nodes.setdefault(site, {})[item.node.op_type] = item.node
        dampers.update({name: item.node for name in item.node.output if name in wanted})
    found: list[RootHealth] = []
    for check in checks:
        own = [state for state in states if state.parameter == check.parameter]
        root = next((state.input for state in own if state.role == "root"), None)
        damped = _damped(nodes.get(check.parameter, {}), dampers.get(check.damping), own, value)
        if damped is None or root is None:
            continue
        factor, damping = damped
        record = None if records is None else records.get(check.parameter)
        found.append(_measure(check, factor, damping, np.asarray(value(root), np.float64), record))
    return tuple(found)


def _attributes(node: onnx.NodeProto) -> dict[str, float]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _damped(
    nodes: Mapping[str, onnx.NodeProto],
    damper: onnx.NodeProto | None,
    states: Sequence[State],
    value: Callable[[str], np.ndarray],
) -> tuple[np.ndarray, float] | None:
    """Return Ĝ in float64 and its damping, as the model's operators make them from the states."""
    update = nodes.get("OutputFactorUpdate")
    if update is None or damper is None or damper.op_type not in ("DampingRelative", "DampingPi"):
        return None
    G = np.asarray(value(update.input[0]), np.float64)
    count = np.asarray(value(update.input[1]))
    debias = nodes.get("FactorDebias")
    factor = G if debias is None else G * _correction(_attributes(debias)["decay"], count)
    options = _attributes(damper)
    with np.errstate(all="ignore"):  # factors that are not finite are reported as such
        mean = np.trace(factor) / len(factor)
        if damper.op_type == "DampingRelative":
            return factor, float(options["rho"] * np.maximum(mean, _FLOOR))
        total = _total_counts(nodes.get("InputFactorDecay"), states, value)
        square = (total / options["vocab_size"]) / mean
        if options["pi"] == 0 or (options["pi"] == 2 and total * mean == 0):
            square = np.float64(1.0)
        return factor, float(np.sqrt(options["damping"] / square))


def _correction(decay: float, count: np.ndarray | int) -> float:
    """Return what undoes the pull towards the zeros that an average starts from."""
    return 1.0 / (1.0 - decay ** int(count)) if count > 0 else 1.0


def _total_counts(
    decay: onnx.NodeProto | None, states: Sequence[State], value: Callable[[str], np.ndarray]
) -> np.ndarray:
    """Return ΣA: from its running sum, from the whole vector, or 1 where the preset has no A."""
    if decay is not None:
        _, total, count = (np.asarray(value(name)) for name in decay.input[:3])
        options = _attributes(decay)
        return total * (_correction(options["decay"], max(int(count), 1)) if options["debias"] else 1.0)
    counts = next((state.input for state in states if state.input.endswith("/A")), None)
    return np.asarray(1.0 if counts is None else np.sum(value(counts), dtype=np.float64))


def _measure(
    check: RootCheck, factor: np.ndarray, damping: float, root: np.ndarray, record: RootRecord | None
) -> RootHealth:
    smallest = largest = condition = asymmetry = drift = math.nan
    finite = bool(np.isfinite(factor).all() and np.isfinite(root).all() and math.isfinite(damping))
    if finite:
        eye = np.eye(len(factor))
        M = (factor + factor.T) / 2 + damping * eye
        eigenvalues = np.linalg.eigvalsh(M)
        smallest, largest = float(eigenvalues[0]) - damping, float(eigenvalues[-1]) - damping
        condition = float(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else math.inf
        size = float(np.abs(factor).max())
        asymmetry = float(np.abs(factor - factor.T).max()) / size if size > 0 else 0.0
        product = M @ root if check.exponent == -1.0 else root @ M @ root
        drift = float(np.abs(product - eye).max())
    return RootHealth(
        parameter=check.parameter,
        exponent=check.exponent,
        dim=len(factor),
        finite=finite,
        smallest=smallest,
        largest=largest,
        damping=damping,
        condition=condition,
        asymmetry=asymmetry,
        drift=drift,
        refreshes=None if record is None else record.refreshes,
        fallbacks=None if record is None else record.fallbacks,
        failures=None if record is None else record.failures,
        residual=None if record is None else record.residual,
    )
