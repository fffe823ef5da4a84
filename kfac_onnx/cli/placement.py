"""How `inspect --provider` shows where the nodes of a step run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from kfac_onnx.cli.output import print_table, say
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from kfac_onnx.device.placement import Copy, Node, Placement
    from kfac_onnx.device.providers import Provider

__all__ = ["placement_of", "print_placement"]


def placement_of(model: ir.Model, provider: Provider) -> tuple[Placement, str | None]:
    """Return where the stages of a step run with a provider, and why that is only predicted, or None.

    Raises UserError where the provider does not work here and there is no table of its kernels.
    """
    from kfac_onnx.device.placement import cuda_kernels, measure, predict
    from kfac_onnx.step.plan import partition

    stages = [(stage.name, stage.model) for stage in partition(model, sequential=False).stages]
    name = provider if isinstance(provider, str) else provider[0]
    try:
        return measure(stages, provider), None
    except UserError as e:
        if name != cuda_kernels().provider or "cannot open the stage" in e.message:
            raise
        return predict(stages), e.message


def print_placement(placement: Placement, why: str | None) -> None:
    """Print which provider runs the inserted operators, what falls back and why, and what is copied."""
    how = (
        f"as onnxruntime {placement.onnxruntime} places it here"
        if why is None
        else f"predicted from the kernels of onnxruntime {placement.onnxruntime}: {why}"
    )
    say(f"placement with {placement.provider}, {how}")
    rows = sorted(
        (
            (node.stage, node.operator or "standard operators", node.provider)
            for node in placement.nodes
            if node.inserted
        ),
        key=lambda row: row[0],
    )
    counted = [(*key, len(list(group))) for key, group in itertools.groupby(sorted(rows))]
    print_table("Inserted operators", ["stage", "operator", "provider", "nodes "], counted)
    _print_nodes("Inserted operators that fall back to the host", placement.fallbacks)
    _print_copies("Copied in each step because of inserted operators", placement.own_copies)
    _print_nodes("Operators of the graph itself that fall back to the host", placement.user_fallbacks)
    _print_copies("Copied in each step because of the graph itself", placement.user_copies)
    say(_summary(placement))


def _print_nodes(title: str, nodes: Iterable[Node]) -> None:
    rows = [(node.stage, node.name, node.operator or node.op_type, node.reason) for node in nodes]
    if rows:
        print_table(title, ["stage", "node", "operator", "why"], rows)


def _print_copies(title: str, copies: Iterable[Copy]) -> None:
    rows = [(copy.stage, copy.value, copy.direction, ", ".join(copy.because) or None) for copy in copies]
    if rows:
        print_table(title, ["stage", "value", "where", "because of"], rows)


def _summary(placement: Placement) -> str:
    away, copied = len(placement.fallbacks), len(placement.own_copies)
    if not away and not copied:
        return "nothing that was inserted falls back to the host or makes a step copy a value"
    advice = "a model made with `transform --target cuda` has operators for it"
    return f"inserted: {away} nodes fall back to the host, {copied} values are copied in each step; {advice}"
