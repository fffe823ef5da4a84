"""Gradients of normalizations.

X is the input, x̂ = (X − mean) inverse with inverse = 1/√(variance + epsilon) over some axes, Y = x̂ scale +
bias, dY the gradient of Y. With g = dY scale:

    dX = inverse (g − mean(g) − x̂ mean(g x̂)),  dscale = Σ dY x̂,  dbias = Σ dY.

Saved statistics are not used: operators save them in float32 whatever their type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kfac_onnx.autodiff.working import Working, float_attribute
from kfac_onnx.canonical.lowering.normalization import normalized_axes, normalized_gradient
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import int_attribute, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]


@dataclass(frozen=True)
class _Standardized:
    """x̂ of one node, 1/√(variance + epsilon), and the axes of both means."""

    x_hat: ir.Value
    inverse: ir.Value
    along: ir.Value

    def gradient(self, work: Working, g: ir.Value, *, centred: bool = True) -> ir.Value:
        """Return dX from the gradient of x̂."""
        return normalized_gradient(work.emit, g, self.x_hat, self.inverse, self.along, centred=centred)


def _standardize(
    work: Working, x: ir.Value, along: ir.Value, epsilon: float, *, centred: bool = True
) -> _Standardized:
    """Return x̂ and what it is made with, from X in the working type."""
    emit = work.emit
    off = x
    if centred:
        off = emit.op("Sub", x, emit.op("ReduceMean", x, along, keepdims=1))
    spread = emit.op("ReduceMean", emit.op("Mul", off, off), along, keepdims=1)
    inverse = emit.op("Reciprocal", emit.op("Sqrt", emit.op("Add", spread, work.number(epsilon))))
    return _Standardized(emit.op("Mul", off, inverse), inverse, along)


def _unread(back: Backward, what: str, *outputs: int) -> Miss | None:
    """Return why not, where the loss depends on an output of saved statistics."""
    if any(back.grad(index) is not None for index in outputs):
        return Miss(f"the loss depends on its {what}, which is not supported")
    return None


def layer_normalization(back: Backward) -> Gradients:
    """LayerNormalization(X, scale, bias; axis=−1, epsilon=1e-5) -> Y, mean, inverse."""
    unread = _unread(back, "saved mean or deviation", 1, 2)
    return unread or _trailing(back, back.x(0), (1, 2), 1e-5, back.y(0))


def rms_normalization(back: Backward) -> Gradients:
    """RMSNormalization(X, scale; axis=−1, epsilon=1e-5): x̂ = X inverse, variance = mean of X²."""
    unread = _unread(back, "saved deviation", 1)
    return unread or _trailing(back, back.x(0), (1, None), 1e-5, back.y(0), centred=False)


def skip_layer_normalization(back: Backward) -> Gradients:
    """com.microsoft SkipLayerNormalization(X, skip, scale, beta, bias) -> Y, -, -, X + skip + bias."""
    return _skip(back, scale=2, shift=3, bias=4)


def skip_simplified(back: Backward) -> Gradients:
    """com.microsoft SkipSimplifiedLayerNormalization(X, skip, scale, bias) -> Y, -, -, X + skip + bias."""
    return _skip(back, scale=2, shift=None, bias=3)


def _skip(back: Backward, *, scale: int, shift: int | None, bias: int) -> Gradients:
    unread = _unread(back, "saved mean or deviation", 1, 2)
    if unread is not None:
        return unread
    added = (0, 1, bias)
    terms = [value for index in added if (value := back.input(index)) is not None]
    total = terms[0]
    for term in terms[1:]:
        total = back.emit.op("Add", total, term)
    results: list[ir.Value | None] = [None] * len(back.node.inputs)
    through = back.grad(3)
    if back.grad(0) is not None:
        found = _trailing(back, total, (scale, shift), 1e-12, back.x(0), centred=shift is not None)
        if isinstance(found, Miss):
            return found
        results = [*found, *results[len(found) :]]
        if through is None:
            through = found[0]
        elif found[0] is not None:
            through = back.emit.op("Add", found[0], through)
    for index in added:
        value = back.input(index)
        results_here = None
        if value is not None and through is not None and back.needs(index):
            results_here = back.reduce_to(through, value, shaped_as=back.x(0))
        if index < len(results):
            results[index] = results_here
    return results


def _trailing(
    back: Backward,
    x: ir.Value,
    places: tuple[int, int | None],
    epsilon: float,
    like: ir.Value,
    *,
    centred: bool = True,
) -> Gradients:
    """Return the gradients of a normalization over the axes from `axis` on, dX at input 0.

    `places` are the inputs of scale and bias; `like` has the shape of X.
    """
    node, scale_at, bias_at = back.node, *places
    scale = back.x(scale_at)
    axes = normalized_axes(node, like, scale)
    if axes is None:
        return Miss("the rank of its input is unknown")
    work = Working.of(back, back.x(0))
    dy, data = work.up(back.dy), work.up(x)
    own = back.dtype(scale)
    along = work.emit.ints(*axes)
    found = _standardize(work, data, along, float_attribute(node, "epsilon", epsilon), centred=centred)
    results: list[ir.Value | None] = [None] * max(len(node.inputs), 3)
    g = work.emit.op("Mul", dy, work.up(scale, own))
    results[0] = work.down(found.gradient(work, g, centred=centred))
    if back.needs(scale_at):
        part = back.reduce_to(work.emit.op("Mul", dy, found.x_hat), scale, shaped_as=like)
        results[scale_at] = work.down(part, own)
    bias = None if bias_at is None else back.input(bias_at)
    if bias is not None and bias_at is not None and back.needs(bias_at):
        results[bias_at] = work.down(back.reduce_to(dy, bias, shaped_as=like), back.dtype(bias))
    return results


def batch_normalization(back: Backward) -> Gradients:
    """BatchNormalization(X, scale, bias, mean, var; training_mode=0, epsilon=1e-5) -> Y, new mean, new var.

    In training mode the statistics are those of the batch; otherwise x̂ is linear in X: dX = dY scale
    inverse, dmean = −Σ dX, dvar = −Σ dY scale x̂ inverse² / 2.
    """
    unread = _unread(back, "running statistics", 1, 2)
    if unread is not None:
        return unread
    emit, x, scale = back.emit, back.x(0), back.x(1)
    work, own = Working.of(back, x), back.dtype(scale)
    columns, over, spread = emit.ints(0, 0, -1), emit.ints(0, 2), emit.ints(-1, 1)
    dy, data = (emit.op("Reshape", work.up(item), columns) for item in (back.dy, x))
    gain = emit.op("Reshape", work.up(scale, own), spread)
    g = emit.op("Mul", dy, gain)
    epsilon = float_attribute(back.node, "epsilon", 1e-5)
    results: list[ir.Value | None] = [None] * 5
    if int_attribute(back.node, "training_mode", 0):
        found = _standardize(work, data, over, epsilon)
        dx = found.gradient(work, g)
    else:
        mean, variance = (work.up(back.x(index), back.dtype(back.x(index))) for index in (3, 4))
        root = emit.op("Sqrt", emit.op("Add", emit.op("Reshape", variance, spread), work.number(epsilon)))
        inverse = emit.op("Reciprocal", root)
        off = emit.op("Sub", data, emit.op("Reshape", mean, spread))
        found = _Standardized(emit.op("Mul", off, inverse), inverse, over)
        dx = emit.op("Mul", g, inverse)
        if back.needs(3):
            total = emit.op("Neg", emit.op("ReduceSum", dx, over, keepdims=0))
            results[3] = work.down(total, back.dtype(mean))
        if back.needs(4):
            part = emit.op("Mul", emit.op("Mul", dx, found.x_hat), emit.op("Mul", inverse, work.number(-0.5)))
            results[4] = work.down(emit.op("ReduceSum", part, over, keepdims=0), back.dtype(variance))
    results[0] = work.down(emit.op("Reshape", dx, emit.shape(x)))
    if back.needs(1):
        part = emit.op("ReduceSum", emit.op("Mul", dy, found.x_hat), over, keepdims=0)
        results[1] = work.down(part, own)
    if back.needs(2):
        results[2] = work.down(emit.op("ReduceSum", dy, over, keepdims=0), back.dtype(back.x(2)))
    return results


def instance_normalization(back: Backward) -> Gradients:
    """InstanceNormalization(X, scale, bias; epsilon=1e-5): every channel of every example by itself."""
    return _by_groups(back, groups=0, scales=0)


def group_normalization(back: Backward) -> Gradients:
    """GroupNormalization(X, scale, bias; num_groups, epsilon=1e-5): groups of channels of an example.

    Before opset 21, scale and bias have an entry per group, from then on one per channel.
    """
    groups = back.node.attributes["num_groups"].as_int()
    known = static_shape(back.x(1))
    opset = back.names.model.opset_imports.get("", 0)
    per_group = opset < 21 if known is None else known == (groups,)  # where both fit they are the same
    return _by_groups(back, groups=groups, scales=groups if per_group else 0)


def _by_groups(back: Backward, *, groups: int, scales: int) -> Gradients:
    """Return the gradients where x̂ is made by `groups` and scaled by `scales`; 0 means each channel."""
    emit, x, scale = back.emit, back.x(0), back.x(1)
    work, own = Working.of(back, x), back.dtype(scale)
    by_scale = emit.ints(0, scales, -1)
    data = emit.op("Reshape", work.up(x), emit.ints(0, groups, -1))
    dy = emit.op("Reshape", work.up(back.dy), by_scale)
    gain = emit.op("Reshape", work.up(scale, own), emit.ints(-1, 1))
    found = _standardize(work, data, emit.ints(2), float_attribute(back.node, "epsilon", 1e-5))
    g = emit.op("Mul", dy, gain)
    x_hat = found.x_hat
    if groups != scales:
        g = emit.op("Reshape", g, emit.ints(0, groups, -1))
        x_hat = emit.op("Reshape", x_hat, emit.op("Shape", dy))
    dx = work.down(emit.op("Reshape", found.gradient(work, g), emit.shape(x)))
    over = emit.ints(0, 2)
    results: list[ir.Value | None] = [dx, None, None]
    if back.needs(1):
        part = emit.op("ReduceSum", emit.op("Mul", dy, x_hat), over, keepdims=0)
        results[1] = work.down(part, own)
    if back.needs(2):
        results[2] = work.down(emit.op("ReduceSum", dy, over, keepdims=0), back.dtype(back.x(2)))
    return results


def lp_normalization(back: Backward) -> Gradients:
    """LpNormalization(X; axis=−1, p=2) = X / n: dX = (dY − s Σ dY Y) / n, s = Y (p=2) or sign X (p=1).

    0 where n is 0.
    """
    emit, x = back.emit, back.x()
    work = Working.of(back, x)
    order = int_attribute(back.node, "p", 2)
    along = emit.ints(int_attribute(back.node, "axis", -1))
    dy, data, y = work.up(back.dy), work.up(x), work.up(back.y())
    norm = emit.op("ReduceL2" if order == 2 else "ReduceL1", data, along, keepdims=1)
    slope = y if order == 2 else emit.op("Sign", data)
    aligned = emit.op("ReduceSum", emit.op("Mul", dy, y), along, keepdims=1)
    inner = emit.op("Div", emit.op("Sub", dy, emit.op("Mul", slope, aligned)), norm)
    zero = work.number(0)
    return [work.down(emit.op("Where", emit.op("Equal", norm, zero), zero, inner))]


def mean_variance_normalization(back: Backward) -> Gradients:
    """MeanVarianceNormalization(X; axes=0,2,3) = (X − mean) / (s + 1e-9), s = √variance.

    dX = (dY − mean(dY) − (X − mean)/s mean(dY Y)) / (s + 1e-9), the third term 0 where s is 0.
    """
    emit, x = back.emit, back.x()
    work = Working.of(back, x)
    given = back.node.attributes.get("axes")
    along = emit.ints(*((0, 2, 3) if given is None else given.as_ints()))
    dy, data, y = work.up(back.dy), work.up(x), work.up(back.y())
    off = emit.op("Sub", data, emit.op("ReduceMean", data, along, keepdims=1))
    root = emit.op("Sqrt", emit.op("ReduceMean", emit.op("Mul", off, off), along, keepdims=1))
    zero = work.number(0)
    x_hat = emit.op("Where", emit.op("Equal", root, zero), zero, emit.op("Div", off, root))
    shared = emit.op("ReduceMean", emit.op("Mul", dy, y), along, keepdims=1)
    inner = emit.op("Sub", dy, emit.op("ReduceMean", dy, along, keepdims=1))
    inner = emit.op("Sub", inner, emit.op("Mul", x_hat, shared))
    return [work.down(emit.op("Div", inner, emit.op("Add", root, work.number(1e-9))))]


def local_response_normalization(back: Backward) -> Gradients:
    """LRN(X; size, alpha=1e-4, beta=0.75, bias=1) = X S^−beta, S = bias + alpha/size Σ X² over near channels.

    dX = dY S^−beta − 2 alpha beta/size X Σ dY X S^(−beta−1), summed over the channels that X is near to.
    """
    emit, x, node = back.emit, back.x(), back.node
    work = Working.of(back, x)
    size = node.attributes["size"].as_int()
    alpha, beta = float_attribute(node, "alpha", 1e-4), float_attribute(node, "beta", 0.75)
    before, after = (size - 1) // 2, size // 2
    shape = emit.shape(x)
    flat = emit.concat(emit.part(shape, 0, 1), emit.ints(1), emit.part(shape, 1, 2), emit.ints(-1))

    def near(value: ir.Value, pads: tuple[int, int]) -> ir.Value:
        """Return alpha/size times the sum over `size` channels around each."""
        mean = emit.op(
            "AveragePool",
            value,
            kernel_shape=(size, 1),
            pads=(pads[0], 0, pads[1], 0),
            count_include_pad=1,
        )
        return emit.op("Mul", mean, work.number(alpha))

    data, dy = (emit.op("Reshape", work.up(item), flat) for item in (x, back.dy))
    base = emit.op(
        "Add",
        near(emit.op("Mul", data, data), (before, after)),
        work.number(float_attribute(node, "bias", 1.0)),
    )
    scaled = emit.op("Mul", dy, emit.op("Pow", base, work.number(-beta)))
    passed = near(emit.op("Div", emit.op("Mul", scaled, data), base), (after, before))
    through = emit.op("Mul", emit.op("Mul", data, passed), work.number(2 * beta))
    return [work.down(emit.op("Reshape", emit.op("Sub", scaled, through), shape))]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response_normalization,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
    "SimplifiedLayerNormalization": rms_normalization,
    ("com.microsoft", "SkipLayerNormalization"): skip_layer_normalization,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): skip_simplified,
}
