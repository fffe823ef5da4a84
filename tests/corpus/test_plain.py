"""Ordinary optimizers on the tables, for comparison: twelve steps equal their float64 references."""

from __future__ import annotations

import numpy as np
import pytest
from corpus_cases import OPTIMIZERS, Case, MarkedGraph

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession

GRAPHS = ["torchjoint_in__nplm_pad0", "ortart_legcore__siamese", "torchjoint_in__lookup_axis1"]


@pytest.mark.parametrize("name", [*GRAPHS, "ortart_legloss__gpt_tied"])
@pytest.mark.parametrize("method", ["sgd", "momentum", "adam", "adagrad"])
def test_tables_follow_the_plain_optimizer(name: str, method: str) -> None:
    case = Case(name)
    graph = MarkedGraph(case)
    weights = graph.initial(case)
    model = transform(case.path, preset=f"plain-{method}", lr=0.05, rest="sgd", rest_lr=1e-3)
    tables = {site.parameter for site in graph.sites}
    gradients = {item.name: item.gradient for item in graph.parameters}
    reference = {
        key: OPTIMIZERS[method](lr=0.05) if key in tables else OPTIMIZERS["sgd"](lr=1e-3) for key in weights
    }
    with TrainingSession(model, parameters=weights, threads=2) as session:
        for t in range(12):
            feed = case.feed("in" if t % 2 == 0 else "in2")
            batch = {item.name: feed[item.name] for item in session.batch_inputs}
            before = {key: np.array(session.parameters[key]) for key in weights}
            out = graph.run({**feed, **before})
            assert session.step(batch)["skipped"] is False
            for key, value in before.items():
                want = reference[key].step(value, out[gradients[key]])
                # A few units in the last place of the largest weight, and of what Adam makes of a
                # gradient that is rounding noise: its size is lr whatever the noise.
                noise = 0.05 * 2e-4 if method in ("adam", "adagrad") else 0.0
                limit = 4e-6 * np.abs(want).max() + noise
                np.testing.assert_allclose(session.parameters[key], want, rtol=0, atol=limit, err_msg=key)
