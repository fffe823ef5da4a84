"""Splitting one damping λ between the two factors.

    pi = √((ΣA/V)/(tr G/D)),  λ_A = √λ·pi,  λ_G = √λ/pi

Source: spec section 1; Martens & Grosse 2015, section 6.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.graph.symbols import apply, call, constant

if TYPE_CHECKING:
    from kfac_onnx.fisher.input_factor import EmbeddingInputKroneckerFactor
    from kfac_onnx.fisher.output_factor import FullyConnectedKroneckerFactor
    from kfac_onnx.fisher.settings import FactorSettings

__all__ = ["split_damping", "trace_ratio"]

_MODES: Final = {"off": 0, "tracenorm": 1, "guarded": 2}


def _pi(
    A: EmbeddingInputKroneckerFactor,
    G: FullyConnectedKroneckerFactor,
    damping: float,
    settings: FactorSettings,
) -> tuple[ir.Value, ir.Value]:
    damping_a, damping_g = apply(
        "DampingPi",
        A.total(),
        G.get_cov_var(),
        damping=damping,
        vocab_size=A.vocab_size,
        pi=_MODES[settings.pi],
    )
    return damping_a, damping_g


def trace_ratio(
    A: EmbeddingInputKroneckerFactor, G: FullyConnectedKroneckerFactor, settings: FactorSettings
) -> ir.Value:
    """Return pi, float32 scalar."""
    return _pi(A, G, 1.0, settings)[0]


def split_damping(
    A: EmbeddingInputKroneckerFactor,
    G: FullyConnectedKroneckerFactor,
    damping: float | ir.Value,
    num_uses: float,
    settings: FactorSettings,
) -> tuple[ir.Value, ir.Value]:
    """Return λ_A and λ_G, live float32 scalars; λ is a number or a scalar tensor, shared by the uses."""
    if not isinstance(damping, ir.Value):
        return _pi(A, G, damping / num_uses, settings)
    ratio, inverse_ratio = _pi(A, G, 1.0, settings)
    shared = call("Div", call("Cast", damping, to=int(ir.DataType.FLOAT)), constant(num_uses))
    root = call("Sqrt", shared)
    return call("Mul", root, ratio), call("Mul", root, inverse_ratio)
