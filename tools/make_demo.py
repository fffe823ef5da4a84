"""Make the files that the demo ships: kfac_onnx/demo/data/kjv.txt.xz and lm.onnx.

    bible -f gen1:1-rev22:21 | python tools/make_demo.py text     (Debian package bible-kjv)
    python tools/make_demo.py model                               (extra `torch`)

Both are deterministic for a version of their tools; tests check the text and the graph's gradients.
"""

from __future__ import annotations

import lzma
import re
import sys
from pathlib import Path

DATA = Path(__file__).parents[1] / "kfac_onnx" / "demo" / "data"


def make_text() -> None:
    """Write the verses that come on standard input as lower-case words, one verse a line."""
    verses: list[str] = []
    for line in sys.stdin:
        found = re.match(r"^[1-3]?[A-Za-z]+\d+:\d+\s+(.*)$", line)
        if found is None:
            raise SystemExit(f"not a verse: {line!r}")
        verses.append(" ".join(re.findall(r"[a-z]+(?:'[a-z]+)?", found[1].lower())))
    plain = "".join(f"{verse}\n" for verse in verses).encode()
    # Text without long repeats: literal context of 4 bits and no position bits are smallest.
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}
    (DATA / "kjv.txt.xz").write_bytes(lzma.compress(plain, filters=[lzma2]))


def make_model() -> None:
    """Write the training graph of the language model, its parameters as inputs without values."""
    import torch

    from kfac_onnx.torch.export import export_training_graph

    vocabulary, context, width, hidden, classes = 12_762, 4, 64, 128, 2_001

    class LanguageModel(torch.nn.Module):
        """The next word (the 2,000 most frequent ones, or another) from the four before it."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(vocabulary, width)
            self.hidden = torch.nn.Linear(context * width, hidden)
            self.output = torch.nn.Linear(hidden, classes)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            rows = self.embedding(ids).flatten(1)
            return torch.nn.functional.cross_entropy(self.output(torch.tanh(self.hidden(rows))), labels)

    example = torch.zeros(2, context, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    export_training_graph(LanguageModel(), example, DATA / "lm.onnx", parameters_as="inputs")


if __name__ == "__main__":
    makers = {"text": make_text, "model": make_model}
    if len(sys.argv) != 2 or sys.argv[1] not in makers:
        raise SystemExit(__doc__)
    makers[sys.argv[1]]()
