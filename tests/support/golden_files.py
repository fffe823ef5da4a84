"""Fixture: writes golden files of runs that the original never made, from the float64 reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.fisher.settings import settings_of
from kfac_onnx.reference import BlockReference, BlockSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEFAULTS: dict[str, Any] = {
    "backend": "r1.7",
    "batch_sizes": [6],
    "damping": 0.1,
    "ema_decay": 0.95,
    "embed_dim": 4,
    "exps": [],
    "ids_per_example": None,
    "num_batches": 3,
    "num_sources": 1,
    "num_uses": None,
    "schedule": ["eval:init", "cov:0", "inv", "eval:a", "cov:1", "cov:2", "eval:stale", "inv", "eval:b"],
    "vector": "sparse",
    "vocab_size": 9,
}


def write_golden(
    path: Path, *, seed: int = 0, switches: dict[str, Any] | None = None, **changed: Any
) -> Path:
    """A file in the golden format; `switches` replace fields of the version's BlockSettings."""
    rng = np.random.default_rng(seed)
    s = DEFAULTS | changed
    s["num_towers"] = len(s["batch_sizes"])
    uses = [""] if s["num_uses"] is None else [f"_u{u}" for u in range(s["num_uses"])]
    arrays: dict[str, Any] = {}
    width = [] if s["ids_per_example"] is None else [s["ids_per_example"]]
    for b in range(s["num_batches"]):
        for t, size in enumerate(s["batch_sizes"]):
            for u in uses:
                ids = rng.integers(-1, s["vocab_size"] + 1, [size, *width]).astype(np.int32)
                arrays[f"in.ids_b{b}_t{t}{u}"] = ids
                for k in range(s["num_sources"]):
                    grads = rng.normal(size=(size, s["embed_dim"])).astype(np.float32)
                    arrays[f"in.grads_b{b}_s{k}_t{t}{u}"] = grads
    indices: Any = None
    if s["vector"] == "sparse":
        indices = rng.integers(0, s["vocab_size"], 11).astype(np.int32)
        values = rng.normal(size=(11, s["embed_dim"])).astype(np.float32)
        arrays |= {"in.vec_indices": indices, "in.vec_values": values}
    else:
        values = rng.normal(size=(s["vocab_size"], s["embed_dim"])).astype(np.float32)
        arrays["in.vec_dense"] = values
    version = settings_of(s["backend"])
    block = BlockReference(
        s["vocab_size"],
        s["embed_dim"],
        BlockSettings(
            **{
                "start_at_zero": version.start_at_zero,
                "debias": version.zero_debias,
                "unknown_before_first": version.unknown_before_first,
                "pi": version.pi,
                "towers": version.towers,
                "inverse_starts_at_zero": version.inverse_starts_at_zero,
            }
            | ({} if switches is None else switches)
        ),
        num_uses=1 if s["num_uses"] is None else s["num_uses"],
        exponents=s["exps"],
    )
    for step in s["schedule"]:
        verb, _, tag = step.partition(":")
        if verb == "cov":
            ids = [[arrays[f"in.ids_b{tag}_t{t}{u}"] for u in uses] for t in range(s["num_towers"])]
            grads = [
                [[arrays[f"in.grads_b{tag}_s{k}_t{t}{u}"] for u in uses] for t in range(s["num_towers"])]
                for k in range(s["num_sources"])
            ]
            block.covariance_update(ids, grads, s["ema_decay"])
        elif verb == "inv":
            block.inverse_update(s["damping"])
        else:
            damping = s.get("session_override", {}).get(tag, s["damping"])
            out = {"input_cov": block.input_factor, "output_cov": block.output_factor, "pi": block.pi()}
            out["input_damping"], out["output_damping"] = block.dampings(damping)
            out |= {"output_inverse": block.stored[-1.0], "full_fisher_block": block.full_fisher_block()}
            suffix = "" if indices is None else "_values"
            for name, exponent in {"multiply": 1.0, "multiply_inverse": -1.0}.items():
                out[name + suffix] = block.multiply_matpower(values, indices, damping, exponent)
            for exponent in s["exps"]:
                product = block.multiply_matpower(values, indices, damping, exponent)
                out[f"matpower_{exponent}{suffix}"] = product
            arrays |= {f"out.{tag}.{name}": np.asarray(x, np.float32) for name, x in out.items()}
    arrays["settings"] = np.array(json.dumps(s))
    np.savez(path, **arrays)
    return path


@pytest.fixture
def make_golden() -> Callable[..., Path]:
    return write_golden
