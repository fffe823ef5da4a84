"""Train models of Hugging Face's transformers in a session beside PyTorch; print a table.

Each model has random weights and a small configuration. It is exported by
`kfac_onnx.torch.export_training_graph` without a wrapper, transformed with plain SGD, and trained for 20
steps on random batches of two sizes, next to PyTorch's own SGD. The table holds the largest relative
difference of the loss, and that of a parameter to its largest entry. Dropout is off: both would draw other
numbers. Needs `pip install transformers`.

    python benchmarks/hugging_face/run.py [MODEL...] [--write benchmarks/hugging_face/README.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import kfac_onnx as kx
from kfac_onnx.errors import UserError
from kfac_onnx.torch import export_training_graph

VOCAB, LENGTH, WIDTH, STEPS, RATE = 60, 8, 16, 20, 0.1
FLOOR = 1e-3
"""The largest entry of a parameter counts as this at least: biases of keys stay zero, but for rounding."""

SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER_DECODER = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 16}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "BertForMaskedLM": ("BertConfig", SIZES | NO_DROPOUT),
    "BertForSequenceClassification": ("BertConfig", SIZES | NO_DROPOUT | {"num_labels": 3}),
    "RobertaForMaskedLM": ("RobertaConfig", SIZES | NO_DROPOUT | {"pad_token_id": 1}),
    "ElectraForMaskedLM": ("ElectraConfig", SIZES | NO_DROPOUT | {"embedding_size": 12}),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "AlbertForMaskedLM": ("AlbertConfig", SIZES | NO_DROPOUT | {"embedding_size": 12}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0},
    ),
    "BartForConditionalGeneration": ("BartConfig", ENCODER_DECODER),
    "MBartForConditionalGeneration": ("MBartConfig", ENCODER_DECODER),
    "PegasusForConditionalGeneration": ("PegasusConfig", ENCODER_DECODER),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        ENCODER_DECODER
        | {"num_mel_bins": 6, "max_source_positions": LENGTH, "pad_token_id": 0, "bos_token_id": 1}
        | {
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "GemmaForCausalLM": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | {"head_dim": 8}),
    "OPTForCausalLM": (
        "OPTConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24}
        | {"word_embed_proj_dim": WIDTH, "dropout": 0.0, "max_position_embeddings": 32},
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 2},
    ),
}


def batch_of(name: str, size: int) -> dict[str, torch.Tensor]:
    """Return one random batch for a model, with padding and labels that are left out where it takes them."""
    ids = torch.randint(3, VOCAB, (size, LENGTH))
    labels = torch.randint(3, VOCAB, (size, LENGTH))
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(size, 6, 2 * LENGTH), "labels": labels}
    if name.endswith("Classification"):
        labels = torch.randint(0, 3, (size,))
    else:
        labels[0, -2:] = -100
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(name: str) -> tuple[float, float, float, list[str]]:
    """Return differences of loss and parameters after 20 steps, seconds of the export, and the tables."""
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(vocab_size=VOCAB, **sizes)
    model = getattr(transformers, name)(config).train()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.onnx"
        start = time.perf_counter()
        export_training_graph(model, batch_of(name, 3), path)
        seconds = time.perf_counter() - start
        step = kx.transform(path, preset="plain-sgd", lr=RATE, rest="sgd", rest_lr=RATE)
        kx.save(step, Path(folder) / "step.onnx")
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        loss_off = 0.0
        with kx.TrainingSession(Path(folder) / "step.onnx") as session:
            for number in range(STEPS):
                batch = batch_of(name, 3 + number % 2)
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                feed = {key: value.numpy() for key, value in batch.items()}
                ours = session.step(feed)["loss"]
                loss_off = max(loss_off, abs(float(ours or np.nan) / loss.item() - 1))
            values = dict(model.named_parameters())
            parameter_off = max(
                float(np.abs(array - values[key].detach().numpy()).max() / max(np.abs(array).max(), FLOOR))
                for key, array in session.parameters.items()
            )
        return loss_off, parameter_off, seconds, [site.parameter for site in kx.scan(path).sites]


def main() -> int:
    """Try the models named on the command line, or all; return 1 if one is refused or differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="all if none")
    parser.add_argument("--write", type=Path, help="a file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    versions = ", ".join(f"{part} {importlib.metadata.version(part)}" for part in ("transformers", "torch"))
    lines = [
        "| model | loss | parameters | export, s | tables |",
        "|---|--:|--:|--:|---|",
    ]
    good = True
    for name in options.models or MODELS:
        try:
            loss, parameters, seconds, tables = trained(name)
        except UserError as error:
            good = False
            lines.append(f"| {name} | {error.message} | | | |")
        else:
            good = good and max(loss, parameters) < 1e-4
            shown = ", ".join(f"`{table}`" for table in tables)
            lines.append(f"| {name} | {loss:.1e} | {parameters:.1e} | {seconds:.0f} | {shown} |")
        print(lines[-1], flush=True)
    if options.write is not None:
        head = f"""# Models of transformers, trained beside PyTorch

Made by `python benchmarks/hugging_face/run.py --write benchmarks/hugging_face/README.md`
with {versions}: random weights, small configurations, {STEPS} steps of SGD
at rate {RATE} on batches of 3 and 4 in turn, no dropout. Columns: the largest relative difference of the loss
from PyTorch's, the largest difference of a parameter by its largest entry, seconds of the export, and the
tables that `scan` finds.

"""
        options.write.write_text(head + "\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
