"""The verbs on a real training graph, from scan to trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from kfac_onnx.api import save, transform
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

DATA = Path(__file__).parents[1] / "data" / "graphs"
GRAPH = DATA / "torchjoint_in__nplm.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, held-out data and first weights for the graph."""
    with np.load(DATA / "torchjoint_in__nplm.npz") as file:
        weights = {name[3:]: file[name] for name in file.files if name.startswith("in:m.")}
    np.savez(tmp_path / "weights.npz", **weights)
    rng = np.random.default_rng(0)
    for name, count in (("data.npz", 64), ("valid.npz", 20)):
        ids = rng.integers(0, 100, (count, 4))
        np.savez(tmp_path / name, ids=ids, labels=ids[:, 0] // 2)
    return tmp_path


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformed") / "step.onnx"
    save(transform(GRAPH, lr=0.05), path)
    return path


def test_scan_as_table_and_as_json(run: Callable[..., Outcome]) -> None:
    outcome = run("scan", GRAPH)
    assert outcome.code == 0
    assert "m.emb.weight   100 x 16   float32" in outcome.out
    assert "loss: loss (mean)" in outcome.out
    data = run("scan", GRAPH, "--json").data
    (site,) = data["sites"]
    assert (site["parameter"], site["vocab_size"], site["embedding_dim"]) == ("m.emb.weight", 100, 16)
    assert data["batch_inputs"] == ["ids", "labels"]
    assert data["refused"] == []
    assert "because" in outcome.out
    assert data["parameters"][-1]["role"] == "vector"
    assert data["parameters"][-1]["reason"] == "its shape [100] has one dimension above 1"
    assert "role:  vector: its shape [100] has one dimension above 1" in run("why", GRAPH, "m.out.bias").out


def test_transform_reports_what_it_made(run: Callable[..., Outcome], folder: Path) -> None:
    outcome = run("transform", GRAPH, "-o", folder / "out.onnx", "--json")
    assert outcome.code == 0
    assert outcome.data["sites"][0]["parameter"] == "m.emb.weight"
    onnx.checker.check_model(onnx.load(folder / "out.onnx"), full_check=True)
    assert "state 2.4" in run("transform", GRAPH, "-o", folder / "out.onnx").out


def test_inspect_says_where_everything_runs(run: Callable[..., Outcome], step: Path) -> None:
    text = run("inspect", step, "--lookups", 1000, "--nodes").out
    assert "lookups per step  batch*4" in text
    assert "inverse square root of the damped output factor" in text
    assert "kfac/insert-embedding-kfac/m.emb.weight/" in text
    data = run("inspect", step, "--json").data
    assert {node["phase"] for node in data["nodes"]} >= {"gradients", "count", "commit"}


def test_why_names_verdict_and_trail(run: Callable[..., Outcome]) -> None:
    outcome = run("why", GRAPH, "m.emb.weight")
    assert outcome.out.splitlines()[0] == "'m.emb.weight' is an embedding table"
    assert run("why", GRAPH, "m.fc.bias", "--json").data["verdict"] == "not an embedding"


def test_diff_between_a_model_and_its_transform(run: Callable[..., Outcome], step: Path) -> None:
    assert run("diff", GRAPH, GRAPH).out == "the models are the same\n"
    data = run("diff", GRAPH, step, "--json").data
    assert any("AddRows" in text for text in data["nodes"]["added"].values())
    assert "m.emb.weight_grad" in data["nodes"]["removed"]
    assert "kfac/lr" in data["inputs"]["added"]


def train(run: Callable[..., Outcome], folder: Path, model: Path, *words: object) -> Outcome:
    return run(
        "train", model, "--data", folder / "data.npz", "--parameters", folder / "weights.npz",
        "--batch-size", 16, "--json", *words,
    )  # fmt: skip


def test_training_lowers_the_loss_and_writes_weights(
    run: Callable[..., Outcome], folder: Path, step: Path
) -> None:
    outcome = train(
        run, folder, step, "--epochs", 5, "--held-out", folder / "valid.npz", "--eval-every", 10,
        "--metrics", folder / "log.jsonl", "--export", folder / "out.onnx", "--schedule", "cosine:warmup=4",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert (outcome.data["steps"], outcome.data["examples"], outcome.data["skipped"]) == (20, 320, 0)
    assert list(outcome.data["held_out"]) == ["10", "20"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] == outcome.data["loss"] < rows[0]["loss"] - 0.1
    assert rows[0]["lr"] == pytest.approx(0.05 / 4)  # a quarter of the warm-up; float32 default rate
    exported = onnx.load(folder / "out.onnx")
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in exported.graph.initializer}
    with np.load(folder / "weights.npz") as first:
        assert not np.array_equal(weights["m.emb.weight"], first["m.emb.weight"])


def test_the_command_does_what_the_session_does(
    run: Callable[..., Outcome], folder: Path, step: Path
) -> None:
    outcome = train(run, folder, step, "--epochs", 1, "--no-shuffle", "--threads", 1)
    session = TrainingSession(step, parameters=folder / "weights.npz", threads=1)
    with np.load(folder / "data.npz") as data, session:
        for start in range(0, 64, 16):
            batch = {name: data[name][start : start + 16] for name in data.files}
            metrics = session.step(batch)
    assert outcome.data["loss"] == metrics["loss"]


def test_an_untransformed_graph_is_transformed_on_the_fly(
    run: Callable[..., Outcome], folder: Path, step: Path
) -> None:
    words = ("--steps", 3, "--lr", 0.05, "--threads", 1)
    first, second = train(run, folder, GRAPH, *words), train(run, folder, step, *words)
    assert first.data["loss"] == second.data["loss"]
    plain = train(run, folder, GRAPH, *words, "--preset", "plain-sgd")
    assert plain.data["loss"] != first.data["loss"]


def test_a_resumed_run_ends_where_the_whole_run_ends(
    run: Callable[..., Outcome], folder: Path, step: Path
) -> None:
    whole = train(run, folder, step, "--steps", 7, "--threads", 1)
    keep = ("--checkpoint", folder / "ckpt", "--threads", 1)
    assert train(run, folder, step, "--steps", 3, *keep).data["position"] == 3
    rest = train(run, folder, step, "--steps", 7, "--resume", *keep)
    assert rest.data["position"] == 7
    assert rest.data["loss"] == whole.data["loss"]


def test_people_see_a_summary_and_progress_on_stderr(
    run: Callable[..., Outcome], folder: Path, step: Path
) -> None:
    outcome = run(
        "train",
        step,
        "--data",
        folder / "data.npz",
        "--parameters",
        folder / "weights.npz",
        "--batch-size",
        16,
    )
    first, second = outcome.out.splitlines()
    assert first.startswith("4 steps, 64 examples, last loss ")
    assert second.endswith(" ms per step")
    assert "examples/s" in outcome.err
    assert run(
        "train", step, "--data", folder / "data.npz", "--parameters", folder / "weights.npz", "--quiet"
    ).err == ""  # fmt: skip


def test_verify_exits_2_where_a_gradient_is_wrong(run: Callable[..., Outcome], folder: Path) -> None:
    words = ("--data", folder / "data.npz", "--parameters", folder / "weights.npz", "--batch-size", 8)
    outcome = run("verify", GRAPH, *words, "--json")
    assert outcome.code == 0
    assert {row["status"] for row in outcome.data} == {"ok"}
    model = onnx.load(GRAPH)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "m.fc.bias_grad":
                node.output[index] = "unscaled"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.01), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "factor"], ["m.fc.bias_grad"]))
    onnx.save(model, folder / "wrong.onnx")
    outcome = run("verify", folder / "wrong.onnx", *words)
    assert outcome.code == 2
    (row,) = [line for line in outcome.out.splitlines() if "wrong" in line]
    assert row.split()[:3] == ["m.fc.bias", "m.fc.bias_grad", "wrong"]


