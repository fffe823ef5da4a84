"""Coming from onnxruntime-training: its training_model.onnx, trained by plain ONNX Runtime.

There it was

    module = Module("training_model.onnx", checkpoint, "eval_model.onnx")
    optimizer = Optimizer("optimizer_model.onnx", module)
    for batch in batches:
        loss = module(*batch); optimizer.step(); module.lazy_reset_grad()

Here the optimizer is part of the step, and nothing but the plain wheel is needed:

    python examples/from_artifacts.py --model artifacts/training_model.onnx --weights artifacts/checkpoint

Without --model it takes a small one that lies in the tests of this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import kfac_onnx as kx

SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "graphs" / "ortart_dyncore__lookup_index"


def main() -> None:
    """Look at the graph, transform it, train on one batch again and again, export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SAMPLE.with_suffix(".onnx"))
    parser.add_argument("--weights", type=Path, help="a checkpoint folder, .npz or .safetensors")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("from_artifacts"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    report = kx.scan(options.model)
    for site in report.sites:
        print(f"table {site.parameter}: {site.vocab_size} x {site.embedding_dim}")
    model = kx.transform(options.model, lr=0.01, rest="adam", rest_lr=1e-3)

    with np.load(SAMPLE.with_suffix(".npz")) as file:
        sample = {name.removeprefix("in:"): file[name] for name in file.files if name.startswith("in:")}
    weights = options.weights
    if weights is None:
        weights = {item.name: sample[item.name] for item in report.parameters}
    with kx.TrainingSession(model, parameters=weights) as session:
        batch = {item.name: sample[item.name] for item in session.batch_inputs}
        losses = [session.step(batch)["loss"] for _ in range(options.steps)]
        session.export(options.folder / "trained.safetensors")
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")


if __name__ == "__main__":
    main()
