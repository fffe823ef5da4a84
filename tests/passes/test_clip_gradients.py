"""Clipping, held against float64 on committed graphs: plain steps of all parameters, so that a step is a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from corpus_cases import GRAPHS, marked, to_table

from kfac_onnx import UserError, scan, transform
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Mapping

LR = 0.5
ROUNDING = 2e-6
"""A few units in the last place of float32 weights of about 1, once for each lookup of a row, over lr."""
NAMES = [
    "ortart_legcore__twotower",  # several tables
    "torchjoint_in__nplm",  # repeated ids
    "torchjoint_in__nplm_pad0",  # dropped rows
    "ortart_legloss__gpt_tied",  # a tied table, a position table
]


def pipeline(clip: str) -> str:
    optimizer = f"insert-optimizer{{method=sgd,parameters=all,lr={LR}}}"
    return f"find-embeddings,{clip},{optimizer},close-step,dce,lower"


def movement(
    name: str, clip: str, *, threads: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what a step subtracts from each parameter, divided by lr, and the exporter's float32 gradients."""
    case, graph = marked(name)
    weights = graph.initial(case)
    out = graph.run({**case.feed(), **graph.fed_back(case), **weights})
    gradients = {item.name: np.asarray(out[item.gradient], np.float64) for item in graph.parameters}
    with TrainingSession(
        transform(case.path, pipeline=pipeline(clip)), parameters=weights, threads=threads
    ) as session:
        feed = case.feed() | graph.fed_back(case)
        assert session.step({item.name: feed[item.name] for item in session.batch_inputs})["skipped"] is False
        moved = {
            key: (np.asarray(weights[key], np.float64) - np.asarray(session.parameters[key], np.float64)) / LR
            for key in gradients
        }
    return moved, gradients


def norm(gradients: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values())))


def assert_close(moved: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    size = max(np.abs(value).max() for value in want.values())
    for key, value in want.items():
        assert np.abs(moved[key] - value).max() <= 4e-6 * size + ROUNDING, key
    wrong = [np.abs(1.01 * moved[key] - value).max() > 4e-6 * size + ROUNDING for key, value in want.items()]
    assert any(wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_the_global_norm_is_that_of_all_dense_gradients(name: str, share: float) -> None:
    _, gradients = movement(name, "clip-gradients{norm=1e9}")
    most = share * norm(gradients)
    moved, gradients = movement(name, f"clip-gradients{{norm={most}}}", threads=4)
    scale = min(1.0, most / (norm(gradients) + 1e-6))
    assert (scale < 1.0) == (share < 1.0)
    assert_close(moved, {key: scale * value for key, value in gradients.items()})


@pytest.mark.parametrize("name", NAMES)
def test_values_are_clipped_as_in_the_dense_gradient(name: str) -> None:
    _, gradients = movement(name, "clip-gradients{norm=1e9}")
    most = 0.3 * max(np.abs(value).max() for value in gradients.values())
    moved, gradients = movement(name, f"clip-gradients{{value={most}}}", threads=4)
    want = {key: np.clip(value, -most, most) for key, value in gradients.items()}
    assert any(np.abs(want[key] - gradients[key]).max() > 0 for key in want)
    assert_close(moved, want)


def test_values_come_before_the_norm() -> None:
    name = "torchjoint_in__nplm"
    _, gradients = movement(name, "clip-gradients{norm=1e9}")
    most = 0.3 * max(np.abs(value).max() for value in gradients.values())
    clipped = {key: np.clip(value, -most, most) for key, value in gradients.items()}
    limit = 0.5 * norm(clipped)
    moved, _ = movement(name, f"clip-gradients{{norm={limit},value={most}}}")
    scale = limit / (norm(clipped) + 1e-6)
    assert_close(moved, {key: scale * value for key, value in clipped.items()})


def test_the_block_preconditions_what_was_clipped() -> None:
    """Preset half is linear in the gradient at given factors: scaling by s scales G by s², so nothing is left of it."""
    case, graph = marked("torchjoint_in__nplm")
    site, weights = graph.sites[0], graph.initial(case)
    moved = []
    for clip in ("", "clip-gradients{norm=0.001},"):
        text = f"find-embeddings,{clip}insert-embedding-kfac{{lr=0.01}},insert-optimizer,close-step,dce,lower"
        with TrainingSession(transform(case.path, pipeline=text), parameters=weights, threads=1) as session:
            feed = case.feed() | graph.fed_back(case)
            session.step({item.name: feed[item.name] for item in session.batch_inputs})
            new = np.asarray(session.parameters[site.parameter], np.float64)
        moved.append(to_table(np.asarray(weights[site.parameter], np.float64) - new, site))
    assert np.abs(moved[0]).max() > 1e-4
    # Both are one step of the whitened direction; damping is relative, so it scales along.
    np.testing.assert_allclose(moved[1], moved[0], rtol=0, atol=1e-3 * np.abs(moved[0]).max())


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    case, graph = marked("torchjoint_in__nplm")
    weights = graph.initial(case)
    broken = {key: np.asarray(value) for key, value in weights.items()}
    name = next(key for key, value in broken.items() if value.ndim == 1)
    broken[name] = np.full_like(broken[name], 3e38)
    model = transform(case.path, pipeline=pipeline("clip-gradients{norm=1}"))
    with TrainingSession(model, parameters=broken, threads=1) as session:
        feed = case.feed() | graph.fed_back(case)
        metrics = session.step({item.name: feed[item.name] for item in session.batch_inputs})
        assert metrics["skipped"] is True
        for key, value in broken.items():
            np.testing.assert_array_equal(session.parameters[key], value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "find-embeddings,clip-gradients",
            "clip-gradients has nothing to do\n"
            "  in:   clip-gradients, pass 2 of 2\n"
            "  help: give it norm=C, value=C, or both",
        ),
        (
            "find-embeddings,insert-embedding-kfac,clip-gradients{norm=1}",
            "clip-gradients comes after a pass that already reads the gradients\n"
            "  in:   clip-gradients\n"
            "  help: put it right after find-embeddings: find-embeddings,clip-gradients{norm=1},...",
        ),
    ],
)
def test_misuse_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        transform(GRAPHS / "torchjoint_in__nplm.onnx", pipeline=text)
    assert str(caught.value) == message


def test_a_kept_optimizer_is_not_clipped_behind_its_back() -> None:
    path = GRAPHS / "tf2onnx_sgd__nplm.onnx"
    assert scan(path).frontend == "optimizer-inside"
    text = "find-embeddings,clip-gradients{norm=1},insert-embedding-kfac{shape=dense},close-step,dce,lower"
    with pytest.raises(UserError, match="cannot bound what the graph's own optimizer reads"):
        transform(path, pipeline=text, shape="dense")
