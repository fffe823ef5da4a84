"""Decay, patterns and rates of `insert-optimizer`, held against float64 on a committed graph."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from corpus_cases import GRAPHS, marked

from kfac_onnx import UserError, metadata, transform
from kfac_onnx.metadata import Step
from kfac_onnx.reference import AdamReference, SgdReference
from kfac_onnx.runtime import TrainingSession

NAME = "torchjoint_in__nplm"
LR = 0.05


def trained(optimizers: str, steps: int = 4) -> list[dict[str, np.ndarray]]:
    """Return the parameters before the first and after each of some steps, of a pipeline of optimizers."""
    case, graph = marked(NAME)
    weights = graph.initial(case)
    model = transform(case.path, pipeline=f"find-embeddings,{optimizers},close-step,dce,lower")
    history = [weights]
    with TrainingSession(model, parameters=weights, threads=1) as session:
        feed = case.feed() | graph.fed_back(case)
        for _ in range(steps):
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
            history.append({key: np.asarray(session.parameters[key]) for key in weights})
    return history


def gradients_at(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    case, graph = marked(NAME)
    out = graph.run({**case.feed(), **graph.fed_back(case), **weights})
    return {item.name: np.asarray(out[item.gradient], np.float64) for item in graph.parameters}


def assert_steps(
    history: list[dict[str, np.ndarray]], decays: dict[str, float], kind: type[SgdReference]
) -> None:
    """Each step is the optimizer's of W·(1 − lr·decay), at the gradient of W."""
    optimizers = {key: kind(LR) for key in decays}
    wrong = 0.0
    for before, after in itertools.pairwise(history):
        gradients = gradients_at(before)
        for key, decay in decays.items():
            old = np.asarray(before[key], np.float64)
            want = optimizers[key].step(old * (1 - LR * decay), gradients[key])
            # A few units in the last place, and Adam's quotient of two float32 moments.
            limit = 4e-6 * np.abs(old).max() + 1e-4 * np.abs(want - old).max()
            assert np.abs(after[key] - want).max() <= limit, key
            moved = old + 1.01 * (np.asarray(after[key], np.float64) - old)
            wrong = max(wrong, np.abs(moved - want).max() / limit)
    assert wrong > 1.0  # one percent more movement would have been seen


def shapes() -> dict[str, int]:
    case, graph = marked(NAME)
    return {key: value.ndim for key, value in graph.initial(case).items()}


def tables() -> set[str]:
    return {site.parameter for site in marked(NAME)[1].sites}


@pytest.mark.parametrize(
    ("options", "matrices", "vectors"),
    [
        ("method=adamw", 0.01, 0.0),
        ("method=adamw,weight-decay=0.5", 0.5, 0.0),
        ("method=adamw,weight-decay=0.5,decay-vectors=true", 0.5, 0.5),
        ("method=adamw,weight-decay=0", 0.0, 0.0),
        ("method=adam", 0.0, 0.0),
        ("method=adam,weight-decay=0.5", 0.5, 0.0),
    ],
)
def test_adam_with_decoupled_decay(options: str, matrices: float, vectors: float) -> None:
    history = trained(f"insert-optimizer{{parameters=all,lr={LR},{options}}}")
    ranks = shapes()
    decays = {
        key: 0.0 if key in tables() else matrices if rank > 1 else vectors for key, rank in ranks.items()
    }
    assert {0.0, matrices} <= set(decays.values())
    assert_steps(history, decays, AdamReference)


def test_decay_goes_with_any_method() -> None:
    history = trained(f"insert-optimizer{{method=sgd,parameters=all,lr={LR},weight-decay=0.5}}")
    decays = {key: 0.5 if rank > 1 and key not in tables() else 0.0 for key, rank in shapes().items()}
    assert_steps(history, decays, SgdReference)


def test_parameters_by_pattern_and_the_first_pass_has_them() -> None:
    vector = next(key for key, rank in shapes().items() if rank == 1)
    history = trained(
        f"insert-optimizer{{method=sgd,parameters=all,only=[{vector}],lr={LR},rate=kfac/lr_of_one}},"
        f"insert-optimizer{{method=adam,parameters=all,lr={LR}}}"
    )
    assert_steps(history, {vector: 0.0}, SgdReference)
    assert_steps(history, {key: 0.0 for key in shapes() if key != vector}, AdamReference)


def test_a_rate_of_its_own() -> None:
    model = transform(
        GRAPHS / f"{NAME}.onnx",
        pipeline="find-embeddings,insert-optimizer{method=sgd,parameters=tables,rate=kfac/lr_of_tables,lr=0.5},"
        "insert-optimizer{lr=0.25},close-step,dce,lower",
    )
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert {rate.input: rate.default for rate in step.learning_rates} == {
        "kfac/lr_of_tables": 0.5,
        "kfac/rest_lr": 0.25,
    }


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(UserError) as caught:
        transform(
            GRAPHS / f"{NAME}.onnx",
            pipeline="find-embeddings,insert-optimizer{only=[m.emb.weigth]},close-step,dce,lower",
        )
    assert str(caught.value) == (
        "'m.emb.weigth' matches no trained parameter; did you mean 'm.emb.weight'?\n"
        "  in:   insert-optimizer\n"
        "  help: `scan MODEL` lists the trained parameters"
    )
