"""Several ranks make the steps of one process on the concatenated batch; here they are threads."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from preset_names import INVARIANT
from thread_ranks import ThreadRank, on_ranks

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.bench.graphs import factorisation, training_graph
from kfac_onnx.cli.main import main
from kfac_onnx.ranks import Alone, RankSession

V, D, N, STEPS = 50, 4, 24, 8
SHAPES = {"user": (V, D), "item": (30, D), "bias": ()}
GRAPHS = Path(__file__).parents[1] / "data" / "graphs"


@functools.cache
def transformed(preset: str = "half"):
    return kx.transform(factorisation(SHAPES), preset=preset, lr=0.02, rest="adam", rest_lr=1e-3)


def start() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in SHAPES.items()}


def batches() -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(1)
    made = [
        {
            "users": np.minimum(draw.zipf(1.5, N) - 1, V - 1),
            "items": draw.integers(-30, 30, N),  # negative ids count from the end
            "ratings": draw.normal(0, 1, N).astype(np.float32),
        }
        for _ in range(STEPS)
    ]
    made[5]["ratings"][-1] = np.inf  # on the last rank alone: no rank may keep that step
    return made


def part(batch: dict[str, np.ndarray], shares: list[int], rank: int) -> dict[str, np.ndarray]:
    ends = np.cumsum(shares)
    return {name: array[ends[rank] - shares[rank] : ends[rank]] for name, array in batch.items()}


@pytest.mark.parametrize(
    ("preset", "shares"),
    [
        *((INVARIANT[0], shares) for shares in ([N], [N // 2, N // 2])),
        *((preset, [0, N - 5, 5]) for preset in INVARIANT),
    ],
)
def test_ranks_make_the_steps_of_one_process(preset: str, shares: list[int]) -> None:
    def work(rank: ThreadRank):
        with RankSession(transformed(preset), rank, parameters=start()) as session:
            made = [session.step(part(batch, shares, rank.rank)) for batch in batches()]
            whole = {state.input: session.gathered(state.input) for state in session._plan.states}
            return made, whole, session.bytes_sent

    ranks = on_ranks(len(shares), work)
    one = kx.TrainingSession(transformed(preset), parameters=start(), threads=1)
    expected = [one.step(batch) for batch in batches()]
    for made, whole, _ in ranks:
        assert [m["skipped"] for m in made] == [m["skipped"] for m in expected]
        losses = np.array([m["loss"] for m in made])
        finite = np.isfinite(losses)
        # 24 float32 examples summed in other groups: a few units in the last place.
        np.testing.assert_allclose(losses[finite], np.array([m["loss"] for m in expected])[finite], rtol=3e-7)
        for name, value in one.states.items():
            if name.endswith("/slot"):  # positions in a batch, which nothing reads again
                continue
            # Against what 7 steps of lr 0.02 move an entry; Adam's are the largest.
            np.testing.assert_allclose(whole[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
            np.testing.assert_array_equal(whole[name], ranks[0][1][name], err_msg=name)


def test_bytes_do_not_depend_on_the_number_of_rows_and_follow_the_formula() -> None:
    def work(rank: ThreadRank) -> int:
        with RankSession(transformed(), rank, parameters=start()) as session:
            ids = np.arange(10) * 2 + 1 - rank.rank  # all of the rows that the other rank holds
            session.step({"users": ids, "items": ids, "ratings": np.ones(10, np.float32)})
            return session.bytes_sent

    dense, distinct = 1, 2 * 10
    formula = distinct * (8 * D + 16) + 4 * (dense + 2 * D * D + 1)
    assert on_ranks(2, work) == [formula, formula]


def test_inspect_says_what_a_rank_holds_and_sends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kx.save(transformed(), tmp_path / "m.onnx")
    assert main(["inspect", str(tmp_path / "m.onnx"), "--ranks", "2", "--lookups", "20", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)["ranks"]
    # Rows of float32[D], and A in float64.
    assert plan["sharded"] == {"user": 25 * (4 * D + 8), "item": 15 * (4 * D + 8)}
    # Half of 20 distinct rows of each table are elsewhere: the bytes of the test above.
    assert plan["sent"] == 2 * 10 * (8 * D + 16) + 4 * (1 + 2 * D * D + 1)


def test_wrong_ids_on_one_rank_are_the_same_error_on_all_and_change_nothing() -> None:
    def work(rank: ThreadRank):
        with RankSession(transformed(), rank, parameters=start()) as session:
            session.step(part(batches()[0], [N // 2, N // 2], rank.rank))
            before = session.parameters()
            bad = {**part(batches()[1], [N // 2, N // 2], rank.rank)}
            if rank.rank == 1:
                bad["users"] = np.full(N // 2, V)
            with pytest.raises(kx.UserError) as caught:
                session.step(bad)
            for name, value in session.parameters().items():
                np.testing.assert_array_equal(value, before[name])
            session.step(part(batches()[1], [N // 2, N // 2], rank.rank))
            return str(caught.value)

    message = (
        "rank 1 of 2: id 50 in input 'users' is not a row of parameter 'user', which has 50 rows\n"
        "  help: ids from -50 to 49 are allowed; nothing was written"
    )
    assert on_ranks(2, work) == [message, message]


def test_ranks_with_different_values_are_told_apart() -> None:
    def work(rank: ThreadRank) -> None:
        values = start()
        values["bias"] = values["bias"] + np.float32(rank.rank)
        RankSession(transformed(), rank, parameters=values)

    with pytest.raises(kx.UserError) as caught:
        on_ranks(2, work)
    assert str(caught.value) == (
        "ranks have different values of parameters: rank 1 is not like rank 0\n"
        "  help: start all of them with the same command, in the same environment"
    )


def test_examples_that_see_each_other_are_refused() -> None:
    graph = training_graph(
        "int64[N] ids, int64[N] labels",
        {"emb": (20, D)},
        """rows = Gather(emb, ids)
        turned = Transpose<perm=[1, 0]>(rows)
        scores = MatMul(rows, turned)
        loss = SoftmaxCrossEntropyLoss<reduction="mean">(scores, labels)""",
    )
    value = np.random.default_rng(0).normal(0, 1, (20, D)).astype(np.float32)
    session = RankSession(kx.transform(graph, lr=0.1), Alone(), parameters={"emb": value})
    with pytest.raises(kx.UserError) as caught:
        session.step({"ids": np.arange(6), "labels": np.array([0, 1, 2, 0, 1, 2])})
    assert str(caught.value) == (
        "the model cannot be trained on several ranks: the examples of a batch depend on each other,"
        " 'loss' of a batch is not that of its halves together"
    )


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("jax2onnx__nplm_axis1", "it is stored as columns, not as rows"),
        ("ortart_dyncore__nplm_bf16", "its rows are bfloat16, not float32"),
        ("ortart_dyncore__nplm_dropout", "draws at random"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(graph: str, reason: str) -> None:
    model = kx.transform(GRAPHS / f"{graph}.onnx", lr=0.1, rest="sgd", rest_lr=0.1)
    with pytest.raises(kx.UserError, match=r"cannot be trained on several ranks: ") as caught:
        RankSession(model, Alone())
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "graph", ["ortart_dyncore__twotower", "ortart_dyncore__siamese", "ortart_dyncore__nplm"]
)
def test_exported_graphs_train_alike(graph: str) -> None:
    model = kx.transform(GRAPHS / f"{graph}.onnx", lr=0.01, rest="sgd", rest_lr=0.01)

    stored = {k[3:]: v for k, v in np.load(GRAPHS / f"{graph}.npz").items() if k.startswith("in:")}
    batch_names = metadata.read(model, "step", metadata.Step).batch
    batch = {name: stored[name] for name in batch_names}
    values = {name: value for name, value in stored.items() if name not in batch_names}
    with kx.TrainingSession(model, threads=1, parameters=values) as one:
        size = len(next(iter(batch.values())))
        expected = [one.step(batch)["loss"] for _ in range(3)]

    def work(rank: ThreadRank) -> list[float | None]:
        shares = [size // 2, size - size // 2]
        with RankSession(model, rank, parameters=values) as session:
            return [session.step(part(batch, shares, rank.rank))["loss"] for _ in range(3)]

    for losses in on_ranks(2, work):
        np.testing.assert_allclose(np.array(losses), np.array(expected), rtol=3e-7)


def test_a_launcher_without_mpi4py_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(["train", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz")]) == 1
    assert capfd.readouterr().err == (
        "error: 8 processes were started, and mpi4py is not installed: each would train alone\n"
        "  help: pip install 'kfac-onnx[mpi]'\n"
    )


@pytest.mark.parametrize("option", ["--checkpoint", "--held-out", "--resume"])
def test_options_of_one_process_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")

    class Two(Alone):
        size = 2

        def gather(self, array: np.ndarray) -> np.ndarray:
            return np.stack([array, array])

    monkeypatch.setattr("kfac_onnx.ranks.fabric.Mpi", Two)
    place = str(tmp_path / "place")
    assert main(["train", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz"), option, place]) == 1
    assert capfd.readouterr().err == (
        f"error: {option} is not for several ranks yet\n  help: leave it out, or train on one process\n"
    )
