"""The dialect `ai.kfac`, version 1: each operator an ONNX function with a standard body.

Any ONNX tool shows an operator as one node, and any runtime inlines its body. `OPERATORS` lists them,
`functions` returns their bodies, `attach` puts those that a model uses into it, `verify_node` checks a node.
"""

from __future__ import annotations

from kfac_onnx.dialect.library import attach, functions, used_operators
from kfac_onnx.dialect.operators import DOMAIN, OPERATORS, VERSION
from kfac_onnx.dialect.signature import Attribute, Cost, Operator, Port, Sizes, Variant
from kfac_onnx.dialect.verify import verify_node

__all__ = [
    "DOMAIN",
    "OPERATORS",
    "VERSION",
    "Attribute",
    "Cost",
    "Operator",
    "Port",
    "Sizes",
    "Variant",
    "attach",
    "functions",
    "used_operators",
    "verify_node",
]
