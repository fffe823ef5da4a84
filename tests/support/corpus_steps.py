"""Steps of a session on the committed graphs, compared with the float64 reference one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from corpus_cases import StepReference, marked

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["compare", "rest_of"]

# One step of rounding, relative to the largest entry of a parameter: a few units in the last place of its
# dtype; float16 gradients add their own rounding, amplified by the inverse root.
ROOT = 1e-4  # of the movement: of the float32 root, at most 2·eps·(1 + D/ρ), and 6e-5 measured (a tied table)
TOLERANCE = {np.float32: 4e-6, np.float16: 1.5e-3, ml_dtypes.bfloat16: 1.2e-2}


def compare(
    name: str,
    preset: str,
    threads: int,
    steps: int,
    rest: str = "adam",
    scaled: float = 1.0,
    lowered: Mapping[str, Any] | None = None,
    opened: Mapping[str, Any] | None = None,
    looser: float = 1.0,
    **options: Any,
) -> None:
    """Assert that each of some steps of a session on a committed graph equals the float64 reference's.

    `lowered` are further options of `transform` and `opened` of the session; tolerances are `looser` times those
    of the CPU.
    """
    case, graph = marked(name)
    weights = graph.initial(case)
    reference = StepReference(graph, weights, preset, 0.01, rest, 1e-3, **options)
    scale = 1.0 if preset == "r1.7" and graph.loss is None else None  # the host's loss is a sum
    model = transform(
        case.path,
        preset=preset,
        lr=0.01,
        rest=rest,
        rest_lr=1e-3,
        grad_scale=scale,
        **options,
        **(lowered or {}),
    )
    trained = {item.name for item in graph.parameters}
    batches = [
        {key: value for key, value in case.feed(which).items() if key not in trained} | graph.fed_back(case)
        for which in ("in", "in2")
    ]
    with TrainingSession(model, parameters=weights, threads=threads, **(opened or {})) as session:
        names = {item.name for item in session.batch_inputs}
        for t in range(steps):
            batch = {key: value for key, value in batches[t % 2].items() if key in names}
            reference.weights = {
                key: np.asarray(session.parameters[key], np.float64) for key in session.parameters
            }
            start = dict(reference.weights)
            out = graph.run(reference.feed(batch))
            reference.step(out)
            metrics = session.step(batch)
            assert metrics["skipped"] is False
            if graph.loss is None:
                assert metrics["loss"] is None
            else:
                loss = np.asarray(out[graph.loss], np.float64)
                np.testing.assert_allclose(
                    metrics["loss"], loss, rtol=looser * (2e-3 if half(weights) else 2e-6)
                )
            for key, want in reference.weights.items():
                got = np.asarray(session.parameters[key], np.float64) * scaled
                dtype = np.float32 if not half(weights) else narrowest(weights)
                limit = looser * TOLERANCE[dtype] * max(np.abs(want).max(), 1e-3)
                limit += ROOT * np.abs(want - start[key]).max()
                error = np.abs(got - want).max()
                assert error <= limit, f"{name}, {preset}, step {t + 1}, {key}: {error:.2e} > {limit:.2e}"


def half(weights: dict[str, np.ndarray]) -> bool:
    """Return whether some weights are of half precision."""
    return any(value.dtype in (np.float16, ml_dtypes.bfloat16) for value in weights.values())


def narrowest(weights: dict[str, np.ndarray]) -> type:
    """Return the dtype that rounds most."""
    dtypes = {value.dtype.type for value in weights.values()}
    return ml_dtypes.bfloat16 if ml_dtypes.bfloat16 in dtypes else np.float16


def rest_of(name: str) -> str:
    """Adam divides the key bias of attention, whose gradient is rounding noise, by that noise."""
    return "sgd" if "gpt" in name or "lm" in name else "adam"
