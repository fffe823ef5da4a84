"""Write `demo_forward.onnx`: the demo's language model as a forward-only export, weights as inputs.

    python tests/data/autodiff/make_demo_forward.py

Needs torch 2.13.0 (CPU), onnxscript 0.7.2. It is the model of tools/make_demo.py without labels and loss, as
`torch.onnx.export` writes it; the weights, whose values the demo draws, are turned into inputs to keep it small.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

HERE = Path(__file__).parent


class LanguageModel(torch.nn.Module):
    """The next word from the four before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12_762, 64)
        self.hidden = torch.nn.Linear(4 * 64, 128)
        self.output = torch.nn.Linear(128, 2_001)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(ids).flatten(1))))


def main() -> None:
    program = torch.onnx.export(
        LanguageModel().eval(),
        (torch.zeros(2, 4, dtype=torch.int64),),
        dynamo=True,
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes={"ids": {0: torch.export.Dim("batch")}},
    )
    proto = program.model_proto
    weights = [item for item in proto.graph.initializer if item.data_type == onnx.TensorProto.FLOAT]
    for item in weights:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims))
        )
        proto.graph.initializer.remove(item)
    for node in proto.graph.node:
        del node.metadata_props[:]
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    onnx.checker.check_model(proto)
    (HERE / "demo_forward.onnx").write_bytes(proto.SerializeToString())


if __name__ == "__main__":
    main()
