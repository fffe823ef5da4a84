"""Ratings in a Parquet file, a model of users and items: train it, look at it, export it.

pip install 'kfac-onnx[data]'
python examples/recommender.py --steps 2000 --folder /tmp/recommender
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq

from kfac_onnx.cli.main import main as kfac_onnx

USERS, ITEMS, WIDTH = 500, 300, 16

MODEL = """<ir_version: 10, opset_import: ["" : 18]>
recommender (int64[batch] user, int64[batch] item) => (float[batch] score) {
  u = Gather(users, user)
  i = Gather(items, item)
  product = Mul(u, i)
  axis = Constant<value_ints = [1]>()
  match = ReduceSum<keepdims = 0>(product, axis)
  popular = Gather(bias, item)
  score = Add(match, popular)
}"""


def write_model(path: Path, random: np.random.Generator) -> None:
    """Write the forward model with first values for its three tables."""
    model = onnx.parser.parse_model(MODEL)
    for name, shape in (("users", (USERS, WIDTH)), ("items", (ITEMS, WIDTH)), ("bias", (ITEMS,))):
        values = random.normal(0, 0.1, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, path)


def write_ratings(path: Path, random: np.random.Generator, count: int) -> None:
    """Write ratings that a hidden taste of eight numbers explains, popular items more often."""
    taste, style = random.normal(0, 0.6, (USERS, 8)), random.normal(0, 0.6, (ITEMS, 8))
    user, item = random.integers(0, USERS, count), (random.power(0.4, count) * ITEMS).astype(np.int64)
    rating = (taste[user] * style[item]).sum(1) + random.normal(0, 0.1, count)
    pq.write_table(pa.table({"user": user, "item": item, "rating": rating.astype(np.float32)}), path)


def main() -> None:
    """Make the data and the model, then run four commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("recommender"))
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    write_model(folder / "forward.onnx", random)
    write_ratings(folder / "train.parquet", random, 60_000)
    commands = (
        "differentiate F/forward.onnx --loss mse --labels rating -o F/train.onnx",
        "transform F/train.onnx -o F/train.kfac.onnx --lr 0.02",
        "train F/train.kfac.onnx --data F/train.parquet --batch-size 256 --steps N"
        " --metrics F/rows.jsonl --report F/run.html --export F/trained.onnx",
        "inspect F/train.kfac.onnx --html F/inspect.html",
    )
    for command in commands:
        words = [word.replace("F/", f"{folder}/") for word in command.split()]
        code = kfac_onnx([str(options.steps) if word == "N" else word for word in words])
        if code != 0:
            sys.exit(code)


if __name__ == "__main__":
    main()
