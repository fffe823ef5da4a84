"""Checks of single operators: races, kernels, shapes, and operators that behave as in inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.canonical.race_free_scatters import provably_unique
from kfac_onnx.canonical.upgrade import OLDEST
from kfac_onnx.graph.operators import VIEWS, Trait, having
from kfac_onnx.graph.values import ONNX_DOMAINS, constant, int_attribute, label
from kfac_onnx.reports.checks.finding import Finding
from kfac_onnx.reports.checks.kernels import missing_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from kfac_onnx.reports.checks.subject import Subject

__all__ = ["inference_mode", "kernels", "old_opset", "racing_scatters", "shapes"]


def racing_scatters(subject: Subject) -> Iterator[Finding]:
    """Report reducing ScatterND nodes whose rows may repeat."""
    racing = [
        node
        for node in subject.nodes()
        if node.op_type == "ScatterND"
        and node.domain in ONNX_DOMAINS
        and "reduction" in node.attributes
        and node.attributes["reduction"].as_string() != "none"
        and not provably_unique(node)
        and not _made_unique(node.inputs[1])
    ]
    if racing:
        yield Finding(
            "racing-scatter",
            "warning",
            f"{_nodes(racing)} adds into rows that may repeat",
            tuple(map(label, racing)),
            "onnxruntime's CPU kernel of ScatterND adds rows without locks: with more than one thread, sums "
            "of repeated rows are lost, silently and not always",
            "`transform` rewrites them to ScatterElements; elsewhere run with intra_op_num_threads=1",
        )


def _made_unique(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in having(Trait.DISTINCT):
            return value is node.outputs[0]
        if node.op_type not in VIEWS:
            return False
        value = node.inputs[0]
    return False


def kernels(subject: Subject) -> Iterator[Finding]:
    """Report operators that plain onnxruntime does not run on the CPU."""
    missing = missing_kernels(subject.raw)
    if not missing:
        return
    error = subject.graph is None
    counts = ", ".join(f"{kind}: {len(nodes)}" for kind, nodes in sorted(missing.items()))
    yield Finding(
        "no-kernel",
        "error" if error else "note",
        f"the plain onnxruntime wheel has no CPU kernel for some nodes ({counts})",
        tuple(label(node) for nodes in missing.values() for node in nodes),
        "the exporter's file does not run there as it is",
        "export the model without these operators"
        if error
        else "none for training: `transform` replaces them by operators that have kernels",
    )


def old_opset(subject: Subject) -> Iterator[Finding]:
    """Report an opset that cannot be read."""
    if subject.opset < OLDEST:
        yield Finding(
            "old-opset",
            "error",
            f"the graph uses opset {subject.opset}",
            (),
            f"{OLDEST} is the oldest opset whose operators can be read",
            "export it again with opset 17 or newer",
        )


def shapes(subject: Subject) -> Iterator[Finding]:
    """Report matrix products whose inner dimensions cannot agree for every batch."""
    symbols = {_name(dim) for value in subject.raw.graph.inputs for dim in value.shape or ()} - {None}
    for node in subject.nodes():
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ONNX_DOMAINS:
            continue
        left, right = (value.shape if value is not None else None for value in node.inputs[:2])
        if left is None or right is None or min(len(left), len(right)) < 2:
            continue
        turned = [int_attribute(node, name, 0) for name in ("transA", "transB")]
        one, other = left[-2 if turned[0] else -1], right[-1 if turned[1] else -2]
        if isinstance(one, int) and isinstance(other, int):
            wrong = one != other
        else:
            names = {_name(one), _name(other)}
            wrong = (isinstance(one, int) or isinstance(other, int)) and bool(names & symbols)
        if wrong:
            yield Finding(
                "invalid-shapes",
                "error",
                f"{label(node)} multiplies {_dims(left)} by {_dims(right)}"
                + ("" if not any(turned) else f" with transA={turned[0]}, transB={turned[1]}"),
                (label(node),),
                f"the inner dimensions {one} and {other} differ: running it fails, or gives wrong gradients "
                "where they happen to agree",
                "a fault of the exporter: write this product with an explicit Transpose, or export with "
                "another version",
            )


def _name(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


def _dims(shape: ir.Shape) -> str:
    return "[" + ", ".join(str(dim) for dim in shape) + "]"


def inference_mode(subject: Subject) -> Iterator[Finding]:
    """Report dropout and batch normalization that a training graph runs as in inference."""
    facts = subject.facts
    if facts is None or not subject.trainable:
        return
    for node in subject.nodes():
        if node.op_type == "Dropout" and node.domain in ONNX_DOMAINS:
            if not _drops(node):
                yield Finding(
                    "inactive-dropout",
                    "warning",
                    f"{label(node)} does nothing: it is in inference mode",
                    (label(node),),
                    "the model trains without the dropout that it was written with",
                    "export in training mode (torch.onnx.export(..., training=TrainingMode.TRAINING))",
                )
        elif (
            node.op_type == "BatchNormalization"
            and node.domain in ONNX_DOMAINS
            and not int_attribute(node, "training_mode", 0)
            and _stored(node.inputs[3])
        ):
            yield Finding(
                "inference-batch-norm",
                "warning",
                f"{label(node)} normalizes by fixed statistics: it is in inference mode",
                (label(node),),
                "the statistics keep the values that they were exported with",
                "export in training mode (torch.onnx.export(..., training=TrainingMode.TRAINING))",
            )


def _stored(value: ir.Value | None) -> bool:
    """Say whether a value is a tensor that the file holds, or takes, and no result of the batch."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in VIEWS:
            return node.op_type == "Constant"
        value = node.inputs[0]
    return True


def _drops(node: ir.Node) -> bool:
    ratio = constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(0.5)
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    active = constant(mode)
    if ratio is not None and not np.any(ratio):
        return True  # a dropout of nothing was meant
    return mode is not None and (active is None or bool(np.any(active)))


def _nodes(nodes: list[ir.Node]) -> str:
    return label(nodes[0]) if len(nodes) == 1 else f"each of {len(nodes)} {nodes[0].op_type} nodes"
