"""Exported loops: bags and networks over time, opened, differentiated, trained (tests/data/graphs_loops)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import GRAPHS

from kfac_onnx.api import scan, transform
from kfac_onnx.passes.differentiate import differentiate
from kfac_onnx.readers import read_forward_graph, read_training_graph
from kfac_onnx.runtime import TrainingSession

FOLDER = Path(__file__).parents[2] / "data" / "graphs_loops"
FORWARD = sorted(path.stem for path in FOLDER.glob("*.onnx") if not path.stem.startswith("jax"))
TRAINING = sorted(path.stem for path in FOLDER.glob("jax_*.onnx"))
TABLES = {"jax_two_tables": {"emb": (30, 6), "gate": (9, 6)}}
FOLDED = {"hh.weight"}
"""Weights that PyTorch's older exporter stores transposed under new names."""
# Float32 sums of up to a hundred products in another order, relative to the largest entry.
CLOSE = 2e-6
RATE = 100.0  # so large that the weights' rounding does not show in their change


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path.with_suffix(".npz")) as data:
        return dict(data)


def run(
    model: ir.Model | Path, feeds: dict[str, np.ndarray], *, plain: bool = False
) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plain:  # onnxruntime's optimizations end the process on some bags as PyTorch writes them
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    results = session.run(names, {item.name: feeds[f"in:{item.name}"] for item in session.get_inputs()})
    return dict(zip(names, results, strict=True))


def close(got: np.ndarray, want: np.ndarray, what: str, scaled: float = 1.0) -> None:
    error = np.abs(np.asarray(got, np.float64) * scaled - want).max()
    assert error <= CLOSE * max(np.abs(want).max(), 1e-3), f"{what}: {error:.1e}"


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for graph in (model.graph, *model.graph.subgraphs()) for node in graph}


@pytest.mark.parametrize("name", FORWARD)
def test_opened_forward_graph_computes_the_same(name: str) -> None:
    path = FOLDER / f"{name}.onnx"
    model = read_forward_graph(path)
    data = arrays(path)
    close(run(model, data)["pred"], data["ref:pred"], name)
    left = operators(model) & {"Loop", "Scan", "If", "SequenceInsert", "ConcatFromSequence"}
    assert left == ({"Scan"} if name == "scan_dynamo" else {"Loop"} if "scripted" in name else set())


@pytest.mark.parametrize("name", FORWARD)
def test_gradients_of_the_opened_graph_are_those_of_autograd(name: str) -> None:
    path = FOLDER / f"{name}.onnx"
    data = arrays(path)
    model = differentiate(path, loss="cross-entropy", logits="pred")
    results = run(model, data)
    close(results["loss"], data["ref:loss"], "loss")
    gradients = {key.removeprefix("ref:grad:"): value for key, value in data.items() if "grad" in key}
    named = [parameter for parameter in gradients if f"{parameter}_grad" in results]
    assert set(gradients) - set(named) == (FOLDED if "scripted" in name else set())
    for parameter in named:
        close(results[f"{parameter}_grad"], gradients[parameter], parameter)
    (table,) = scan(model).sites
    assert [use.op for use in table.uses] == ["Gather"]


@pytest.mark.parametrize("name", TRAINING)
def test_tables_of_backpropagation_through_time_are_found(name: str) -> None:
    report = scan(FOLDER / f"{name}.onnx")
    found = {site.parameter: (site.vocab_size, site.embedding_dim) for site in report.sites}
    assert found == TABLES.get(name, {"emb": (30, 6)})
    assert not report.refused
    assert all(len(site.uses) == 1 and not site.dense_uses for site in report.sites)


@pytest.mark.parametrize("name", TRAINING)
def test_opened_training_graph_computes_what_jax_does(name: str) -> None:
    path = FOLDER / f"{name}.onnx"
    data = arrays(path)
    results = run(read_training_graph(path), data)
    for key in ("loss", *(key[4:] for key in data if key.endswith("_grad"))):
        close(results[key], data[f"ref:{key}"], key)


@pytest.mark.parametrize("name", TRAINING)
def test_rows_and_ids_add_up_to_the_gradient(name: str) -> None:
    """Plain SGD on the rows moves a table by its gradient, whatever the order of the iterations."""
    path = FOLDER / f"{name}.onnx"
    data = arrays(path)
    weights = {key[3:]: value for key, value in data.items() if f"ref:{key[3:]}_grad" in data}
    model = transform(path, preset="plain-sgd", lr=RATE, rest="sgd", rest_lr=RATE)
    with TrainingSession(model, parameters=weights, threads=1) as session:
        session.step({item.name: data[f"in:{item.name}"] for item in session.batch_inputs})
        for key, value in weights.items():
            close((value - session.parameters[key]) / RATE, data[f"ref:{key}_grad"], key)


def test_comparison_notices_one_percent() -> None:
    data = arrays(FOLDER / "jax_take.onnx")
    with pytest.raises(AssertionError, match="loss"):
        close(data["ref:loss"], data["ref:loss"], "loss", scaled=1.01)


CORPUS = ["fwd_dyncore__dlrm_sum", "fwd_dyncore__dlrm_offsets_mean", "fwd_legcore__dlrm_offsets_mean"]


@pytest.mark.parametrize("name", CORPUS)
def test_bags_of_the_corpus_need_no_loop(name: str) -> None:
    path = GRAPHS / f"{name}.onnx"
    data = arrays(path)
    model = read_forward_graph(path)
    assert not operators(model) & {"Loop", "Scan", "If", "SequenceInsert", "ConcatFromSequence"}
    close(run(model, data)["pred"], run(path, data, plain=True)["pred"], name)


def test_scan_of_the_corpus_looks_nothing_up_inside() -> None:
    path = GRAPHS / "fwd_dyncore__scan_rnn.onnx"
    data = arrays(path)
    model = read_forward_graph(path)
    (node,) = [node for node in model.graph if node.op_type == "Scan"]
    assert all(inner.op_type != "Gather" for inner in node.attributes["body"].as_graph())
    close(run(model, data)["pred"], run(path, data)["pred"], "pred")
