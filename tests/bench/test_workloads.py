"""Every workload trains, by every kind of arm, on the graph that PyTorch computes the same loss for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx.bench.arms import ARMS, choose, open_arm
from kfac_onnx.bench.measure import measure
from kfac_onnx.bench.workloads import WORKLOADS, cases, zipf_ids
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.saved.weights import read_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kfac_onnx.bench.workloads import Case

    Small = Callable[[str], tuple[Case, Path]]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("preset", ["plain-sgd", "half"])
def test_every_workload_trains(small: Small, workload: str, preset: str) -> None:
    case, parameters = small(workload)
    # At these rates a step on one batch, made again and again, must learn it.
    trainee = open_arm(ARMS[preset], case, parameters, threads=1, lr={"plain-sgd": 0.5, "half": 0.02}[preset])
    batch = next(case.batches(0))
    losses = [trainee.step(batch) for _ in range(12)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.97 * losses[0]
    assert trainee.state_bytes == 0 if preset == "plain-sgd" else trainee.state_bytes > 0
    trainee.close()


def test_the_loss_of_factorisation_is_its_formula(small: Small) -> None:
    case, parameters = small("mf")
    values, batch = read_weights(parameters), next(case.batches(0))
    rows = values["user"][batch["users"]] * values["item"][batch["items"]]
    expected = np.mean((rows.astype(np.float64).sum(1) + values["bias"] - batch["ratings"]) ** 2)
    trainee = open_arm(ARMS["plain-sgd"], case, parameters, threads=1)
    # float32 sums of 8 products and a mean of 64 squares.
    assert trainee.step(batch) == pytest.approx(expected, rel=1e-5)
    trainee.close()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_pytorch_trains_the_same_model(small: Small, workload: str) -> None:
    pytest.importorskip("torch")
    compare_with(small, workload, "torch-sgd")


@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "movielens"])
def test_fbgemm_trains_the_same_model(small: Small, workload: str) -> None:
    pytest.importorskip("fbgemm_gpu")
    compare_with(small, workload, "fbgemm-sgd")


def compare_with(small: Small, workload: str, name: str) -> None:
    case, parameters = small(workload)
    batches = case.batches(0)
    arms = [open_arm(ARMS[arm], case, parameters, threads=1, lr=0.1) for arm in ("plain-sgd", name)]
    for _ in range(3):
        batch = next(batches)
        ours, theirs = (arm.step(batch) for arm in arms)
        # The same numbers in another order of summation, in float32.
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_what_fbgemm_cannot_hold_is_left_out_by_name(small: Small) -> None:
    pytest.importorskip("fbgemm_gpu")
    case, parameters = small("movielens")
    arms = [ARMS[name] for name in ("plain-sgd", "fbgemm-sgd")]
    timings = measure(case, arms, parameters, steps=1, threads=1, seconds=0.1, tell=lambda text: None)
    assert timings["fbgemm-sgd"].ms is None
    assert timings["fbgemm-sgd"].skipped == "FBGEMM wants widths that are multiples of 4, not 1"


@pytest.mark.parametrize(("package", "arm"), [("torch", "torch-sgd"), ("fbgemm_gpu", "fbgemm-sgd")])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str, arm: str) -> None:
    right = importlib.util.find_spec
    missing = lambda name: None if name == package else (right(name) or object())  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    who, extra = ("PyTorch", "torch") if package == "torch" else ("FBGEMM", "fbgemm")
    with pytest.raises(UserError) as caught:
        choose([arm], torch=False)
    want = f"{who}'s optimizers need {who}\n  help: pip install 'kfac-onnx[{extra}]'"
    assert str(caught.value) == want


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if not arm.ours])
def test_others_go_on_from_their_checkpoints(small: Small, tmp_path: Path, name: str) -> None:
    pytest.importorskip("fbgemm_gpu" if ARMS[name].fbgemm else "torch")
    case, parameters = small("mf")
    batches = case.batches(0)
    first, second, third = (next(batches) for _ in range(3))
    trainee = open_arm(ARMS[name], case, parameters, threads=1)
    trainee.step(first)
    assert (trainee.state_bytes > 0) == (not name.endswith("-sgd"))
    trainee.save(tmp_path / "run.ckpt")
    expected = [trainee.step(second), trainee.step(third)]
    trainee.resume(tmp_path / "run.ckpt")
    assert [trainee.step(second), trainee.step(third)] == expected


@pytest.mark.parametrize("workload", ["mf", "dlrm"])
def test_a_graph_does_not_grow_with_the_vocabulary(workload: str) -> None:
    sizes = []
    for V in (1_000, 10_000_000):
        graph = cases(workload, vocab_sizes=(V,))[0].graph()
        assert isinstance(graph, ir.Model)
        sizes.append(len(ir.to_proto(graph).SerializeToString()))
    assert sizes[1] < sizes[0] + 400  # a few longer numbers
    assert sizes[1] < 100_000


def test_zipf_ids_follow_their_ranks() -> None:
    V = 10_000
    ids = zipf_ids(np.random.default_rng(0), V, (200_000,))
    assert ids.min() >= 0
    assert ids.max() < V
    counts = np.bincount(ids, minlength=V)
    most = np.argsort(-counts)[:2]
    assert list(most) == [0, 2_654_435_761 % V]  # ranks 0 and 1
    # P(rank 0) = log 2 / log(V + 1) = 0.0753; its standard error in 200,000 draws is 0.0006.
    assert counts[0] / len(ids) == pytest.approx(np.log(2) / np.log(V + 1), abs=0.003)


def test_zipf_ids_of_another_exponent() -> None:
    V, exponent = 10_000, 1.2
    ids = zipf_ids(np.random.default_rng(0), V, (200_000,), exponent)
    ends = np.arange(1, V + 2, dtype=np.float64) ** (1 - exponent)
    shares = np.diff(ends) / (ends[-1] - ends[0])
    counts = np.bincount(ids, minlength=V) / len(ids)
    for rank in range(3):  # a standard error of at most 0.001
        assert counts[rank * 2_654_435_761 % V] == pytest.approx(shares[rank], abs=0.004)


def test_batches_repeat_with_their_seed(small: Small) -> None:
    for workload in WORKLOADS:
        case, _ = small(workload)
        one, same, other = (next(case.batches(seed)) for seed in (0, 0, 1))
        assert all(np.array_equal(one[name], same[name]) for name in one)
        assert not all(np.array_equal(one[name], other[name]) for name in one)


def test_initial_values_lie_within_their_scales(small: Small) -> None:
    case, path = small("dlrm")
    values = read_weights(path)
    assert {name: array.shape for name, array in values.items()} == case.shapes
    table = values["table_7"]
    assert 0.099 < np.abs(table).max() <= 0.1
    # Uniform within ±0.1: standard deviation 0.1/√3, known to 0.3 % from 128,000 draws.
    assert table.std() == pytest.approx(0.1 / 3**0.5, rel=0.01)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown workload 'dlmr'; did you mean 'dlrm'"):
        cases("dlmr", vocab_sizes=(10,))
    with pytest.raises(UserError, match="the workload movielens needs the ratings"):
        cases("movielens", vocab_sizes=(10,))
    with pytest.raises(UserError, match="unknown arm 'halff'; did you mean 'half'"):
        choose(["halff"], torch=False)


def test_plain_sgd_is_always_measured() -> None:
    assert [arm.name for arm in choose(["half"], torch=False)] == ["plain-sgd", "half"]
    assert not any(arm.torch for arm in choose([], torch=False))
