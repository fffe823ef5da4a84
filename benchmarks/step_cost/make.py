"""Export the matrix-factorisation training graphs of this benchmark (needs the extra `torch`).

Two tables of V x 64, squared error of the dot product; the parameters are inputs, so the files are small.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kfac_onnx.torch.export import export_training_graph

FOLDER = Path(__file__).parent


class Factorisation(torch.nn.Module):
    """Mean squared error of user · item + bias."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.user = torch.nn.Embedding(vocab_size, width)
        self.item = torch.nn.Embedding(vocab_size, width)
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, users: torch.Tensor, items: torch.Tensor, ratings: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch."""
        scores = (self.user(users) * self.item(items)).sum(-1) + self.bias
        return ((scores - ratings) ** 2).mean()


def main() -> None:
    """Write `mf_<V>.onnx` for each vocabulary."""
    for vocab_size in (10_000, 100_000, 1_000_000):
        ids = torch.randint(0, vocab_size, (64,))
        export_training_graph(
            Factorisation(vocab_size, 64),
            (ids, ids, torch.randn(64)),
            FOLDER / f"mf_{vocab_size}.onnx",
            parameters_as="inputs",
        )


if __name__ == "__main__":
    main()
