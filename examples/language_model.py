"""A language model of Hugging Face: exported by its own object, trained by ONNX Runtime with K-FAC.

pip install 'kfac-onnx[torch]' transformers
python examples/language_model.py --steps 300 --folder /tmp/language_model
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kfac_onnx as kx
from kfac_onnx.torch import export_training_graph

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY, LENGTH, BATCH = 96, 24, 8


def batches(count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield sequences that count upwards from a random number, in steps of 1 or 2."""
    random = np.random.default_rng(0)
    for _ in range(count):
        start, step = random.integers(0, VOCABULARY, (BATCH, 1)), random.integers(1, 3, (BATCH, 1))
        ids = (start + step * np.arange(LENGTH)) % VOCABULARY
        yield {"input_ids": ids, "labels": ids}


def main() -> None:
    """Export, transform, train; say the loss at the beginning and at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("language_model"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    first = {name: torch.from_numpy(array) for name, array in next(batches(1)).items()}
    export_training_graph(GPT2LMHeadModel(config), first, options.folder / "train.onnx")
    model = kx.transform(options.folder / "train.onnx", lr=0.01, rest="adam", rest_lr=1e-3)
    rows = []
    with kx.TrainingSession(model) as session:
        session.fit(batches(options.steps), metrics=rows.append, progress=True)
        session.export(options.folder / "trained.safetensors")
    print(f"loss {rows[0]['loss']:.3f} at the first step, {rows[-1]['loss']:.3f} at the last of {len(rows)}")


if __name__ == "__main__":
    main()
