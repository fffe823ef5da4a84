"""Small modules of the structure of well-known models, each with its loss inside; plain PyTorch.

`KINDS` maps a name to (module, batch of a size, options of the export). Every module is one kind of thing
that real models do and an exporter may fail at; dimensions are as small as the structure allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KINDS", "Kind"]

VOCAB, DIM, LENGTH = 23, 8, 5


@dataclass(frozen=True)
class Kind:
    """A module, batches for it (by size), and how it is exported."""

    module: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)


def ids(size: int, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCAB, (size, length))


def texts(size: int) -> dict[str, Tensor]:
    x = ids(size)
    mask = torch.ones_like(x)
    mask[0, -2:] = 0
    labels = ids(size)
    labels[0, -2:] = -100
    return {"input_ids": x, "attention_mask": mask, "labels": labels}


def pairs(size: int) -> dict[str, Tensor]:
    return {"x": ids(size), "y": ids(size)}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Gpt(nn.Module):
    """GPT-2: learned positions, one causal attention of fused projections, pre-norm, a tied head, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, DIM), nn.Embedding(LENGTH, DIM)
        self.ln_1, self.ln_2, self.ln_f = (nn.LayerNorm(DIM) for _ in range(3))
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc, self.out = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        h = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        q, k, v = self.qkv(self.ln_1(h)).chunk(3, -1)
        h = h + self.proj(
            joined(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True))
        )
        h = h + self.out(F.gelu(self.fc(self.ln_2(h)), approximate="tanh"))
        logits = self.head(self.ln_f(h))
        return {"loss": cross_entropy(logits[:, :-1], labels[:, 1:]), "logits": logits, "cache": (k, v)}


class Bert(nn.Module):
    """BERT: padded words, token types, a mask added to the scores, labels that are left out; a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(VOCAB, DIM, padding_idx=0), nn.Embedding(2, DIM)
        self.register_buffer("position_ids", torch.arange(LENGTH)[None], persistent=False)
        self.positions, self.norm = nn.Embedding(LENGTH, DIM), nn.LayerNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.decoder = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kinds = self.types(torch.zeros_like(input_ids))
        h = self.norm(self.words(input_ids) + kinds + self.positions(self.position_ids))
        mask = (1.0 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min
        q, k, v = heads(self.q(h)), heads(self.k(h)), heads(self.v(h))
        h = h + joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, 1, LENGTH, -1)))
        logits = self.decoder(h)
        return cross_entropy(logits, labels), logits


class T5(nn.Module):
    """T5: labels shifted right, buckets of relative positions, RMS norms, attention across, tied words."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bias = nn.Embedding(VOCAB, DIM), nn.Embedding(4, 2)
        self.scale = nn.Parameter(torch.ones(DIM))
        self.q, self.k, self.v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def norm(self, h: Tensor) -> Tensor:
        return self.scale * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    def attend(self, h: Tensor, memory: Tensor) -> Tensor:
        place = torch.arange(LENGTH)
        bucket = (place[None] - place[:, None]).abs().clamp(max=3)
        bias = self.bias(bucket).permute(2, 0, 1)[None]
        q, k, v = heads(self.q(h)), heads(self.k(memory)), heads(self.v(memory))
        return joined(torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        shifted = labels.new_zeros(labels.shape)
        shifted[..., 1:] = labels[..., :-1].clone()
        shifted[..., 0] = 0
        shifted.masked_fill_(shifted == -100, 0)
        memory = self.norm(self.shared(input_ids))
        h = self.shared(shifted)
        h = h + self.attend(self.norm(h), memory)
        return cross_entropy(self.norm(h) * DIM**-0.5 @ self.shared.weight.T, labels)


class Llama(nn.Module):
    """Llama: rotary positions of a buffer, shared key heads, a gated product, a mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.register_buffer("inv_freq", 1.0 / 10 ** (torch.arange(0, 4, 2) / 4), persistent=False)
        self.q, self.o = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.k, self.v = nn.Linear(DIM, 4, bias=False), nn.Linear(DIM, 4, bias=False)
        self.gate, self.up, self.down = nn.Linear(DIM, 6), nn.Linear(DIM, 6), nn.Linear(6, DIM)
        self.norm = nn.RMSNorm(DIM)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(LENGTH)[:, None].float() @ self.inv_freq[None]
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        first, second = x[..., :2], x[..., 2:]
        return x * cos + torch.cat((-second, first), -1) * sin

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        h = self.embed(input_ids)
        x = self.norm(h)
        q, k, v = self.turned(heads(self.q(x))), self.turned(heads(self.k(x), 1)), heads(self.v(x), 1)
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        h = h + self.o(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        return cross_entropy(self.head(h), labels)


class Layered(nn.Module):
    """Embeddings, then a layer that maps [batch, length, DIM] to the same, then scores."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.out(self.between(self.emb(x))), y)

    def between(self, h: Tensor) -> Tensor:
        if self.layer is None:
            return h
        h = self.layer(h)
        return h[0] if isinstance(h, tuple) else h


class Padded(Layered):
    """`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` with padded keys; a loss of shape [1]."""

    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, 0.0, batch_first=True))
        self.more = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        padding = attention_mask == 0
        h = self.layer(self.emb(input_ids), src_key_padding_mask=padding)
        h = h + self.more(h, h, h, key_padding_mask=padding)[0]
        return cross_entropy(self.out(h), labels).reshape(1)


