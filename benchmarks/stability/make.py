"""Export the six training graphs of this folder, and how their parameters start.

    pip install recbole transformers torch && python benchmarks/stability/make.py

`graphs/<task>.onnx` takes its parameters as inputs, so that a file is small and each seed starts elsewhere;
`graphs/<task>.json` has of each parameter its shape and the mean and spread that the exported module gave it:
a parameter of one value starts at that value, another is drawn from the normal distribution of its spread.

GRU4Rec, SASRec and NARM are recbole's, with cross-entropy over all items; GPT-2 and BERT are transformers',
two layers each. All five tie their table to the scores. xDeepFM (Lian et al. 2018,
https://arxiv.org/abs/1803.05170) is written out below: one table of all fields for its linear part, one
for its compressed interactions and its network. Dropout is off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from kfac_onnx.torch import export_training_graph

FEW = 1000
"""Smaller tensors of zeros stay."""
GRAPHS = Path(__file__).parent / "graphs"
ITEMS, LENGTH, WORDS, WIDTH = 1683, 20, 2002, 32
FIELDS = (944, 1683, 62, 3, 22)
"""Users, items, ages, genders, occupations."""


class Sequence(nn.Module):
    """The loss of a recbole model whose batch is a list of items, its length and the item that follows."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        module = __import__(f"recbole.model.sequential_recommender.{name.lower()}", fromlist=[name])
        config = {
            "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list",
            "ITEM_LIST_LENGTH_FIELD": "length", "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": LENGTH,
            "device": "cpu", "loss_type": "CE", **settings,
        }  # fmt: skip

        class Dataset:
            def num(self, field: str) -> int:
                """Return how many items, or users, there are."""
                return ITEMS

        self.model = getattr(module, name)(config, Dataset())

    def forward(self, items: torch.Tensor, length: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of items int64[n, 20] behind which zeros stand, lengths and targets int64[n]."""
        return self.model.calculate_loss({"item_list": items, "length": length, "item": target})


class XDeepFM(nn.Module):
    """Binary cross-entropy of scores: linear, compressed interactions of two layers, and a network."""

    def __init__(self, width: int = 16, maps: tuple[int, ...] = (32, 32), hidden: int = 64) -> None:
        super().__init__()
        count, total = len(FIELDS), sum(FIELDS)
        self.register_buffer("offsets", torch.tensor(np.concatenate([[0], np.cumsum(FIELDS)[:-1]])))
        self.linear = nn.Embedding(total, 1)
        self.table = nn.Embedding(total, width)
        nn.init.xavier_uniform_(self.table.weight)
        nn.init.xavier_uniform_(self.linear.weight)
        sizes = (count, *maps)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(count * size, out, 1) for size, out in zip(sizes, maps, strict=False)
        )
        self.interactions = nn.Linear(sum(maps), 1)
        self.network = nn.Sequential(
            nn.Linear(count * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, fields: torch.Tensor, clicked: torch.Tensor) -> torch.Tensor:
        """Return the loss of fields int64[n, 5] and clicked float32[n]."""
        ids = fields + self.offsets
        x0 = self.table(ids)
        rows, pooled = x0, []
        for convolution in self.convolutions:
            products = (x0.unsqueeze(2) * rows.unsqueeze(1)).flatten(1, 2)
            rows = torch.relu(convolution(products))
            pooled.append(rows.sum(2))
        scores = self.linear(ids).sum(1) + self.interactions(torch.cat(pooled, 1))
        scores = scores + self.network(x0.flatten(1))
        return nn.functional.binary_cross_entropy_with_logits(scores.squeeze(1), clicked)


def language_model(kind: str) -> nn.Module:
    """Return a two-layer GPT-2 or BERT of transformers."""
    import transformers

    if kind == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        settings = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, **off))
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 4 * WIDTH, "vocab_size": WORDS, "max_position_embeddings": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(**settings, **off))


def tasks() -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Return each task's module and a batch to trace it with."""
    one, three = torch.ones(3, dtype=torch.int64), torch.ones(3, LENGTH, dtype=torch.int64)
    items = {"items": three, "length": one, "target": one.clone()}
    words = torch.ones(3, 32, dtype=torch.int64)
    text = {"input_ids": words, "labels": words.clone()}
    fields = {"fields": torch.ones(3, len(FIELDS), dtype=torch.int64), "clicked": torch.ones(3)}
    no = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    attention = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02, **no}
    sasrec = {"n_layers": 2, "n_heads": 2, "hidden_size": WIDTH, "inner_size": 4 * WIDTH, **attention}
    gru = {"embedding_size": WIDTH, "hidden_size": 2 * WIDTH}
    return {
        "gru4rec": (Sequence("GRU4Rec", num_layers=1, dropout_prob=0.0, **gru), items),
        "sasrec": (Sequence("SASRec", **sasrec), items),
        "narm": (Sequence("NARM", n_layers=1, dropout_probs=[0.0, 0.0], **gru), items),
        "gpt2": (language_model("gpt2"), text),
        "bert": (language_model("bert"), text),
        "xdeepfm": (XDeepFM(), fields),
    }  # fmt: skip


def without_zeros(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its tensors of zeros, which gradients of tables are added to, made by a node."""
    for tensor in list(model.graph.initializer):
        if np.prod(tensor.dims) > FEW and not onnx.numpy_helper.to_array(tensor).any():
            shape = onnx.numpy_helper.from_array(np.array(tensor.dims, np.int64), f"{tensor.name}.shape")
            node = onnx.helper.make_node(
                "ConstantOfShape", [shape.name], [tensor.name], name=f"{tensor.name}.zeros"
            )
            model.graph.initializer.remove(tensor)
            model.graph.initializer.append(shape)
            model.graph.node.insert(0, node)
    return model


def main() -> None:
    """Export every task."""
    torch.manual_seed(0)
    GRAPHS.mkdir(exist_ok=True)
    for name, (module, batch) in tasks().items():
        path = GRAPHS / f"{name}.onnx"
        export_training_graph(module, batch, path, parameters_as="inputs")
        model = without_zeros(onnx.load(path))
        onnx.save(model, path)
        inputs = {value.name for value in model.graph.input}
        starts: dict[str, tuple[list[int], float, float]] = {}
        for parameter, tensor in module.named_parameters():
            if parameter in inputs:
                array = tensor.detach().numpy()
                starts[parameter] = (list(array.shape), float(array.mean()), float(array.std()))
        if missing := inputs - starts.keys() - batch.keys():
            raise RuntimeError(f"nothing is known of the inputs {sorted(missing)}")
        path.with_suffix(".json").write_text(json.dumps(starts, indent=0) + "\n")
        print(name, path.stat().st_size, "bytes", len(starts), "parameters")


if __name__ == "__main__":
    main()