def test_a_word_after_golden_files_is_another_golden_file(run: Callable[..., Outcome]) -> None:
    outcome = run("verify", "--golden", "one.npz", "two.npz", "three.npz")
    assert outcome.code == 1  # none of them is there; the first is named
    assert "one.npz" in outcome.err
    assert run("verify").err.startswith("error: verify wants MODEL and --data FILE, or --golden FILE...")


def test_settings_of_the_block_reach_the_pass(run: Callable[..., Outcome], folder: Path) -> None:
    words = ["--preset", "half", "--damping", 0.3, "--decay-a", 0.9, "--decay-g", 0.8, "--refresh-every", 7]
    words += ["--g-rows", 64, "--g-every", 5]
    found = run("transform", GRAPH, "-o", folder / "out.onnx", "--json", *words).data["pipeline"]
    assert (
        "insert-embedding-kfac{preset=half,damping=0.3,decay-a=0.9,decay-g=0.8,refresh-every=7,g-rows=64,g-every=5}"
        in found
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--damping", 0.5],
        ["--decay-a", 0.6],
        ["--decay-g", 0.6],
        ["--g-rows", 4],
        ["--g-rows", 4, "--g-every", 3],
    ],
)
def test_settings_of_the_block_change_training(
    run: Callable[..., Outcome], folder: Path, words: list[object]
) -> None:
    def loss(*given: object) -> float:
        return run("train", GRAPH, "--data", folder / "data.npz", "--steps", 4, "--batch-size", 3, "--lr", 0.1,
                   "--preset", "half", "--parameters", folder / "weights.npz", "--json", *given).data["loss"]  # fmt: skip

    assert abs(loss(*words) - loss()) > 1e-6  # both runs are bit-equal otherwise


