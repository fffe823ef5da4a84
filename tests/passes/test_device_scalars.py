"""Sizes that arithmetic needs come to the device without a copy, and are the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from corpus_cases import Case

from kfac_onnx import TrainingSession
from kfac_onnx.api import transform
from kfac_onnx.passes.device_scalars import Brought, bring_sizes_to_device
from kfac_onnx.pipeline.pipeline import parse_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = '<ir_version: 9, opset_import: ["" : 18]>\n'


def model_of(text: str, *, ours: bool = True) -> ir.Model:
    model = ir.from_onnx_text(HEADER + text)
    for index, node in enumerate(model.graph):
        node.name = f"kfac/test/{index}" if ours else f"node_{index}"
    return model


def run(model: ir.Model, **feeds: Any) -> list[Any]:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


COUNT = "g (float[N] x) => (float y) { r = Neg (x)\n n = Size (r)\n y = Cast <to: int = 1> (n) }"
VECTOR = """g (float[N,M] x, int64[K,2] at) => (int64[K,2] y) {
  r = Neg (x)
  s = Shape (r)
  y = Mul (at, s)
}"""
RANGE = """g (float[N] x) => (int64[M] y) <int64 one = {1}> {
  n = Size (x)
  m = Add (n, one)
  y = Range (one, m, one)
}"""


def test_a_number_of_rows_becomes_a_float_on_the_device() -> None:
    model = model_of(COUNT)
    before = run(model, x=np.ones(5, np.float32))
    assert bring_sizes_to_device(model) == Brought(6, 1)
    assert "Range" in operators(model)
    assert run(model, x=np.ones(5, np.float32)) == before == [5.0]
    assert model.graph.outputs[0].name == "y"


def test_a_vector_of_sizes_comes_over_one_by_one() -> None:
    model = model_of(VECTOR)
    feeds = {"x": np.ones((3, 7), np.float32), "at": np.array([[1, 1], [2, 3]])}
    (before,) = run(model, **feeds)
    model.graph[0].outputs[0].shape = ir.Shape(["N", "M"])
    assert bring_sizes_to_device(model).edited == 1
    assert operators(model).count("Range") == 2
    np.testing.assert_array_equal(run(model, **feeds)[0], before)
    np.testing.assert_array_equal(before, [[3, 7], [6, 21]])


def test_what_kernels_want_on_the_host_stays_there() -> None:
    model = model_of(RANGE)
    assert bring_sizes_to_device(model) == Brought(0, 0)


def test_what_the_user_computes_is_left_alone() -> None:
    model = model_of(COUNT, ours=False)
    assert bring_sizes_to_device(model) == Brought(0, 0)


def test_a_float_that_the_user_makes_of_a_size_comes_over_exactly() -> None:
    text = """g (float[N] x) => (float[N] y) {
      r = Neg (x)
      n = Size (r)
      f = Cast <to: int = 1> (n)
      y = Div (r, f)
    }"""
    model = model_of(text, ours=False)
    model.graph[-1].name = "kfac/test/ours"
    size = 16_777_217  # no float32
    x = np.full(size, -1.0, np.float32)
    (before,) = run(model, x=x)
    for value in model.graph:
        if value.op_type == "Cast":
            value.outputs[0].dtype, value.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
    assert bring_sizes_to_device(model).edited == 1
    assert "OneHot" in operators(model)
    np.testing.assert_array_equal(run(model, x=x)[0][:3], before[:3])


def test_several_readers_share_one_bridge() -> None:
    text = """g (float[N] x) => (int64[N] y, int64[N] z) {
      i = Cast <to: int = 7> (x)
      n = Size (i)
      y = Add (i, n)
      z = Mul (i, n)
    }"""
    model = model_of(text)
    brought = bring_sizes_to_device(model)
    assert brought.edited == 2
    assert operators(model).count("Range") == 1
    y, z = run(model, x=np.array([1, 2], np.float32))
    assert (y.tolist(), z.tolist()) == ([3, 4], [2, 4])


def test_running_twice_changes_nothing_more() -> None:
    model = model_of(COUNT)
    bring_sizes_to_device(model)
    assert bring_sizes_to_device(model) == Brought(0, 0)


def test_lower_counts_what_it_brings_over(model_bytes: Callable[[ir.Model], bytes]) -> None:
    model = model_of(COUNT)
    before = model_bytes(model)
    assert parse_pipeline("lower").run(model).changes.added == 0
    model.metadata_props.clear()
    assert model_bytes(model) == before
    report = parse_pipeline("lower{target=cuda,deterministic=true}").run(model)
    assert (report.changes.added, report.changes.edited) == (6, 1)
    assert report.passes[0].statistics == {"sizes brought to the device": 1}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("torchjoint_in__nplm_pad0", "half"),
        ("torchjoint_in__dlrm_mean", "r1.7"),
        ("torchjoint_in__dlrm_offsets_mean", "adagrad"),
        ("ortart_legcore__decoys", "adaptive"),
        ("ortart_legcore__lookup_reshape", "half"),
        ("jax2onnx__bag_sum", "half"),
    ],
)
def test_steps_are_those_of_the_cpu_target(name: str, preset: str, deterministic: bool) -> None:
    """Three steps with each set of bodies, in one thread: ScatterND adds there one after the other."""
    case = Case(name)
    feed = case.feed()
    trained: list[dict[str, Any]] = []
    for target in ("cpu", "cuda"):
        model = transform(
            case.path, preset=preset, target=target, deterministic=deterministic and target == "cuda"
        )
        with TrainingSession(model, parameters=feed_of(model, feed), threads=1) as session:
            batch = {item.name: feed[item.name] for item in session.batch_inputs}
            for _ in range(3):
                session.step(batch)
            trained.append({key: session.parameters[key] for key in session.parameters})
    for key, value in trained[0].items():
        # the same float32 operations, sums in another order: a few roundings of entries of order one
        np.testing.assert_allclose(trained[1][key], value, rtol=2e-4, atol=2e-5, err_msg=key)


def feed_of(model: ir.Model, feed: dict[str, Any]) -> dict[str, Any]:
    from kfac_onnx import metadata
    from kfac_onnx.metadata import State, Step

    step = metadata.read(model, "step", Step)
    assert step is not None
    states = {s.input for s in metadata.read_list(model, "state", State) if s.initial == "parameter"}
    return {key: value for key, value in feed.items() if key in states or key in step.constants}
