"""Write the training graphs of this folder, each with its sidecars: see README.md.

python make.py ort      with onnxruntime-training-cpu 1.19.2, torch 2.13, onnx, onnxscript
python make.py joint    with torch 2.13, onnx, onnxscript and kfac_onnx
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent


class Strided(nn.Module):
    """Grouped, strided and dilated convolution, both kinds of pooling."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1, stride=2, dilation=2, groups=2)
        self.average, self.most = nn.AvgPool1d(2, 1, padding=1), nn.MaxPool1d(3, 2, padding=1)
        self.out = nn.Linear(6, 5)

    def forward(self, ids, y):
        rows = self.conv(self.emb(ids).transpose(1, 2))
        return functional.cross_entropy(self.out(self.most(self.average(rows)).sum(2)), y)


class Cosine(nn.Module):
    """Two lookups of one table, compared by cosine."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, left, right, y):
        one, other = (self.fc(self.emb(ids).mean(1)) for ids in (left, right))
        return functional.mse_loss(functional.cosine_similarity(one, other), y)


class BothWays(nn.Module):
    """A recurrent layer in both directions."""

    def __init__(self, cell):
        super().__init__()
        self.emb, self.cell = nn.Embedding(30, 8), cell(8, 4, batch_first=True, bidirectional=True)
        self.out = nn.Linear(8, 5)

    def forward(self, ids, y):
        return functional.cross_entropy(self.out(self.cell(self.emb(ids))[0].sum(1)), y)


class Normalized(nn.Module):
    """Batch normalization with running statistics."""

    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.out = nn.Embedding(30, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, ids, y):
        return functional.cross_entropy(self.out(self.norm(self.emb(ids).mean(1))), y)


class Sliced(nn.Module):
    """A position table that is a parameter, of which a part is read; rows split in three."""

    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(40, 6), nn.Parameter(torch.randn(8, 6))
        self.mix, self.out = nn.Linear(6, 18), nn.Linear(6, 5)

    def forward(self, ids, y):
        query, key, value = self.mix(self.tok(ids) + self.pos[: ids.shape[1]]).split(6, -1)
        rows = torch.softmax(query @ key.transpose(1, 2), -1) @ value
        return functional.cross_entropy(self.out(rows[:, 0]), y)


def numbers(high, *shape):
    ids = torch.randint(0, high, shape)
    ids[1] = ids[0]
    return ids


def labelled(length, high=30):
    return lambda batch: (numbers(high, batch, length), numbers(5, batch))


def pairs(batch):
    return numbers(30, batch, 4), numbers(30, batch, 4), torch.randn(batch)


# name -> (exporter, opset, module, data, tables as [V, D, lookups])
ORT = {
    "ort_leg17__conv": ("legacy", 17, Strided, labelled(9), {"emb.weight": [30, 8, 1]}),
    "ort_leg13__cosine": ("legacy", 13, Cosine, pairs, {"emb.weight": [30, 8, 2]}),
    "ort_leg15__bilstm": ("legacy", 15, lambda: BothWays(nn.LSTM), labelled(4), {"emb.weight": [30, 8, 1]}),
    "ort_dyn21__bigru": ("dynamo", 21, lambda: BothWays(nn.GRU), labelled(4), {"emb.weight": [30, 8, 1]}),
    "ort_leg14__batch_norm": ("legacy", 14, Normalized, labelled(4), {"emb.weight": [30, 8, 1]}),
}
JOINT = {
    "joint_raw20__sliced": (
        "joint",
        20,
        Sliced,
        labelled(5, 40),
        {"tok.weight": [40, 6, 1], "pos": [8, 6, 1]},
    ),
}


def forward_graph(kind, opset, module, data, names):
    if kind == "legacy":
        held = io.BytesIO()
        torch.onnx.export(
            module,
            data,
            held,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            opset_version=opset,
            input_names=names,
            output_names=["loss"],
            dynamic_axes={name: {0: "batch"} for name in names},
        )
        return onnx.load_from_string(held.getvalue())
    free = torch.export.Dim("batch", min=2)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            module,
            data,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=names,
            output_names=["loss"],
            dynamic_shapes=tuple({0: free} for _ in data),
        )
    return onnx.inliner.inline_local_functions(program.model_proto)


def ort_artifacts(kind, opset, module, data, names):
    from onnxruntime.training import artifacts

    proto = forward_graph(kind, opset, module, data, names)
    for index, node in enumerate(proto.graph.node):  # results that the gradients need
        wanted = {"SoftmaxCrossEntropyLoss": 2, "LayerNormalization": 3}.get(node.op_type, 0)
        node.output.extend(f"extra_{index}_{k}" for k in range(len(node.output), wanted))
    proto.ir_version = min(proto.ir_version, 9)
    with tempfile.TemporaryDirectory() as folder:
        trained = [name for name, _ in module.named_parameters()]
        artifacts.generate_artifacts(proto, requires_grad=trained, artifact_directory=folder)
        return onnx.load(Path(folder) / "training_model.onnx")


def joint(_, opset, module, data, names):
    """PyTorch's joint graph, parameters as inputs, written without optimization."""
    from torch.export import experimental
    from torch.export.graph_signature import InputKind, OutputKind

    free = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, data, dynamic_shapes=tuple({0: free} for _ in data))
    both = experimental._export_forward_backward(program)
    signature = both.graph_signature
    held = [spec.target for spec in signature.input_specs if spec.kind != InputKind.USER_INPUT]
    outputs = [
        "loss" if spec.kind == OutputKind.LOSS_OUTPUT else f"{spec.target}_grad"
        for spec in signature.output_specs
    ]
    shapes = [*[None] * len(held), *[{0: torch.export.Dim.DYNAMIC} for _ in data]]
    values = [both.state_dict[name].detach() for name in held]
    again = torch.export.export(both.graph_module, (*values, *data), dynamic_shapes=tuple(shapes))
    with contextlib.redirect_stdout(io.StringIO()):
        return torch.onnx.export(
            again,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=[*held, *names],
            output_names=outputs,
        ).model_proto


def write(name, kind, opset, make, draw, tables):
    torch.manual_seed(0)
    module, batches = make(), [draw(6), draw(9)]
    names = [f"in_{index}" for index in range(len(batches[0]))]
    proto = (joint if kind == "joint" else ort_artifacts)(kind, opset, module, batches[0], names)
    del proto.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del part.metadata_props[:]
    onnx.save(proto, HERE / f"{name}.onnx")
    arrays = {f"in:{key}": value.detach().numpy() for key, value in module.named_parameters()}
    arrays |= {f"in:{key}": value.detach().numpy().copy() for key, value in module.named_buffers()}
    for which, ref, batch in (("in", "ref", batches[0]), ("in2", "ref2", batches[1])):
        module.zero_grad()
        loss = module(*batch)
        loss.backward()
        arrays |= {f"{which}:{key}": value.numpy() for key, value in zip(names, batch, strict=True)}
        arrays |= {f"{ref}:grad:{key}": value.grad.numpy().copy() for key, value in module.named_parameters()}
        arrays[f"{ref}:loss"] = loss.detach().numpy()
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    (HERE / f"{name}.json").write_text(json.dumps({"tables": tables}) + "\n")


for name, recipe in (JOINT if sys.argv[1:] == ["joint"] else ORT).items():
    write(name, *recipe)
