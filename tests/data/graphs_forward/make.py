"""Write forward graphs whose last step is the loss, as PyTorch's two exporters do, and autograd's gradients.

    python tests/data/graphs_forward/make.py

Needs torch 2.13.0, onnx 1.23.2 and onnxscript 0.7 (CPU); the tests need only the files. `<name>.npz` holds the
batch (`in0`, ..), `loss`, and `gradient/<initializer>` for every parameter.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
VOCAB, WIDTH, CLASSES = 13, 8, 5


class Recommender(nn.Module):
    """Two tables, batch normalization, dropout that drops nothing; binary labels."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(VOCAB, WIDTH), nn.Embedding(7, WIDTH)
        self.norm, self.hidden = nn.BatchNorm1d(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, user, item, label):
        x = self.norm(torch.cat([self.user(user), self.item(item)], 1))
        x = functional.silu(self.hidden(x))
        return functional.binary_cross_entropy_with_logits(self.out(x).squeeze(-1), label)

    def batch(self):
        return torch.randint(0, VOCAB, (6,)), torch.randint(0, 7, (6,)), torch.rand(6)


class Recurrent(nn.Module):
    """A language model with a recurrent layer."""

    def __init__(self, layer, **settings):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.layer = layer(WIDTH, 6, batch_first=True, **settings)
        self.out = nn.Linear(6 * (1 + self.layer.bidirectional), VOCAB)

    def forward(self, ids, labels):
        hidden, _ = self.layer(self.emb(ids))
        return functional.cross_entropy(self.out(hidden).flatten(0, 1), labels.flatten())

    def batch(self):
        return torch.randint(0, VOCAB, (4, 5)), torch.randint(0, VOCAB, (4, 5))


class Decoder(nn.Module):
    """A block of a language model with tied weights; some labels do not count."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(6, WIDTH)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, ids, labels):
        count, length = ids.shape
        x = self.tokens(ids) + self.places(0 * ids + torch.arange(length))
        parts = self.qkv(self.norm1(x)).split(WIDTH, -1)
        q, k, v = (part.view(count, length, 2, WIDTH // 2).transpose(1, 2) for part in parts)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(heads.transpose(1, 2).reshape(count, length, WIDTH))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        scores = self.norm3(x) @ self.tokens.weight.T
        return functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def batch(self):
        labels = torch.randint(0, VOCAB, (2, 6))
        labels[0, 0] = -100
        return torch.randint(0, VOCAB, (2, 6)), labels


class Encoder(nn.Module):
    """A transformer layer over padded sequences, pooled by a masked mean."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, activation="gelu", batch_first=True)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids, labels):
        hidden = self.layer(self.emb(ids), src_key_padding_mask=ids == 0)
        mask = (ids != 0).float().unsqueeze(-1)
        return functional.cross_entropy(self.out((hidden * mask).sum(1) / mask.sum(1)), labels)

    def batch(self):
        ids = torch.randint(1, VOCAB, (3, 5))
        ids[0, 3:] = 0
        return ids, torch.randint(0, CLASSES, (3,))


