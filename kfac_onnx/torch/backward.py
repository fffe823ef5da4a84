"""Operators of joint graphs that PyTorch's ONNX exporter lacks or gets wrong, as operators that it has.

`rewrite_backward` puts them into a joint graph before that is exported. Shapes: X [B, C, *L],
W [O, C/groups, *K], dY [B, O, *L'] for one or more spatial axes, of static lengths. Imports PyTorch, so only
`torch_joint` may import it.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportInvalidTypeForm=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["rewrite_backward"]


def rewrite_backward(graph: torch.fx.GraphModule) -> None:
    """Replace every operator of `BACKWARD` in a graph, in place; the next export traces the functions."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in BACKWARD:
            node.target = BACKWARD[node.target]
    graph.recompile()


def empty_permuted(size: Sequence[int], physical_layout: Sequence[int], **options: Any) -> torch.Tensor:
    """Return a tensor whose entries nobody reads; ONNX has no memory layouts."""
    del physical_layout
    return torch.zeros(size, dtype=options.get("dtype"))


def convolution_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return dX, dW and dbias, None where `output_mask` is false.

    dX is the transposed convolution of dY with W; dW convolves X with dY as its kernel, where batch and
    channels, stride and dilation have changed places.
    """
    del bias_sizes, output_padding
    if transposed:
        raise UserError(
            "the gradient of a transposed convolution cannot be exported",
            help="write it as an interpolation and a convolution",
        )
    kernel = list(weight.shape[2:])
    dx = dw = None
    if output_mask[0]:
        left = [
            (length + 2 * pad - step * (size - 1) - 1) % each
            for length, pad, step, size, each in zip(
                x.shape[2:], padding, dilation, kernel, stride, strict=True
            )
        ]
        dx = torch.ops.aten.convolution(grad, weight, None, stride, padding, dilation, True, left, groups)
    if output_mask[1]:
        none = [0] * len(kernel)
        parts = [
            torch.ops.aten.convolution(
                data.transpose(0, 1),
                upstream.transpose(0, 1),
                None,
                dilation,
                padding,
                stride,
                False,
                none,
                1,
            ).transpose(0, 1)
            for data, upstream in zip(x.chunk(groups, 1), grad.chunk(groups, 1), strict=True)
        ]
        dw = parts[0] if groups == 1 else torch.cat(parts)
        for axis, size in enumerate(kernel):
            dw = dw.narrow(axis + 2, 0, size)
    axes = [0, *range(2, grad.ndim)]
    return dx, dw, grad.sum(axes) if output_mask[2] else None


def avg_pool2d_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> torch.Tensor:
    """Return dX: every entry of a window gets dY divided by the number of the window's entries."""
    if ceil_mode:
        raise UserError(
            "the gradient of an average pooling with ceil_mode cannot be exported",
            help="pad the input instead",
        )
    height, width = x.shape[-2:]
    steps = list(stride) or list(kernel_size)
    ones = torch.ones(1, 1, *kernel_size, dtype=x.dtype)
    if divisor_override is not None:
        share = grad / divisor_override
    elif count_include_pad or not any(padding):
        share = grad / (kernel_size[0] * kernel_size[1])
    else:
        share = grad / functional.conv2d(torch.ones(1, 1, height, width), ones, stride=steps, padding=padding)
    left = [
        (length + 2 * pad - size) % step
        for length, pad, size, step in zip((height, width), padding, kernel_size, steps, strict=True)
    ]
    single = share.reshape(-1, 1, *grad.shape[-2:])
    return functional.conv_transpose2d(
        single, ones, stride=steps, padding=padding, output_padding=left
    ).reshape(x.shape)


def max_pool2d_with_indices_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Return dX: zeros with dY added at each window's largest entry, which `indices` counts per plane."""
    del kernel_size, stride, padding, dilation, ceil_mode
    flat = torch.zeros_like(x).flatten(-2)
    return flat.scatter_add(-1, indices.flatten(-2), grad.flatten(-2)).reshape(x.shape)


def copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Return `source` in the shape and type of `into`, whose entries it replaces: `x[:, 0] = 3`.

    The exporter's own form returns the source as it is, a graph of wrong ranks where it is to be broadcast.
    """
    del non_blocking
    return source.to(into.dtype).expand(into.shape)


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Return Y, mean and 1/√(variance + eps) that normalized X, and both running statistics after the step.

    Running statistics move by `momentum` towards the batch's mean and unbiased variance (Ioffe & Szegedy
    2015, algorithms 1 and 2, https://arxiv.org/abs/1502.03167). The exporter's own form is ONNX's operator in
    inference mode, of the statistics that were exported.
    """
    if not training:
        return *_normalized(x, weight, bias, running_mean, running_var, eps), running_mean, running_var
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean = x.mean(axes)
    variance = (x - _spread(mean, x)).square().mean(axes)
    examples = x.numel() // x.shape[1]
    unbiased = variance * (examples / (examples - 1))
    return (
        *_normalized(x, weight, bias, mean, variance, eps),
        running_mean * (1 - momentum) + mean.to(running_mean.dtype) * momentum,
        running_var * (1 - momentum) + unbiased.to(running_var.dtype) * momentum,
    )


def batch_norm_without_statistics(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Return Y, and mean and 1/√(variance + eps) of the batch."""
    del training, momentum
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean = x.mean(axes)
    return _normalized(x, weight, bias, mean, (x - _spread(mean, x)).square().mean(axes), eps)


def _spread(statistic: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return statistic.reshape([1, -1, *[1] * (x.ndim - 2)])


def _normalized(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inverse = (variance + eps).rsqrt()
    y = (x - _spread(mean, x)) * _spread(inverse, x)
    if weight is not None:
        y = y * _spread(weight, x)
    if bias is not None:
        y = y + _spread(bias, x)
    return y.to(x.dtype), mean, inverse


def weight_norm_backward(
    grad: torch.Tensor, v: torch.Tensor, g: torch.Tensor, norms: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dv and dg of w = g v/|v|, norms over all axes but `dim`.

    dg = Σ dw v/|v|, dv = g/|v| (dw − v/|v| dg) (Salimans & Kingma 2016, section 2,
    https://arxiv.org/abs/1602.07868).
    """
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    direction = v / norms
    dg = (grad * direction).sum(axes, keepdim=True)
    return g / norms * (grad - direction * dg), dg


BACKWARD: dict[Any, Callable[..., Any]] = {
    # The trace decided that a view is possible by the strides that it saw; the next one may see others.
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.copy.default: copy,
    torch.ops.aten._native_batch_norm_legit_functional.default: batch_norm,
    torch.ops.aten._native_batch_norm_legit.no_stats: batch_norm_without_statistics,
    torch.ops.aten._weight_norm_interface_backward.default: weight_norm_backward,
    torch.ops.aten.empty_permuted.default: empty_permuted,
    torch.ops.aten.convolution_backward.default: convolution_backward,
    torch.ops.aten.avg_pool2d_backward.default: avg_pool2d_backward,
    torch.ops.aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
}
"""Operator -> what to trace in its place."""