class Normed(Layered):
    """Batch normalization over features of a sequence, and without weights or statistics of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(DIM)
        self.bn2 = nn.BatchNorm1d(DIM, affine=False, track_running_stats=False)

    def between(self, h: Tensor) -> Tensor:
        h = torch.relu(self.bn(h.transpose(1, 2))).transpose(1, 2)
        return self.bn2(h.flatten(0, 1)).view(h.shape)


class Twice(Layered):
    """One batch normalization applied twice."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(DIM, momentum=0.3))

    def between(self, h: Tensor) -> Tensor:
        return self.layer(self.layer(h.transpose(1, 2)).tanh()).transpose(1, 2)


class Audio(nn.Module):
    """Whisper: convolutions with batch normalization over frames, sinusoids, words shifted right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, DIM, 3, stride=2, padding=1), nn.BatchNorm1d(DIM)
        self.register_buffer("sinusoids", torch.randn(LENGTH, DIM))
        self.words = nn.Embedding(VOCAB, DIM)

    def forward(self, input_features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        memory = F.gelu(self.bn(self.conv(input_features))).transpose(1, 2) + self.sinusoids
        start = torch.full_like(labels[:, :1], 2)
        h = self.words(torch.cat((start, labels[:, :-1]), 1))
        h = h + F.scaled_dot_product_attention(h, memory, memory)
        return {"logits": h, "loss": cross_entropy(h @ self.words.weight.T, labels)}


class Inner(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.nn = part

    def forward(self, x: Tensor) -> Tensor:
        return self.nn(x)


class Edges(nn.Module):
    """A graph's nodes and its edges int[2, E]; one submodule under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.m = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, DIM)
        self.also = Inner(self.m)

    def forward(self, z: Tensor, edges: Tensor, y: Tensor) -> Tensor:
        h = self.also(self.e(z)).tanh()
        i, j = edges
        return F.mse_loss((h[i] * h[j]).sum(-1), y)


class Squeezed(Layered):
    """A squeeze that does nothing, ids that arrive as floats, rows chosen by a mask, two losses in a tuple."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        chosen = x > 3
        h = self.emb(x.long()).squeeze(1)
        return F.cross_entropy(self.out(h[chosen]), y[chosen]), h.square().mean()


class Nested(nn.Module):
    """A batch as one dict (recommenders), with parts that are lists."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(VOCAB, DIM), nn.Embedding(VOCAB, DIM)

    def forward(self, batch: dict[str, Any], weight: float = 1.0) -> Tensor:
        first, second = (self.items(part) for part in batch["items"])
        user = self.users(batch["user"])
        return weight * -F.logsigmoid((user * (first - second)).sum(-1)).mean()


class Recurrent(Layered):
    """An LSTM and a GRU, which the exporter unrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(DIM, 4, batch_first=True)
        self.gru = nn.GRU(4, DIM, batch_first=True)

    def between(self, h: Tensor) -> Tensor:
        return self.gru(self.lstm(h)[0])[0]


class WeightNorm(Layered):
    """Weight normalization of a matrix and of a table: w = g v/|v|."""

    def __init__(self) -> None:
        super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM)))
        self.emb = nn.utils.parametrizations.weight_norm(self.emb)


class Average(Layered):
    """A moving average of activations in a buffer that forward replaces, and that the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(DIM))
        self.register_buffer("steps", torch.tensor(0))

    def between(self, h: Tensor) -> Tensor:
        self.steps += 1
        self.centre = 0.9 * self.centre + 0.1 * h.detach().mean((0, 1))
        return h - self.centre


class Targets(nn.Module):
    """Learns from its own rows without a gradient, and from a frozen table that starts as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Embedding(VOCAB, DIM)
        self.target = nn.Embedding(VOCAB, DIM)
        self.target.load_state_dict(self.online.state_dict())
        self.target.weight.requires_grad_(False)
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.head(self.online(x))
        own = F.mse_loss(made, self.online(y).detach())
        scores = F.linear(made, self.online.weight.detach())
        return own + F.mse_loss(made, self.target(y)) + scores.square().mean()


def _edges(size: int) -> dict[str, Tensor]:
    return {
        "z": torch.randint(0, VOCAB, (7,)),
        "edges": torch.randint(0, 7, (2, 3 * size)),
        "y": torch.rand(3 * size),
    }


def _floats(size: int) -> dict[str, Tensor]:
    return {"x": ids(size).float(), "y": ids(size)}


def _short(size: int) -> dict[str, Tensor]:
    return {"x": ids(size, 2), "y": ids(size, 2)}


def _frames(size: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(size, 3, 2 * LENGTH), "labels": ids(size)}


def _without_mask(size: int) -> dict[str, Tensor]:
    batch = texts(size)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def _nested(size: int) -> dict[str, Any]:
    user, first, second = torch.randint(0, VOCAB, (3, size))
    return {"batch": {"user": user, "items": [first, second]}}


_FREE = torch.export.Dim.DYNAMIC

KINDS: Final = {
    "gpt": Kind(Gpt, _without_mask),
    "bert": Kind(Bert, texts),
    "t5": Kind(T5, _without_mask),
    "llama": Kind(Llama, _without_mask),
    "padded": Kind(Padded, texts),
    "batch norm": Kind(Normed, pairs),
    "batch norm for inference": Kind(lambda: Normed().eval(), pairs),
    "batch norm twice": Kind(Twice, pairs),
    "audio": Kind(Audio, _frames),
    "edges": Kind(Edges, _edges, {"dynamic_shapes": {"z": None, "edges": {1: _FREE}, "y": {0: _FREE}}}),
    "squeezed": Kind(Squeezed, _floats),
    "nested": Kind(Nested, _nested),
    "weight norm": Kind(WeightNorm, pairs),
    "moving average": Kind(Average, pairs),
    "recurrent": Kind(Recurrent, _short),
    "targets": Kind(Targets, _short),
}
