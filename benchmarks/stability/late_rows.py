"""What rows that are met late in a run do to it: their first steps at t = 100,000.

    python benchmarks/stability/late_rows.py [--write FILE]

The demo's language model is trained for 500 steps on examples without 30 % of the rarer words. Then the
counter of the window is set to 100,000, as if that long had passed, and it is trained on all examples.
Held-out losses are of examples with such a word (`late`) and without (`early`), at some steps after the
change. A window that widens for ever (`least` 0) gives a row that is met first a step of 100·lr, one with
`least` 0.01 a step of 10·lr.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import kfac_onnx as kx
from kfac_onnx.demo.corpus import Corpus, load_corpus
from kfac_onnx.demo.model import initial_parameters
from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.fisher.row_scales import Window

BATCH, BEFORE, LATE, COMMON, SHARE = 256, 500, 100_000, 200, 0.3
AFTER = (1, 5, 20, 50, 100, 200, 300)


def late_words(corpus: Corpus) -> Any:
    """Return which words are withheld at first, bool[words]: some of those that are not common."""
    count = len(corpus.words)
    return (np.arange(count) >= COMMON) & (np.random.default_rng(0).random(count) < SHARE)


def run(corpus: Corpus, least: float, lr: float, seed: int, counter: int) -> dict[str, Any]:
    """Train with a window of that bound; return held-out losses by the steps since the late words came."""
    withheld = late_words(corpus)
    has_late = withheld[corpus.examples(corpus.train)["ids"]].any(axis=1)
    early = corpus.train[~has_late]
    rare = withheld[corpus.examples(corpus.valid)["ids"]].any(axis=1)
    held_out = {"late": corpus.valid[rare], "early": corpus.valid[~rare]}
    preset = replace(PRESETS["adaptive"], rows=Window(least=least))
    graph = resources.files("kfac_onnx.demo").joinpath("data/lm.onnx")
    with resources.as_file(graph) as path, mock.patch.dict(PRESETS, {"adaptive": preset}):
        model = kx.transform(path, preset="adaptive", lr=lr, rest="adam", rest_lr=0.003)
    (count,) = (str(value.name) for value in model.graph.inputs if str(value.name).endswith("window.count"))
    random, losses = np.random.default_rng([seed, 1]), {}
    parameters = initial_parameters(seed)
    with kx.TrainingSession(model, parameters=parameters, threads=1) as session:
        for _ in range(BEFORE):
            session.step(corpus.examples(random.choice(early, BATCH)))
        session._open.holders[count].live.write(np.asarray(counter, np.int64))
        for step in range(1, AFTER[-1] + 1):
            session.step(corpus.examples(random.choice(corpus.train, BATCH)))
            if step in AFTER:
                losses[step] = {
                    name: round(session.evaluate([corpus.examples(positions)]), 4)
                    for name, positions in held_out.items()
                }
    return {"least": least, "lr": lr, "seed": seed, "counter": counter, "held_out": losses}


def main() -> None:
    """Train with windows of several bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--write", type=Path, metavar="FILE", help="append the lines to this file too")
    options = parser.parse_args()
    corpus = load_corpus()
    for seed in range(options.seeds):
        for least, counter in ((0.0, BEFORE), (0.0, LATE), (0.001, LATE), (0.01, LATE)):
            line = json.dumps(run(corpus, least, options.lr, seed, counter))
            print(line, flush=True)
            if options.write is not None:
                with options.write.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
