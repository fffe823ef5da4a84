"""Exported forward graphs: other tools load them, with the trained weights in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.saved.export import place_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession


def trained(toy: ModuleType, open_toy: Callable[..., TrainingSession], **options: object) -> TrainingSession:
    session = open_toy(**options)
    for batch in toy.batches(3):
        session.step(batch)
    return session


@pytest.mark.parametrize("dropout", [False, True])
def test_the_default_cuts_at_the_loss(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path, dropout: bool
) -> None:
    session = trained(toy, open_toy, model={"dropout": dropout})
    placed = session.export(tmp_path / "trained.onnx")
    assert placed == {"emb.weight": "emb.weight", "readout": "readout"}
    onnx.checker.check_model(tmp_path / "trained.onnx")
    loaded = ort.InferenceSession(tmp_path / "trained.onnx")
    assert {item.name for item in loaded.get_inputs()} == {"ids", "y"}
    batch = toy.batches(1, seed=9)[0]
    weights = session.parameters
    e = (weights["emb.weight"][batch["ids"]] * weights["readout"]).sum(1) - batch["y"]
    # float32 sums of a few terms; dropout is off
    assert loaded.run(["loss"], batch)[0] == pytest.approx(np.mean(e**2), rel=1e-6)


def test_outputs_cut_elsewhere_and_prune_inputs(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    session = trained(toy, open_toy)
    assert session.export(tmp_path / "h.onnx", outputs=["h"]) == {"emb.weight": "emb.weight"}
    loaded = ort.InferenceSession(tmp_path / "h.onnx")
    assert [item.name for item in loaded.get_inputs()] == ["ids"]
    rows = loaded.run(None, {"ids": np.array([5, 2])})[0]
    np.testing.assert_array_equal(rows, session.parameters["emb.weight"][[5, 2]])
    model = ir.load(tmp_path / "h.onnx")
    assert set(model.opset_imports) == {""}
    assert not any(key.startswith("kfac.") for node in model.graph for key in node.metadata_props)


def test_a_name_that_promises_another_format(
    open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    path = tmp_path / "weights.npz"
    with pytest.raises(UserError) as e:
        open_toy().export(path)
    assert str(e.value) == (
        f"weights are not written as .npz files: '{path}'\n"
        "  help: end it in .safetensors for the weights alone, or in .onnx for a model with them"
    )
    assert not path.exists()


def test_an_unknown_output(open_toy: Callable[..., TrainingSession], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_toy().export(tmp_path / "x.onnx", outputs=["losss"])
    assert str(error.value) == (
        "the graph has no value 'losss'; did you mean 'loss'?\n"
        "  help: outputs are names of values in the training graph"
    )
    assert not (tmp_path / "x.onnx").exists()


def forward(tmp_path: Path, table: str, readout: str, rows: int = 23) -> Path:
    value, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gather", [table, "tokens"], ["h"]),
            onnx.helper.make_node("MatMul", ["h", readout], ["score"]),
        ],
        "forward",
        [value("tokens", types.INT64, ["n"])],
        [value("score", types.FLOAT, ["n", 1])],
        [
            onnx.numpy_helper.from_array(np.zeros((rows, 4), np.float32), table),
            onnx.numpy_helper.from_array(np.zeros((4, 1), np.float32), readout),
        ],
    )
    path = tmp_path / "forward.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    return path


@pytest.mark.parametrize("name", ["emb.weight", "net.emb.weight", "unrelated"])
def test_weights_go_into_the_users_model(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path, name: str
) -> None:
    session = trained(toy, open_toy)
    placed = session.export(tmp_path / "out.onnx", into=forward(tmp_path, name, "head"))
    assert placed == {"emb.weight": name}
    loaded = ir.load(tmp_path / "out.onnx").graph.initializers
    assert loaded[name].const_value.numpy().tobytes() == session.parameters["emb.weight"].tobytes()  # type: ignore[union-attr]
    assert not loaded["head"].const_value.numpy().any()  # type: ignore[union-attr]


def folded(path: Path, **tensors: np.ndarray) -> Path:
    """Add initializers to a model, as exporters leave them that fold transposes."""
    model = onnx.load(path)
    for name, array in tensors.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def test_folded_copies_of_a_table_are_trained_too(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    session = trained(toy, open_toy)
    first = np.arange(92, dtype=np.float32).reshape(23, 4)
    path = forward(tmp_path, "table", "head")
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(first, "emb.weight"))
    model.graph.node[0].input[0] = "emb.weight"
    onnx.save(model, path)
    folded(path, tied=first.T.copy(), twin=first, other=first + 1)
    assert session.export(tmp_path / "out.onnx", into=path) == {"emb.weight": "emb.weight"}
    held = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer
    }
    table = session.parameters["emb.weight"]
    np.testing.assert_array_equal(held["emb.weight"], table)
    np.testing.assert_array_equal(held["twin"], table)
    np.testing.assert_array_equal(held["tied"], table.T)
    np.testing.assert_array_equal(held["other"], first + 1)


def test_a_weight_that_was_folded_away_is_not_left_untrained(
    open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    path = folded(forward(tmp_path, "table", "head", rows=7), readout=np.zeros(4, np.float32),
                  MatMul_1=np.zeros((4, 23), np.float32))  # fmt: skip
    with pytest.raises(UserError) as error:
        open_toy().export(tmp_path / "out.onnx", into=path)
    assert str(error.value) == (
        f"trained parameter 'emb.weight' [23, 4] is no initializer of '{path}' by name, but 'MatMul_1' [4, 23] may be "
        "what an exporter made of it\n"
        "  help: export the forward model with its parameters unfolded: do_constant_folding=False, or optimize=False "
        "with dynamo=True"
    )
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_nothing_fits(open_toy: Callable[..., TrainingSession], tmp_path: Path) -> None:
    path = forward(tmp_path, "emb.weight", "head", rows=7)
    with pytest.raises(UserError) as error:
        open_toy().export(tmp_path / "out.onnx", into=path)
    assert str(error.value) == (
        f"no trained parameter fits an initializer of '{path}' by name or shape\n"
        "  help: trained parameters are 'emb.weight' [23, 4], 'readout' [4]"
    )
    assert not (tmp_path / "out.onnx").exists()


def test_a_safetensors_file_gets_the_weights_alone(
    open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    session = open_toy()
    assert session.export(tmp_path / "w.safetensors") == {name: name for name in session.parameters}
    stored = load_file(tmp_path / "w.safetensors")
    assert stored.keys() == session.parameters.keys()
    for name, array in session.parameters.items():
        np.testing.assert_array_equal(stored[name], array)
    with pytest.raises(UserError) as error:
        session.export(tmp_path / "v.safetensors", outputs=["loss"])
    assert str(error.value) == (
        f"'{tmp_path / 'v.safetensors'}' gets the weights alone, without a graph for outputs= or into=\n"
        "  help: write an .onnx file, or leave these out"
    )
    assert not (tmp_path / "v.safetensors").exists()


def test_the_users_model_is_not_overwritten(open_toy: Callable[..., TrainingSession], tmp_path: Path) -> None:
    path = forward(tmp_path, "emb.weight", "head")
    with pytest.raises(UserError, match="is the input and will not be overwritten"):
        open_toy().export(path, into=path)


def test_places_that_are_not_certain_are_left_alone() -> None:
    square = np.zeros((2, 2), np.float32)
    kind = ((2, 2), "float32")
    assert place_weights({"a": square, "b": square}, {"x": kind, "y": kind}) == {}
    assert place_weights({"a": square, "b": square}, {"x": kind}) == {}
    assert place_weights({"a": square, "b": square}, {"m.a": kind, "x": kind}) == {"a": "m.a"}
    tall, wide = np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float32)
    assert place_weights({"a": tall}, {"x": ((3, 2), "float32")}) == {"a": "x"}
    # which of the two became x, and which way round? A folded transpose looks the same.
    assert place_weights({"a": tall, "b": wide}, {"x": ((3, 2), "float32")}) == {}
    assert place_weights({"a": tall}, {"x": ((3, 2), "float32"), "y": ((2, 3), "float32")}) == {}
    assert place_weights({"a": square}, {"a": ((2, 3), "float32")}) == {}
    assert place_weights({"a": square}, {"a": ((2, 2), "float16")}) == {}
    assert place_weights({"w.a": square, "v.a": square}, {"a": kind}) == {}
