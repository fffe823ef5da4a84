"""The operators' bodies as ONNX functions, and putting them into a model.

onnxscript (0.7 s) is imported only when a body is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.dialect.operators import DOMAIN, OPERATORS, VERSION
from kfac_onnx.dialect.stable import stabilize
from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from kfac_onnx.dialect.signature import Variant

__all__ = ["attach", "functions", "used_operators"]

LOWEST_OPSET: Final = 18
"""The opset that the bodies are written at."""


@functools.cache
def _proto(name: str, variant: Variant) -> onnx.FunctionProto:
    module_name, function_name = OPERATORS[name].bodies[variant]
    module = importlib.import_module(f"kfac_onnx.dialect.bodies.{module_name}")
    proto: onnx.FunctionProto = getattr(module, function_name).to_function_proto()
    proto.name = name
    proto.doc_string = OPERATORS[name].meaning
    stabilize(proto)
    return proto


def functions(variant: Variant, names: Iterable[str] | None = None) -> dict[str, ir.Function]:
    """Return fresh ONNX functions by operator name; all operators unless `names` are given."""
    chosen = OPERATORS if names is None else names
    return {name: ir.serde.deserialize_function(_proto(name, variant)) for name in chosen}


def used_operators(model: ir.Model) -> list[str]:
    """Return the sorted names of all `ai.kfac` operators in the model, subgraphs and functions included.

    Raises UserError for a name that the dialect does not have.
    """
    found: set[str] = set()
    bodies = [model.graph, *(function for function in model.functions.values() if function.domain != DOMAIN)]
    for body in bodies:
        for node in ir.traversal.RecursiveGraphIterator(body):
            if node.domain == DOMAIN:
                found.add(node.op_type)
    for name in sorted(found - OPERATORS.keys()):
        raise UserError(
            f"the model uses '{DOMAIN}::{name}', which does not exist{did_you_mean(name, OPERATORS)}"
        )
    return sorted(found)


def attach(model: ir.Model, variant: Variant) -> list[str]:
    """Give the model the bodies of the `ai.kfac` operators it uses; returns their names.

    Bodies that were attached before, of another variant too, are replaced; those no longer used are
    removed. Opset imports are set for the dialect and for what its bodies use. The bodies are declared
    at the model's own opset, which must be at least 18: ONNX's checker wants them equal, and from 18 to
    24 the standard operators that the bodies use only gained element types.

    Raises UserError for an operator that does not exist, or a model below opset 18.
    """
    names = used_operators(model)
    opset = model.graph.opset_imports.get("", LOWEST_OPSET)
    if names and opset < LOWEST_OPSET:
        raise UserError(f"the model is at opset {opset}, but '{DOMAIN}' needs {LOWEST_OPSET}")
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    for function in functions(variant, names).values():
        function.opset_imports[""] = opset
        model.functions[function.identifier()] = function
        for domain, version in function.opset_imports.items():
            if domain != "":
                model.graph.opset_imports.setdefault(domain, version)
    if names:
        model.graph.opset_imports[DOMAIN] = VERSION
    return names
