"""The straight-through derivative of numbers that are rounded for a quantized model (QAT).

QuantizeLinear rounds x / s to an integer and DequantizeLinear scales it back, so the derivative is zero
wherever it exists. The usual estimate takes the pair for the identity where nothing was cut off, and for a
constant where it was:

    y = s·(clip(round(x/s) + z, least, most) − z),      dx = dy where least ≤ round(x/s) + z ≤ most, else 0

Source: Bengio, Léonard & Courville, Estimating or propagating gradients through stochastic neurons, 2013,
sec. 4 (https://arxiv.org/abs/1308.3432); the cut-off as in torch.fake_quantize_per_tensor_affine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import dtype_of, int_attribute, rank_of

if TYPE_CHECKING:
    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["DOMAIN", "PAIR", "RULES"]

DOMAIN: Final = "ai.kfac.autodiff"
PAIR: Final = "QuantizeDequantize"
LIMITS: Final = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
}
"""Element type -> the least and the most integer."""


def quantize_dequantize(back: Backward) -> Gradients:
    """QuantizeDequantize(x, scale, zero; axis, to): dx = dy where round(x/scale) + zero is not cut off."""
    if back.needs(1):
        return Miss("its scale is trained, which is not supported")
    limits = LIMITS.get(ir.DataType(int_attribute(back.node, "to", int(ir.DataType.UINT8))))
    rank = rank_of(back.x(0))
    if limits is None or rank is None:
        return Miss("its element type, or the number of dimensions of its input, is unknown")
    emit, work = back.emit, ir.DataType.FLOAT
    spread = [axis for axis in range(rank) if axis != int_attribute(back.node, "axis", 1) % max(rank, 1)]

    def placed(value: ir.Value) -> ir.Value:
        wide = emit.cast(value, work, dtype_of(value))
        return emit.op("Unsqueeze", wide, emit.ints(*spread)) if rank_of(value) and spread else wide

    level = emit.op(
        "Round", emit.op("Div", emit.cast(back.x(0), work, back.dtype(back.x(0))), placed(back.x(1)))
    )
    zero = back.input(2)
    if zero is not None:
        level = emit.op("Add", level, placed(zero))
    least, most = (emit.scalar(limit, work) for limit in limits)
    inside = emit.op("And", emit.op("GreaterOrEqual", level, least), emit.op("LessOrEqual", level, most))
    return [emit.op("Where", inside, back.dy, back.number(0.0)), None, None]


RULES: Final[dict[str | tuple[str, str], Rule]] = {(DOMAIN, PAIR): quantize_dequantize}
