"""`kfac-onnx differentiate`: from a forward-only model to a training graph that the other verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

DATA = Path(__file__).parents[1] / "data" / "graphs"
GRAPH = DATA / "fwd_dyncore__nplm.onnx"


def test_what_was_made_is_told(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("differentiate", GRAPH, "--logits", "pred", "-o", tmp_path / "train.onnx")
    assert outcome.code == 0
    assert outcome.err == "trained: emb.weight, fc.weight, fc.bias, out.weight, out.bias\n"
    first, second, third = outcome.out.splitlines()
    assert (first, second) == ("loss: loss (mean)", "trained parameters: 5")
    assert third.startswith("wrote DIR/train.onnx (")


def test_as_json(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "train.onnx"
    data = run(
        "differentiate",
        GRAPH,
        "--reduction",
        "sum",
        "--labels",
        "y",
        "--freeze",
        "out.*",
        "-o",
        path,
        "--json",
    ).data
    assert data == {
        "output": "DIR/train.onnx",
        "loss": "loss",
        "reduction": "sum",
        "labels": "y",
        "parameters": [
            {"name": "emb.weight", "shape": [100, 16], "gradient": "emb.weight_grad"},
            {"name": "fc.weight", "shape": [16, 64], "gradient": "fc.weight_grad"},
            {"name": "fc.bias", "shape": [16], "gradient": "fc.bias_grad"},
        ],
        "frozen": [
            {"name": "out.weight", "reason": "frozen by the user"},
            {"name": "out.bias", "reason": "frozen by the user"},
        ],
        "notes": [],
    }


def test_scan_verify_transform_and_train_take_the_result(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path, step, data = tmp_path / "train.onnx", tmp_path / "step.onnx", tmp_path / "data.npz"
    assert run("differentiate", GRAPH, "-o", path, "-q").code == 0
    report = run("scan", path, "--json").data
    assert [site["parameter"] for site in report["sites"]] == ["emb.weight"]
    assert (report["loss"], report["reduction"], report["batch_inputs"]) == (
        "loss",
        "mean",
        ["ids", "labels"],
    )
    ids = np.random.default_rng(0).integers(0, 100, (64, 4))
    np.savez(data, ids=ids, labels=ids[:, 0] // 2)
    assert run("verify", path, "--data", data).code == 0  # every gradient against a finite difference
    assert run("transform", path, "-o", step, "--preset", "r1.7", "--lr", 0.05).code == 0
    outcome = run(
        "train",
        step,
        "--data",
        data,
        "--steps",
        20,
        "--batch-size",
        16,
        "--checkpoint",
        tmp_path / "run",
        "--json",
    )
    assert outcome.code == 0


def test_external_data_is_read(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("differentiate", DATA / "fwd_evalext__nplm.onnx", "-o", tmp_path / "train.onnx", "--json")
    assert outcome.code == 0
    assert len(outcome.data["parameters"]) == 5
    onnx.checker.check_model(onnx.load(tmp_path / "train.onnx"), full_check=True)


def test_the_pass_runs_in_a_pipeline(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "sites.onnx"
    outcome = run("opt", GRAPH, "-p", "differentiate{logits=pred},find-embeddings", "-o", path, "--json")
    assert outcome.code == 0
    assert [item["pass"] for item in outcome.data["passes"]] == [
        "differentiate{logits=pred}",
        "find-embeddings",
    ]
    assert outcome.data["passes"][0]["statistics"] == {"trained weights": 5}
    assert outcome.data["passes"][1]["statistics"]["tables"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [GRAPH, "--logits", "prod", "-o", "OUT"],
            f"error: the graph has no value 'prod', given as the logits; did you mean 'pred'?\n"
            f"  --> {GRAPH}\n  help: its outputs are pred\n",
        ),
        (
            [GRAPH, "--loss", "cross_entropy", "-o", "OUT"],
            "error: option 'loss' of pass 'differentiate' cannot be 'cross_entropy': "
            "it is one of cross-entropy, mse, bce\n",
        ),
        (
            [GRAPH, "--loss", "mse", "--ignore-index", "0", "-o", "OUT"],
            f"error: --ignore-index belongs to the loss cross-entropy, not to mse\n  --> {GRAPH}\n",
        ),
        (
            [GRAPH, "--class-axis", "2", "-o", "OUT"],
            "error: the logits 'pred' have 2 dimensions, so 2 cannot be the axis of the classes\n"
            f"  --> {GRAPH}\n",
        ),
        (
            [GRAPH, "--train", "embedding", "-o", "OUT"],
            f"error: --train 'embedding' fits no weight of the graph; did you mean 'emb.weight'?\n  --> {GRAPH}\n"
            "  help: its weights are emb.weight, fc.weight, fc.bias, out.weight, out.bias\n",
        ),
        (
            [GRAPH, "--loss-output", "pred", "--labels", "y", "-o", "OUT"],
            "error: --loss-output says that the graph has its loss, so --labels cannot be given with it\n"
            "  help: leave one of them out\n",
        ),
        (
            [GRAPH, "--loss-output", "pred", "-o", "OUT"],
            f"error: 'pred' cannot be the loss: it is of shape [batch, 100], not one floating-point number\n"
            f"  --> {GRAPH}\n  help: let --logits name what the loss is of, and --loss say which\n",
        ),
        (
            [DATA / "torchjoint_init__nplm.onnx", "-o", "OUT"],
            "error: the graph already has gradients: its output 'm.emb.weight_grad'\n"
            f"  --> {DATA / 'torchjoint_init__nplm.onnx'}\n"
            "  help: it is a training graph: give it to `kfac-onnx transform` or `train`\n",
        ),
        ([DATA / "none.onnx", "-o", "OUT"], f"error: there is no file '{DATA / 'none.onnx'}'\n"),
        (
            [GRAPH, "-o", "DIR/no/train.onnx"],
            "error: 'DIR/no/train.onnx' cannot be written: its folder does not exist or is read-only\n",
        ),
        ([GRAPH], "error: Missing option '-o' / '--output'.\n  help: run `kfac-onnx differentiate --help`\n"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_and_nothing_is_written(
    run: Callable[..., Outcome], tmp_path: Path, words: list[object], message: str
) -> None:
    given = [
        str(word).replace("DIR", str(tmp_path)).replace("OUT", str(tmp_path / "out.onnx")) for word in words
    ]
    outcome = run("differentiate", *given)
    assert outcome.code == 1
    assert outcome.err == message
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_never_overwritten(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(GRAPH.read_bytes())
    outcome = run("differentiate", path, "-o", path)
    assert outcome.code == 1
    assert (
        outcome.err
        == "error: 'DIR/model.onnx' is the input and will not be overwritten\n  help: choose another name\n"
    )
    assert path.read_bytes() == GRAPH.read_bytes()
