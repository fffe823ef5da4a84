"""Write the graphs of this folder: modules as ORTModule captures them, with PyTorch's own gradients.

Needs torch==2.13.0+cpu, onnx==1.23.2 and onnxruntime-training-cpu==1.19.2. Beside each graph, an .npz holds
`p:<parameter>`, `in:<input>`, `out:<prediction>`, `fed:<input that takes a gradient>` and `g:<parameter>`, the
gradient of Σ prediction · fed (of the loss, for the module that returns it).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.capi import _pybind_state as ort
from torch import nn

HERE = Path(__file__).parent


class TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.f = nn.Embedding(20, 4), nn.Embedding(30, 4), nn.Linear(4, 4)

    def forward(self, u, i):
        return (self.f(self.users(u)) * self.items(i)).sum(-1)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, a, b):
        return self.f(self.e(a)), self.f(self.e(b)).tanh()


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(20, 4), nn.Linear(4, 7)

    def forward(self, a, y):
        z = self.f(self.e(a).mean(1))
        return nn.functional.cross_entropy(z, y), z


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p, self.f, self.n = (
            nn.Embedding(20, 4),
            nn.Embedding(5, 4),
            nn.Linear(4, 4),
            nn.LayerNorm(4),
        )

    def forward(self, a):
        h = self.n(torch.relu(self.f(self.e(a) + self.p(torch.arange(5)))))
        return h @ self.e.weight.t(), a > 3


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(20, 4), nn.Linear(6, 3)

    def forward(self, a, x):
        return self.f(torch.cat([self.e(a), x], -1))


def ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def cases() -> list[tuple]:
    """Return (name, opset, module, inputs by name, names of outputs, inputs that require a gradient)."""
    return [
        ("twotower", 15, TwoTower(), {"u": ids(20, 6), "i": ids(30, 6)}, ["pred"], []),
        ("siamese", 17, Siamese(), {"a": ids(20, 6), "b": ids(20, 6)}, ["one", "other"], []),
        ("withloss", 17, WithLoss(), {"a": ids(20, 6, 3), "y": ids(7, 6)}, ["loss", "z"], []),
        ("tied", 17, Tied(), {"a": ids(20, 6, 5)}, ["z", "mask"], []),
        ("features", 15, Features(), {"a": ids(20, 6), "x": torch.randn(6, 2)}, ["z"], ["x"]),
    ]


def captured(
    module: nn.Module, opset: int, inputs: dict, outputs: list[str], wanted: list[str]
) -> onnx.ModelProto:
    file = io.BytesIO()
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        file,
        input_names=list(inputs),
        output_names=outputs,
        opset_version=opset,
        dynamic_axes={name: {0: "batch"} for name in (*inputs, *outputs) if name != "loss"},
        training=torch.onnx.TrainingMode.TRAINING,
        do_constant_folding=False,
        dynamo=False,
    )
    model = onnx.load_from_string(file.getvalue())
    for node in model.graph.node:  # optional outputs that the gradients need
        if node.op_type == "SoftmaxCrossEntropyLoss" and len(node.output) == 1:
            node.output.append(f"{node.output[0]}/log_prob")
        if node.op_type == "LayerNormalization" and len(node.output) == 1:
            node.output.extend([f"{node.output[0]}/mean", f"{node.output[0]}/inv_std"])
    names = [name for name, _ in module.named_parameters()]
    builder, config = ort.OrtModuleGraphBuilder(), ort.OrtModuleGraphBuilderConfiguration()
    config.initializer_names, config.initializer_names_to_train = names, names
    config.input_names_require_grad, config.build_gradient_graph = wanted, True
    builder.initialize(model.SerializeToString(), config)
    builder.build(ort.TrainingGraphTransformerConfiguration())
    return onnx.load_from_string(builder.get_gradient_model())


def main() -> None:
    torch.manual_seed(0)
    for name, opset, module, inputs, outputs, wanted in cases():
        model = captured(module, opset, inputs, outputs, wanted)
        onnx.save(model, HERE / f"{name}.onnx")
        arrays = {f"p:{key}": value.detach().numpy().copy() for key, value in module.named_parameters()}
        arrays |= {f"in:{key}": value.numpy() for key, value in inputs.items()}
        made = module(*inputs.values())
        made = made if isinstance(made, tuple) else (made,)
        (boundary,) = [node for node in model.graph.node if node.op_type == "YieldOp"]
        total, fed = 0.0, iter(boundary.output)
        for key, value in zip(outputs, made, strict=True):
            arrays[f"out:{key}"] = value.detach().numpy()
            if not value.dtype.is_floating_point:
                continue
            weight = torch.randn_like(value) if "loss" not in outputs else torch.tensor(float(key == "loss"))
            arrays[f"fed:{next(fed)}"] = weight.numpy()
            total = total + (value * weight).sum()
        total.backward()
        arrays |= {f"g:{key}": value.grad.numpy() for key, value in module.named_parameters()}
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
