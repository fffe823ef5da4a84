"""Signs of a `detach` that an exporter of forward models leaves out: ONNX has no operator for it.

A straight-through estimator is written h + (q − h).detach(): its value is q, its gradient that of h. Without
the detach h cancels, its gradient is zero and q's takes its place, which nobody would write. Sources: Bengio
et al. 2013 (https://arxiv.org/abs/1308.3432), van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.values import constant, is_float, unchanged

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

__all__ = ["KEPT_DETACH", "cancelled"]

KEPT_DETACH: Final = (
    "export the training graph instead (kfac_onnx.torch.export_training_graph), which keeps what is detached"
)


def cancelled(nodes: Iterable[ir.Node]) -> list[tuple[ir.Node, ir.Value]]:
    """Return the nodes that add to a value what it was just subtracted from, with that value.

    These are h + (q − h) and (q + h) − h, in either order of their sums. Constants do not count.
    """
    pairs: list[tuple[ir.Node, ir.Value]] = []
    for node in nodes:
        if node.op_type not in ("Add", "Sub") or node.domain or len(node.inputs) != 2:
            continue
        first, second = (None if value is None else unchanged(value) for value in node.inputs)
        if first is None or second is None:
            continue
        ways = [(first, second)]  # (what the other operator made, h)
        if node.op_type == "Add":
            ways.append((second, first))
        inverse = "Sub" if node.op_type == "Add" else "Add"
        for made, h in ways:
            maker = made.producer()
            if maker is None or maker.op_type != inverse or maker.domain:
                continue
            taken = [unchanged(value) for value in maker.inputs if value is not None]
            if inverse == "Sub":
                taken = taken[1:]
            if h in taken and is_float(h) and constant(h) is None:
                pairs.append((node, h))
                break
    return pairs
