"""Write the graphs `bag_*` and `scan_*`: embedding bags and a recurrent network by PyTorch's two exporters.

    python tests/data/graphs_loops/make_torch.py

Needs torch 2.13.0 (CPU) and onnxscript 0.7.2. Each graph has an `.npz`: `in:<input>` a feed, `ref:pred` what
the module computes, `in:labels`, `ref:loss` (cross entropy) and `ref:grad:<parameter>` of autograd.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

FOLDER = Path(__file__).parent
VOCAB, WIDTH, CLASSES = 20, 6, 3


class Bag(nn.Module):
    def __init__(self, mode, *, last=False, padding=None):
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCAB, WIDTH, mode=mode, include_last_offset=last, padding_idx=padding)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids, offsets=None, weights=None):
        return self.fc(torch.tanh(self.bag(ids, offsets, per_sample_weights=weights)))


class Rnn(nn.Module):
    """A cell over time, looking its ids up at each time, in a loop or with `torch.scan`."""

    def __init__(self, *, scripted):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.ih, self.hh = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.scripted = scripted

    def forward(self, ids):
        start = torch.zeros(ids.shape[1], WIDTH)
        if self.scripted:
            last = loop_over_time(ids, start, self.emb.weight, self.ih.weight, self.ih.bias, self.hh.weight)
        else:
            from torch._higher_order_ops.scan import scan

            def step(h, i):
                new = torch.tanh(self.ih(self.emb(i)) + self.hh(h))
                return new, new.clone()

            last, _ = scan(step, start, ids)
        return self.fc(last)


@torch.jit.script
def loop_over_time(ids, h, table, w, b, r):
    outs: list[torch.Tensor] = []
    for t in range(ids.shape[0]):
        rows = torch.nn.functional.embedding(ids[t], table)
        h = torch.tanh(torch.nn.functional.linear(rows, w, b) + torch.nn.functional.linear(h, r))
        outs.append(h)
    return torch.stack(outs)[-1]


def write(name, module, inputs, dynamic, *, dynamo, opset=None, optimize=True):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    path = FOLDER / f"{name}.onnx"
    values = tuple(inputs.values())
    if dynamo:
        program = torch.onnx.export(
            module,
            values,
            input_names=[*inputs],
            output_names=["pred"],
            dynamo=True,
            dynamic_shapes=tuple(dynamic.values()),
            optimize=optimize,
        )
        program.save(path, external_data=False)
    else:
        axes = {key: {axis: str(dim) for axis, dim in dims.items()} for key, dims in dynamic.items() if dims}
        torch.onnx.export(
            module,
            values,
            path,
            input_names=[*inputs],
            output_names=["pred"],
            dynamo=False,
            opset_version=opset,
            dynamic_axes=axes,
        )
    strip(path)
    pred = module(*values)
    labels = torch.arange(pred.shape[0]) % CLASSES
    loss = nn.functional.cross_entropy(pred, labels)
    loss.backward()
    arrays = {f"in:{key}": value.numpy() for key, value in inputs.items()}
    arrays |= {
        "in:labels": labels.numpy(),
        "ref:pred": pred.detach().numpy(),
        "ref:loss": loss.detach().numpy(),
    }
    for key, parameter in module.named_parameters():
        arrays[f"ref:grad:{key}"] = parameter.grad.numpy()
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def strip(path):
    """Drop what the exporter notes about the file that called it."""
    model = onnx.load(path)
    for owner in (model, model.graph):
        del owner.metadata_props[:]
    strip_nodes(model.graph)
    onnx.save(model, path)


def strip_nodes(graph):
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
        for attribute in getattr(item, "attribute", ()):
            if attribute.type == onnx.AttributeProto.GRAPH:
                strip_nodes(attribute.g)


def main():
    draw = np.random.default_rng(1)
    flat = torch.tensor(draw.integers(0, VOCAB, 11))
    square = torch.tensor(draw.integers(0, VOCAB, (5, 4)))
    starts = torch.tensor([0, 3, 3, 5, 11])  # the second and the last bag are empty
    ends = torch.tensor([0, 3, 3, 5, 9, 11])
    weights = torch.tensor(draw.normal(size=11).astype(np.float32))
    batch, count = torch.export.Dim("batch", min=2, max=999), torch.export.Dim("count", min=2, max=9999)
    write(
        "bag_dynamo_mean_offsets",
        Bag("mean"),
        {"ids": flat, "offsets": starts},
        {"ids": {0: count}, "offsets": {0: batch}},
        dynamo=True,
    )
    write(
        "bag_dynamo_sum_square_unoptimized",
        Bag("sum"),
        {"ids": square},
        {"ids": {0: batch}},
        dynamo=True,
        optimize=False,
    )
    write(
        "bag_dynamo_sum_weighted",
        Bag("sum"),
        {"ids": flat, "offsets": starts, "weights": weights},
        {"ids": {0: count}, "offsets": {0: batch}, "weights": {0: count}},
        dynamo=True,
    )
    write(
        "bag_opset13_sum_weighted_last_offset",
        Bag("sum", last=True),
        {"ids": flat, "offsets": ends, "weights": weights},
        {"ids": {0: "count"}, "offsets": {0: "ends"}, "weights": {0: "count"}},
        dynamo=False,
        opset=13,
    )
    write(
        "bag_opset16_mean_square",
        Bag("mean"),
        {"ids": square},
        {"ids": {0: "batch"}},
        dynamo=False,
        opset=16,
    )
    write("scan_dynamo", Rnn(scripted=False), {"ids": square}, {"ids": {1: batch}}, dynamo=True)
    write(
        "scan_scripted_opset15",
        Rnn(scripted=True),
        {"ids": square},
        {"ids": {0: "time", 1: "batch"}},
        dynamo=False,
        opset=15,
    )


if __name__ == "__main__":
    main()
