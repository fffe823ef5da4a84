"""What nodes of known operators must have: the schemas of ONNX, and those of others that the frontends read.

ONNX Runtime's training operators have no schema in the `onnx` package. Of these the table says how many
inputs must be there; their attributes have the types that attributes of the same names have in ONNX's own
operators.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, cast

import onnx

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["signature_problems"]

STANDARD: Final = ("", "ai.onnx")
MICROSOFT: Final = "com.microsoft"
OLDEST: Final = 13
"""Opset before which a graph is refused for its age; what else may be wrong with it does not matter."""
_NO_LIMIT: Final = 1 << 30

INPUTS: Final[dict[tuple[str, str], int]] = {
    **{
        (MICROSOFT, name): 2
        for name in (
            "TanhGrad",
            "SigmoidGrad",
            "ReluGrad",
            "LeakyReluGrad",
            "GeluGrad",
            "FastGeluGrad",
            "QuickGeluGrad",
            "BiasGeluGrad_dX",
            "BiasFastGeluGrad_dX",
            "SoftmaxGrad_13",
            "LogSoftmaxGrad_13",
            "SoftmaxGrad",
            "LogSoftmaxGrad",
            "SoftmaxCrossEntropyLossInternal",
            "SplitTraining",
            "Scale",
            "BroadcastGradientArgs",
            "DropoutGrad",
            "ReduceSumTraining",
            "BiasGelu",
            "FusedMatMul",
            "InPlaceAccumulatorV2",
        )
    },
    **{
        (MICROSOFT, name): 3
        for name in (
            "GatherGrad",
            "GatherNDGrad",
            "GatherElementsGrad",
            "ConvGrad",
            "DivGrad",
            "SoftmaxCrossEntropyLossGrad",
            "SoftmaxCrossEntropyLossInternalGrad",
            "LSTMTraining",
            "LSTMGrad",
            "GRUTraining",
            "GRUGrad",
            "SkipLayerNormalization",
        )
    },
    (MICROSOFT, "ConcatTraining"): 1,
    (MICROSOFT, "Gelu"): 1,
    (MICROSOFT, "FastGelu"): 1,
    (MICROSOFT, "QuickGelu"): 1,
    (MICROSOFT, "Inverse"): 1,
    (MICROSOFT, "YieldOp"): 1,
    (MICROSOFT, "SliceGrad"): 4,
    (MICROSOFT, "SimplifiedLayerNormalizationGrad"): 4,
    (MICROSOFT, "LayerNormalizationGrad"): 5,
    (MICROSOFT, "BatchNormInternal"): 5,
    (MICROSOFT, "BatchNormalizationGrad"): 5,
    ("", "MaxPoolGrad"): 2,
    ("", "AveragePoolGrad"): 1,
    ("", "SimplifiedLayerNormalization"): 2,
    ("org.pytorch.aten", "ATen"): 1,
}
"""Operator without a schema here -> how many of its first inputs must be there."""

ATTRIBUTES: Final = {
    "operator": onnx.AttributeProto.STRING,
    "output_type": onnx.AttributeProto.INT,
    "scale_down": onnx.AttributeProto.INT,
    "transBatchA": onnx.AttributeProto.INT,
    "transBatchB": onnx.AttributeProto.INT,
}
"""Attribute of these operators that ONNX's own have not -> its type."""

ATEN_INPUTS: Final = {b"embedding": 2, b"embedding_backward": 5}
"""Torch operator of an `ATen` node -> the same."""


def signature_problems(node: onnx.NodeProto, version: int) -> Iterator[str]:
    """Yield what a node of a known operator lacks or has too much, at a version of the standard operators."""
    domain = "" if node.domain in STANDARD else node.domain
    schema = None if domain else _schema(node.op_type, version)
    if schema is not None:
        yield from _schema_problems(node, schema)
        return
    needed = INPUTS.get((domain, node.op_type))
    if needed is None:
        return
    operator = next((item.s for item in node.attribute if item.name == "operator"), b"")
    needed = ATEN_INPUTS.get(operator, needed) if node.op_type == "ATen" else needed
    if len(node.input) < needed or not all(node.input[:needed]):
        yield f"lacks inputs: {needed} are needed"
    if not any(node.output):
        yield "has no output"
    types = _usual_types()
    for attribute in node.attribute:
        usual = types.get(attribute.name)
        if usual is not None and attribute.type != usual:
            yield _wrong_type(attribute.name, usual)


@functools.cache
def _schema(operator: str, version: int) -> onnx.defs.OpSchema | None:
    if not OLDEST <= version < 1 << 31:
        return None
    try:
        return onnx.defs.get_schema(operator, version, "")
    except onnx.defs.SchemaError:
        return None


def _schema_problems(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[str]:
    if not schema.min_input <= len(node.input) <= schema.max_input:
        yield f"has {len(node.input)} inputs, not {_range(schema.min_input, schema.max_input)}"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        yield f"has {len(node.output)} outputs, not {_range(schema.min_output, schema.max_output)}"
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for formal, name in zip(schema.inputs, node.input, strict=False):
        if formal.option == single and not name:
            yield f"lacks its input '{formal.name}'"
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, wanted in schema.attributes.items():
        attribute = given.get(name)
        if attribute is None:
            if wanted.required:
                yield f"lacks its attribute '{name}'"
        elif not attribute.ref_attr_name and attribute.type != _kind(wanted):
            yield _wrong_type(name, _kind(wanted))
    yield from _body_problems(node, given)


def _body_problems(node: onnx.NodeProto, given: dict[str, onnx.AttributeProto]) -> Iterator[str]:
    """Yield bodies with another number of inputs or outputs than their node calls for."""
    match node.op_type:
        case "If":
            for name in ("then_branch", "else_branch"):
                branch = given[name].g if name in given else None
                if branch is not None and (branch.input or len(branch.output) != len(node.output)):
                    yield f"needs a {name} without inputs and with {len(node.output)} outputs"
        case "Loop" if "body" in given:
            body, carried = given["body"].g, max(len(node.input) - 2, 0)
            fits = len(body.input) == carried + 2 and len(body.output) == len(node.output) + 1
            if not fits or len(node.output) < carried:
                yield "has a body that does not fit its inputs and outputs"
        case "Scan" if "body" in given:
            body = given["body"].g
            if len(body.input) != len(node.input) or len(body.output) != len(node.output):
                yield "has a body that does not fit its inputs and outputs"
        case _:
            return


@functools.cache
def _usual_types() -> dict[str, int]:
    """Return the attributes that have one type in all operators that have them, with that type."""
    found: dict[str, set[int]] = {name: {int(kind)} for name, kind in ATTRIBUTES.items()}
    for schema in onnx.defs.get_all_schemas_with_history():
        for name, attribute in schema.attributes.items():
            found.setdefault(name, set()).add(_kind(attribute))
    return {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}


def _kind(attribute: onnx.defs.OpSchema.Attribute) -> int:
    """Return the type that a schema gives an attribute, as the number that a file has for it."""
    value: int = cast("Any", attribute.type).value  # a nanobind enum, which the stubs do not declare as one
    return int(value)


def _wrong_type(name: str, kind: int) -> str:
    return f"has an attribute '{name}' that is not of type {onnx.AttributeProto.AttributeType.Name(kind)}"


def _range(least: int, most: int) -> str:
    if least == most:
        return str(least)
    return f"{least} or more" if most >= _NO_LIMIT else f"{least} to {most}"
