"""Export small training graphs of well-known architectures; tests hold their parameters' roles.

GPT-2 (tied and untied) and BERT are those of Hugging Face's transformers; DLRM, SASRec and a residual network
of convolutions are written out here. All have random weights and are 30 to 100 kB.
Needs `pip install torch transformers`.

    python tools/make_role_graphs.py tests/data/roles [NAME...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kfac_onnx.torch import export_training_graph

BATCH, LENGTH, WIDTH, VOCAB = 3, 6, 16, 300


class Dlrm(nn.Module):
    """Naumov et al. 2019: a bottom MLP, three tables, products of all pairs, a top MLP, one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in (50, 40, 30))
        self.bottom = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, WIDTH), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(WIDTH + 16, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, dense: Tensor, ids: Tensor, label: Tensor) -> Tensor:
        """Return the mean logistic loss of clicks."""
        x = self.bottom(dense)
        rows = [table(ids[:, number]) for number, table in enumerate(self.tables)]
        features = torch.stack([x, *rows], dim=1)
        products = features @ features.transpose(1, 2)
        logit = self.top(torch.cat([x, products.flatten(1)], dim=1)).squeeze(1)
        return (nn.functional.softplus(logit) - logit * label).mean()


class SasRec(nn.Module):
    """Kang and McAuley 2018: causal attention over items; two items are scored by products."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(80, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.attention_norm, self.forward_norm, self.last_norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv1, self.conv2 = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, seen: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the mean logistic loss of both scores."""
        x = self.items(seen) * WIDTH**0.5 + self.positions(torch.arange(LENGTH))
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        query = self.attention_norm(x)
        x = query + self.attention(query, x, x, attn_mask=future, need_weights=False)[0]
        x = self.forward_norm(x)
        x = x + self.conv2(torch.relu(self.conv1(x.transpose(1, 2)))).transpose(1, 2)
        x = self.last_norm(x)
        scores = torch.stack([(x * self.items(positive)).sum(-1), -(x * self.items(negative)).sum(-1)])
        return -nn.functional.logsigmoid(scores).mean()


class ResNet(nn.Module):
    """He et al. 2015: a block of convolutions with a shortcut; a table of cameras beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(2))
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.camera = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 10)

    def forward(self, image: Tensor, camera: Tensor, label: Tensor) -> Tensor:
        """Return the mean cross-entropy over ten classes."""
        x = self.norms[0](self.stem(image)).relu()
        y = self.second(self.norms[1](self.first(x)).relu())
        x = self.depthwise((self.shortcut(x) + y).relu()).relu()
        return nn.functional.cross_entropy(self.fc(x.mean((2, 3)) + self.camera(camera)), label)


def gpt2(*, tied: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a GPT-2 of one layer and a batch."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids.clone()}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a BERT of one layer that classifies two sentences, and a batch."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, max_position_embeddings=8,
    )  # fmt: skip
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": torch.randint(0, 3, (BATCH,)),
    }
    return transformers.BertForSequenceClassification(config), batch


def graphs() -> dict[str, tuple[nn.Module, Any]]:
    """Return each model with a batch of it."""
    ids = torch.randint(1, 30, (BATCH, LENGTH))
    return {
        "gpt2": gpt2(tied=True),
        "gpt2_untied": gpt2(tied=False),
        "bert": bert(),
        "dlrm": (Dlrm(), (torch.randn(BATCH, 5), ids[:, :3].clone(), torch.ones(BATCH))),
        "sasrec": (SasRec(), (ids, ids.flip(0), ids.flip(1))),
        "resnet": (
            ResNet(),
            (torch.randn(BATCH, 3, 8, 8), torch.randint(0, 20, (BATCH,)), torch.randint(0, 10, (BATCH,))),
        ),
    }


def main(folder: str, *names: str) -> None:
    """Write the graphs of these names, or all."""
    torch.manual_seed(0)
    for name, (model, batch) in graphs().items():
        if names and name not in names:
            continue
        path = Path(folder) / f"{name}.onnx"
        export_training_graph(model.train(), batch, path)
        sys.stdout.write(f"{path}: {path.stat().st_size / 1e3:.0f} kB\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
