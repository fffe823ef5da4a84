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


def by_direction(step, x, weights, lengths, states, direction):
    """Run `step(x_t, states, weights)` over time as ONNX says; return Y and the last states."""
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    count, batch = x.shape[:2]
    ends = torch.full((batch,), count) if lengths is None else lengths
    every, last = [], []
    for place, reverse in enumerate(directions):
        own = [None if item is None else item[place] for item in weights]
        now = [item[place] for item in states]
        rows = [None] * count
        for t in reversed(range(count)) if reverse else range(count):
            on = (t < ends)[:, None]
            new = step(x[t], now, own)
            now = [torch.where(on, fresh, old) for fresh, old in zip(new, now, strict=True)]
            rows[t] = torch.where(on, new[0], torch.zeros_like(new[0]))
        every.append(torch.stack(rows))
        last.append(now)
    return (torch.stack(every, 1), *(torch.stack(items) for items in zip(*last, strict=True)))


def biases(bias, width):
    return (0, 0) if bias is None else bias.split(width)


def zeros(x, recurrent):
    return torch.zeros(recurrent.shape[0], x.shape[1], recurrent.shape[2], dtype=x.dtype)


def lstm(x, w, r, b=None, lengths=None, h0=None, c0=None, direction="forward"):
    def step(x, states, weights):
        (h, c), (w, r, b) = states, weights
        bw, br = biases(b, len(w))
        i, o, f, g = (x @ w.T + h @ r.T + bw + br).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    states = [zeros(x, r) if item is None else item for item in (h0, c0)]
    return by_direction(step, x, (w, r, b), lengths, states, direction)


def gru(x, w, r, b=None, lengths=None, h0=None, direction="forward", reset_last=False):
    def step(x, states, weights):
        (h,), (w, r, b) = states, weights
        bw, br = (item if b is None else item.chunk(3) for item in biases(b, len(w)))
        bw, br = ((0, 0, 0) if b is None else item for item in (bw, br))
        (wz, wr, wh), (rz, rr, rh) = w.chunk(3), r.chunk(3)
        z = torch.sigmoid(x @ wz.T + h @ rz.T + bw[0] + br[0])
        reset = torch.sigmoid(x @ wr.T + h @ rr.T + bw[1] + br[1])
        inner = reset * (h @ rh.T + br[2]) if reset_last else (reset * h) @ rh.T + br[2]
        n = torch.tanh(x @ wh.T + bw[2] + inner)
        return ((1 - z) * n + z * h,)

    state = zeros(x, r) if h0 is None else h0
    return by_direction(step, x, (w, r, b), lengths, [state], direction)


def rnn(x, w, r, b=None, lengths=None, h0=None, direction="forward", functions=("tanh", "tanh")):
    def step(x, states, weights):
        (h,), (w, r, b) = states, weights
        bw, br = biases(b, len(w))
        total = x @ w.T + h @ r.T + bw + br
        return (torch.relu(total) if functions[-1] == "relu" else torch.tanh(total),)

    state = zeros(x, r) if h0 is None else h0
    return by_direction(step, x, (w, r, b), lengths, [state], direction)


def rotary(x, cos, sin, interleaved=False):
    """Rotate pairs of X [B, heads, T, D] by angles with these cosines and sines [B, T, D/2]."""
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def scan(step, state, inputs, axis=0, out_axis=0, *, reverse=False, out_reverse=False):
    """Run `step(state, slice) -> (state, result)` over an axis; return the last state and the results."""
    results = []
    slices = list(inputs.unbind(axis))
    for part in slices[::-1] if reverse else slices:
        state, result = step(state, part)
        results.append(result)
    return state, torch.stack(results[::-1] if out_reverse else results, out_axis)


def scan_two(step, first, second, forward, backward):
    """As `scan`, for two states and two inputs, the second of which is read backwards."""
    results = []
    for one, other in zip(forward.unbind(0), backward.unbind(0)[::-1], strict=True):
        first, second, result = step(first, second, one, other)
        results.append(result)
    return first, second, torch.stack(results)


def doubled(state, factor, limit):
    """Multiply until the largest entry reaches the limit; return the last state and the squares before."""
    results = []
    while True:
        results.append(state * state)
        state = state * factor
        if state.max() >= limit:
            return state, torch.stack(results)


def nested(state, rows, factor):
    """Run a scan over each row, the state going on from row to row."""
    results = []
    for row in rows.unbind(0):
        state, parts = scan(lambda a, b: (a * factor - a * b, a * b * b), state, row)
        results.append(parts)
    return state, torch.stack(results)


def attention(q, k, v, mask=None, scale=None, causal=False, cap=0.0, heads=None):
    """Attention of ONNX; a row that attends to nothing gives 0."""
    if heads is not None:
        sides = (heads[0], heads[1], heads[1])
        q, k, v = (
            x.reshape(*x.shape[:2], n, -1).transpose(1, 2) for x, n in zip((q, k, v), sides, strict=True)
        )
    each = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    allowed = torch.ones(scores.shape, dtype=bool)
    if causal:
        allowed = allowed & torch.ones(scores.shape[2:], dtype=bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask
    top = scores.masked_fill(~allowed, -1e300).amax(-1, keepdim=True).detach()
    weight = torch.exp(torch.where(allowed, scores - top, 0)) * allowed
    total = weight.sum(-1, keepdim=True)
    y = weight / torch.where(total > 0, total, 1) @ v
    return y if heads is None else y.transpose(1, 2).flatten(2)
