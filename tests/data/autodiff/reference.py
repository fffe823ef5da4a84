"""ONNX operators that PyTorch has not under their own semantics, written with PyTorch for `make.py`."""

from __future__ import annotations

import torch


def channels(x, vector):
    """Return a vector float[C] as float[C, 1, ...], which broadcasts over X float[B, C, ...]."""
    return vector.reshape(-1, *[1] * (x.dim() - 2))


def batch_norm(x, scale, bias, mean, variance, epsilon=1e-5):
    """Normalize by given statistics."""
    off = (x - channels(x, mean)) / torch.sqrt(channels(x, variance) + epsilon)
    return off * channels(x, scale) + channels(x, bias)


def group_norm(x, scale, bias, groups, epsilon=1e-5):
    rows = x.reshape(x.shape[0], groups, -1)
    off = rows - rows.mean(-1, keepdim=True)
    x_hat = (off / torch.sqrt((off * off).mean(-1, keepdim=True) + epsilon)).reshape(x.shape)
    return x_hat * channels(x, scale) + channels(x, bias)


def rms_norm(x, scale, axis=-1, epsilon=1e-5):
    axes = list(range(axis % x.dim(), x.dim()))
    return x / torch.sqrt((x * x).mean(axes, keepdim=True) + epsilon) * scale


def layer_norm(x, scale, bias=None, axis=-1, epsilon=1e-5):
    axes = list(range(axis % x.dim(), x.dim()))
    off = x - x.mean(axes, keepdim=True)
    y = off / torch.sqrt((off * off).mean(axes, keepdim=True) + epsilon) * scale
    return y if bias is None else y + bias


def mvn(x, axes=(0, 2, 3)):
    off = x - x.mean(axes, keepdim=True)
    return off / (torch.sqrt((off * off).mean(axes, keepdim=True)) + 1e-9)


def lrn(x, size, alpha=1e-4, beta=0.75, bias=1.0):
    count = x.shape[1]
    near = [x[:, max(c - (size - 1) // 2, 0) : c + size // 2 + 1] for c in range(count)]
    base = torch.stack([bias + alpha / size * (part * part).sum(1) for part in near], 1)
    return x / base**beta


def product(x, axes, keep):
    """Return the product over several axes."""
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x
