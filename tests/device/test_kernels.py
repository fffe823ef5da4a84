"""Operators of onnxruntime's own domain: those that the wheel runs are taken, frozen int4 tables and hashes too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kfac_onnx as kx
from kfac_onnx.device.kernels import cpu_operators, has_cpu_kernel, typed_like
from kfac_onnx.errors import UserError

RNG = np.random.default_rng(5)


def test_the_wheel_is_asked() -> None:
    assert len(cpu_operators()) > 300
    assert has_cpu_kernel("com.microsoft", "MurmurHash3")
    assert has_cpu_kernel("", "Gather")
    assert has_cpu_kernel("ai.onnx", "Gather")
    assert not has_cpu_kernel("com.microsoft", "LayerNormalizationGrad")
    assert not has_cpu_kernel("nobody", "Gather")


def test_element_types_come_from_the_schema() -> None:
    assert typed_like("com.microsoft", "GatherBlockQuantized") == (2,)
    assert typed_like("com.microsoft", "MurmurHash3") == (None,)
    assert typed_like("com.microsoft", "NoSuchOperator") is None


def trained(graph: onnx.GraphProto, batch: dict[str, np.ndarray]) -> tuple[list[str], float, float]:
    """Return the trained parameters, the loss of a step, and that of the next one."""
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = kx.differentiate(helper.make_model(graph, opset_imports=imports, ir_version=10))
    report = kx.scan(made)
    whole = kx.transform(made, preset="plain-sgd", lr=0.1, rest="sgd", rest_lr=0.1)
    with kx.TrainingSession(whole) as session:
        first = session.step(batch)["loss"]
        return [site.parameter for site in report.sites], first, session.step(batch)["loss"]


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    shifted = scores - scores.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-logs[np.arange(len(labels)), labels].mean())


BATCH = {"ids": np.array([[1, 2, 3], [4, 4, 0]]), "labels": np.array([0, 2])}


def test_a_frozen_int4_table_beside_a_trained_one() -> None:
    nibbles = RNG.integers(0, 16, (11, 32), dtype=np.uint8)
    packed = (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).astype(np.uint8)
    scales = RNG.uniform(0.01, 0.1, (11, 2)).astype(np.float32)
    table = RNG.standard_normal((11, 32)).astype(np.float32)
    matrix = RNG.standard_normal((32, 3)).astype(np.float32)
    arrays = {"q": packed, "sc": scales, "emb": table, "w": matrix, "ax": np.array([1])}
    graph = helper.make_graph(
        [
            helper.make_node(
                "GatherBlockQuantized",
                ["q", "ids", "sc"],
                ["frozen"],
                domain="com.microsoft",
                gather_axis=0,
                quantize_axis=1,
                block_size=16,
                bits=4,
            ),
            helper.make_node("Gather", ["emb", "ids"], ["rows"]),
            helper.make_node("Add", ["frozen", "rows"], ["e"]),
            helper.make_node("ReduceMean", ["e", "ax"], ["m"], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["z"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    tables, first, second = trained(graph, BATCH)
    frozen = (nibbles.astype(np.float64) - 8) * np.repeat(scales, 16, axis=1)
    scores = (frozen + table)[BATCH["ids"]].mean(axis=1) @ matrix
    assert tables == ["emb"]
    np.testing.assert_allclose(first, cross_entropy(scores, BATCH["labels"]), rtol=1e-5)
    assert second < first


def test_hashed_ids() -> None:
    table = RNG.standard_normal((11, 4)).astype(np.float32)
    matrix = RNG.standard_normal((4, 3)).astype(np.float32)
    arrays = {"emb": table, "w": matrix, "ax": np.array([1]), "n": np.array(11, np.uint32)}
    graph = helper.make_graph(
        [
            helper.make_node("MurmurHash3", ["ids"], ["hashes"], domain="com.microsoft", seed=3),
            helper.make_node("Mod", ["hashes", "n"], ["places"]),
            helper.make_node("Cast", ["places"], ["rows"], to=TensorProto.INT64),
            helper.make_node("Gather", ["emb", "rows"], ["e"]),
            helper.make_node("ReduceMean", ["e", "ax"], ["m"], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["z"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    tables, first, second = trained(graph, BATCH)
    assert tables == ["emb"]
    assert second < first


def test_what_the_wheel_lacks_is_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["z"], domain="com.microsoft")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 3])],
    )
    with pytest.raises(UserError) as error:
        trained(graph, {})
    assert error.value.message == "the graph has 1 node that onnxruntime cannot run and no rule can lower"
    assert error.value.tried == (
        "com.microsoft::NoSuchOperator 'z': no rule for com.microsoft::NoSuchOperator",
    )