def test_batches_made_ahead_change_nothing(run: Callable[..., Outcome], folder: Path, step: Path) -> None:
    def made(*words: object) -> bytes:
        rows = folder / f"rows{len(words)}.jsonl"
        assert train(run, folder, step, "--steps", 9, "--metrics", rows, *words).code == 0
        return rows.read_bytes()

    assert made() == made("--prefetch", 0) == made("--prefetch", 5, "--quiet")
    outcome = train(run, folder, step, "--steps", 1, "--prefetch", -1)
    assert (outcome.code, "--prefetch" in outcome.err) == (1, True)


def test_what_g_takes_in_is_shown(run: Callable[..., Outcome], folder: Path) -> None:
    out = folder / "few.onnx"
    assert run("transform", GRAPH, "-o", out, "--g-rows", 6, "--g-every", 5).code == 0
    shown = run("inspect", out).out
    assert "statistics        lookups; G from at most 6 rows, in steps 1, 2, 4, 8 and multiples of 5" in shown
    assert "each update of G" in shown
    assert "SampleRows" in shown
    outcome = run("transform", GRAPH, "-o", out, "--g-rows", 0)
    assert outcome.code == 1
    assert outcome.err.splitlines()[0] == (
        "error: option 'g-rows' of pass 'insert-embedding-kfac' cannot be 0: it is a whole number, at least 1, or none"
    )


def test_choices_of_uses_tied_tables_and_padding(run: Callable[..., Outcome], tmp_path: Path) -> None:
    graph = DATA / "ortart_legloss__gpt_tied.onnx"
    out = tmp_path / "step.onnx"
    words = ("--tied", "both", "--uses", "multi-indep", "--padding-idx", "m.tok.weight=0")
    made = json.loads(run("transform", graph, "-o", out, *words, "--json").out)
    assert made["pipeline"].startswith(
        'find-embeddings{padding=["m.tok.weight=0"]},insert-embedding-kfac{uses=multi-indep,tied=both}'
    )
    shown = run("inspect", out).out
    assert "lookups and projection, 2 independent uses: damping λ/2, coefficient 2" in shown
    outcome = run("transform", graph, "-o", out, "--padding-idx", "m.tok.weight")
    assert outcome.code == 1
    assert outcome.err == "error: padding wants PARAM=ROW, not 'm.tok.weight'\n"
    outcome = run("transform", graph, "-o", out, "--tied", "left")
    assert (outcome.code, outcome.err.splitlines()[0]) == (
        1,
        "error: option 'tied' of pass 'insert-embedding-kfac' cannot be 'left': it is one of auto, lookup, both, refuse",
    )


def test_a_dense_model_without_an_optimizer_is_not_trained(
    run: Callable[..., Outcome], folder: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense.onnx"
    assert run("transform", GRAPH, "-o", dense, "--shape", "dense").code == 0
    outcome = train(run, folder, dense, "--steps", 1)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "error: 'DIR/dense.onnx' updates no parameter: it returns gradients (--shape dense)\n"
        "  help: train one of --shape rows, or give the gradients to an optimizer of your own\n"
    )