class Convolutions(nn.Module):
    """Text through convolutions, pooling and normalizations of channels."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 8, 3, stride=2, groups=2, padding=1)
        self.groups, self.each = nn.GroupNorm(4, 8), nn.InstanceNorm1d(8, affine=True)
        self.wide, self.out = nn.ConvTranspose1d(8, 4, 3, 2), nn.Linear(4, CLASSES)

    def forward(self, ids, labels):
        x = functional.mish(self.groups(self.conv(self.emb(ids).transpose(1, 2))))
        x = functional.avg_pool1d(functional.max_pool1d(self.each(x), 2, 1), 2, 1)
        x = functional.adaptive_avg_pool1d(self.wide(x), 1).flatten(1)
        return functional.cross_entropy(self.out(x), labels)

    def batch(self):
        return torch.randint(0, VOCAB, (3, 9)), torch.randint(0, CLASSES, (3,))


class Gated(nn.Module):
    """A block with RMS normalization, rotary positions, shared keys and a gated hidden layer."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, False), nn.Linear(WIDTH, WIDTH, False)
        self.gate, self.up, self.down = (
            nn.Linear(*size, bias=False) for size in ((WIDTH, 12), (WIDTH, 12), (12, WIDTH))
        )
        self.out = nn.Linear(WIDTH, VOCAB, False)

    def rotated(self, x):
        angles = torch.outer(torch.arange(x.shape[2]).float(), torch.tensor([1.0, 0.1]))
        angles = torch.cat([angles, angles], -1)
        return x * angles.cos() + torch.cat([-x[..., 2:], x[..., :2]], -1) * angles.sin()

    def forward(self, ids, labels):
        count, length = ids.shape
        x = self.emb(ids)
        hidden = self.norm1(x)
        q = self.rotated(self.q(hidden).view(count, length, 2, 4).transpose(1, 2))
        k, v = self.kv(hidden).unsqueeze(1).split(4, -1)
        mask = torch.full((length, length), float("-inf")).triu(1)
        shares = torch.softmax(q @ self.rotated(k).transpose(-1, -2) / 2 + mask, -1)
        x = x + (shares @ v).transpose(1, 2).reshape(x.shape)
        hidden = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(hidden)) * self.up(hidden))
        return functional.nll_loss(functional.log_softmax(self.out(x), -1).flatten(0, 1), labels.flatten())

    def batch(self):
        return torch.randint(0, VOCAB, (2, 4)), torch.randint(0, VOCAB, (2, 4))


GRAPHS = {
    "recommender_legacy_13": (Recommender, 13),
    "recommender_legacy_17": (Recommender, 17),
    "lstm_legacy_17": (lambda: Recurrent(nn.LSTM, num_layers=2), 17),
    "gru_legacy_15": (lambda: Recurrent(nn.GRU, bidirectional=True), 15),
    "decoder_legacy_17": (Decoder, 17),
    "decoder_dynamo_18": (Decoder, 18),
    "decoder_dynamo_23": (Decoder, 23),
    "encoder_legacy_17": (Encoder, 17),
    "convolutions_legacy_17": (Convolutions, 17),
    "gated_dynamo_20": (Gated, 20),
    "gated_dynamo_23": (Gated, 23),
}


def export(name, model, batch, opset):
    path = str(HERE / f"{name}.onnx")
    inputs = [f"in{index}" for index in range(len(batch))]
    settings = {"input_names": inputs, "output_names": ["loss"], "opset_version": opset}
    if "legacy" in name:
        torch.onnx.export(
            model,
            batch,
            path,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            dynamic_axes={item: {0: "batch"} for item in inputs},
            **settings,
        )
    else:
        torch.onnx.export(model, batch, dynamo=True, verbose=False, **settings).save(path)
    proto = onnx.load(path)
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        del node.metadata_props[:]  # where in this file a node came from
        node.doc_string = ""
    onnx.save(proto, path)
    return {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}


def initializer_of(known, name, parameter):
    """Return an initializer's name, and whether it is the parameter transposed, as products make it."""
    value = parameter.detach().numpy()
    for turned in (False, True):
        wanted = value.T if turned else value
        found = [key for key, array in known.items() if np.array_equal(array, wanted)]
        if name in found or len(found) == 1:
            return (name if name in found else found[0]), turned
    raise ValueError(f"the exporter has changed {name}")


def main():
    warnings.simplefilter("ignore")
    for name, (build, opset) in GRAPHS.items():
        torch.manual_seed(0)
        model = build().train()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        batch = model.batch()
        known = export(name, model, batch, opset)
        places = {key: initializer_of(known, key, item) for key, item in model.named_parameters()}
        loss = model.double()(*(item.double() if item.is_floating_point() else item for item in batch))
        loss.backward()
        arrays = {f"in{index}": item.numpy() for index, item in enumerate(batch)}
        arrays["loss"] = np.float32(loss.item())
        for key, parameter in model.named_parameters():
            place, turned = places[key]
            gradient = parameter.grad.numpy().astype(np.float32)
            arrays[f"gradient/{place}"] = gradient.T if turned else gradient
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
