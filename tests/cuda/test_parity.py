"""Twenty steps in a row: the same parameters as by the float64 reference and as on the CPU.

Rounding piles up over the steps: each may add its own (1e-5 of a parameter's largest entry for float32, as in
`corpus_steps` with room for the graph's own), and a difference is carried through later gradients. So twenty
steps may differ by 1e-3 of what they moved, plus twenty roundings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from corpus_cases import StepReference, marked

from kfac_onnx.api import transform
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conftest import Place

STEPS = 20
GRAPHS = ["torchjoint_in__nplm_pad0", "ortart_legcore__nplm", "torchjoint_in__gpt_tied"]
LOWERED = [{"target": "cuda"}, {"target": "cuda", "deterministic": True}]


def assert_close(found: Mapping[str, Any], wanted: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    for name, want in wanted.items():
        moved = float(np.abs(want - start[name]).max())
        limit = 1e-3 * moved + STEPS * 1e-6 * max(float(np.abs(want).max()), 1e-3)
        error = float(np.abs(np.asarray(found[name], np.float64) - want).max())
        assert moved > 0 or error == 0
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("lowered", LOWERED, ids=["atomic", "ordered"])
@pytest.mark.parametrize("preset", ["half", "adagrad"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_float64_reference(place: Place, name: str, preset: str, lowered: dict[str, Any]) -> None:
    case, graph = marked(name)
    start = graph.initial(case)
    reference = StepReference(graph, start, preset, 0.01, "sgd", 1e-3)
    model = transform(case.path, preset=preset, lr=0.01, rest="sgd", rest_lr=1e-3, **lowered)
    with TrainingSession(model, parameters=start, threads=1, **place.opened) as session:
        names = [item.name for item in session.batch_inputs]
        for t in range(STEPS):
            feed = case.feed("in" if t % 2 == 0 else "in2")
            batch = {key: feed[key] for key in names}
            reference.step(graph.run(reference.feed(batch)))
            assert session.step(batch)["skipped"] is False
        assert_close(session.parameters, reference.weights, start)
        scaled = {key: start[key] + 1.01 * (value - start[key]) for key, value in session.parameters.items()}
        with pytest.raises(AssertionError):
            assert_close(scaled, reference.weights, start)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_cpu(
    place: Place, monkeypatch: pytest.MonkeyPatch, trained: Callable[..., Any], name: str
) -> None:
    there = trained(name, STEPS, {"target": "cuda"}, place.opened)
    monkeypatch.undo()
    here = trained(name, STEPS, {}, {})
    case, graph = marked(name)
    start = graph.initial(case)
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-4)
    assert_close(
        there.states,
        {key: np.asarray(here.states[key], np.float64) for key in start if key in here.states},
        start,
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_rows_in_one_order_give_the_same_bits_in_every_run(
    place: Place, trained: Callable[..., Any], name: str
) -> None:
    runs = [trained(name, STEPS, LOWERED[1], place.opened) for _ in range(2)]
    assert runs[0].bits == runs[1].bits
