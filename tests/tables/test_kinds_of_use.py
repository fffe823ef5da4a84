"""Uses of a table that are not plain lookups: cut, added to, partly frozen, and those without a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import kfac_onnx as kx
from kfac_onnx.passes.find_embeddings import find_tables
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from pathlib import Path

RATE = 0.1


def forward(
    nodes: str, shapes: dict[str, tuple[int, ...]], constants: dict[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """Return a model from ids int64[N, 3] to scores z float[N, 2], with random weights of these shapes."""
    model = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    model (int64[N, 3] ids) => (float[N, 2] z) {{ {nodes} }}
    """)
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in (arrays | (constants or {})).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


AXIS = {"one": np.array([1], np.int64)}
BATCH = {"ids": np.array([[0, 1, 1], [3, 0, 2]], np.int64), "labels": np.array([0, 1], np.int64)}
MEAN = "m = ReduceMean<keepdims: int = 0>(e, one) z = MatMul(m, W)"
FORMS = {
    "split": forward(
        "a, b = Split<axis: int = 0>(emb, parts) x = Gather(a, ids) y = Gather(b, ids) e = Add(x, y) " + MEAN,
        {"emb": (11, 4), "W": (4, 2)},
        {**AXIS, "parts": np.array([7, 4], np.int64)},
    ),
    "added": forward(
        "w = Add(emb, delta) e = Gather(w, ids) " + MEAN,
        {"emb": (7, 4), "delta": (7, 4), "W": (4, 2)},
        AXIS,
    ),
    "subtracted": forward(
        "w = Sub(delta, emb) e = Gather(w, ids) " + MEAN,
        {"emb": (7, 4), "delta": (7, 4), "W": (4, 2)},
        AXIS,
    ),
    "partly frozen": forward(
        "a = Mul(mask, emb) w = Add(a, rest) e = Gather(w, ids) " + MEAN,
        {"emb": (7, 4), "rest": (7, 4), "W": (4, 2)},
        {
            **AXIS,
            "mask": np.array([[0], [1], [0], [1], [0], [0], [0]], np.float32),
        },
    ),
    "joined": forward(
        "w = Concat<axis: int = 0>(emb, more) e = Gather(w, ids) " + MEAN,
        {"emb": (2, 4), "more": (5, 4), "W": (4, 2)},
        AXIS,
    ),
    "quantized": forward(
        "x = Gather(emb, ids) m = ReduceMean<keepdims: int = 0>(x, one) t = Transpose(code) d = MatMul(m, t) "
        "s = Mul(code, code) n = ReduceSum<keepdims: int = 0>(s, one) f = Sub(n, d) "
        "k = ArgMin<axis: int = 1, keepdims: int = 0>(f) c = Gather(code, k) y = Add(c, m) z = MatMul(y, W)",
        {"emb": (7, 4), "code": (3, 4), "W": (4, 2)},
        AXIS,
    ),
}
TABLES = {
    "split": {"emb": 2},
    "added": {"emb": 1, "delta": 1},
    "subtracted": {"emb": 1, "delta": 1},
    "partly frozen": {"emb": 1, "rest": 1},
    "joined": {"emb": 1, "more": 1},
    "quantized": {"emb": 1, "code": 1},
}


def differentiated(model: onnx.ModelProto) -> ir.Model:
    return kx.differentiate(model)


def gradients(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the gradients of a training graph on the batch, as onnxruntime has them."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs() if each.name.endswith("_grad")]
    return {
        name.removesuffix("_grad"): np.asarray(array, np.float64)
        for name, array in zip(names, session.run(names, BATCH), strict=True)
    }


def after_one_step(model: ir.Model, folder: Path, **options: Any) -> dict[str, np.ndarray]:
    path = folder / "step.onnx"
    kx.save(kx.transform(model, **options), path)
    with kx.TrainingSession(path) as session:
        session.step(BATCH)
        return {name: np.asarray(session.parameters[name]) for name in session.parameters}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_a_table_and_a_plain_step_is_the_gradients(form: str, tmp_path: Path) -> None:
    before = {each.name: onnx.numpy_helper.to_array(each) for each in FORMS[form].graph.initializer}
    model = differentiated(FORMS[form])
    sites = {site.parameter: len(site.uses) for site in kx.scan(model).sites}
    assert sites == TABLES[form]
    found = gradients(model)
    after = after_one_step(model, tmp_path, preset="plain-sgd", lr=RATE, rest="sgd", rest_lr=RATE)
    assert set(after) == set(found)
    for name, array in after.items():
        moved = (before[name] - array.astype(np.float64)) / RATE
        # float32 weights near 1 are known to 6e-8, and the step is 0.1 of the gradient
        np.testing.assert_allclose(moved, found[name], atol=3e-6)
        assert not np.allclose(moved * 1.01, found[name], atol=3e-6) or not found[name].any()


@pytest.mark.parametrize("preset", ["half", "adagrad", "adaptive"])
def test_frozen_rows_of_a_table_stay_bit_for_bit(preset: str, tmp_path: Path) -> None:
    model = differentiated(FORMS["partly frozen"])
    before = onnx.numpy_helper.to_array(FORMS["partly frozen"].graph.initializer[0])
    after = after_one_step(model, tmp_path, preset=preset)["emb"]
    moved = np.any(after != before, axis=1)
    assert moved.tolist() == [False, True, False, True, False, False, False]


def test_uses_without_a_gradient_are_listed_and_are_no_dense_uses() -> None:
    (site,) = [each for each in kx.scan(differentiated(FORMS["quantized"])).sites if each.parameter == "code"]
    assert site.dense_uses == ()
    assert sorted((use.op, use.output) for use in site.dead_ends) == [("Mul", "s"), ("Transpose", "t")]


@pytest.mark.parametrize(
    ("nodes", "dead"),
    [
        ("q = Cast<to: int = 7>(emb) f = Cast<to: int = 1>(q) p = ReduceMax<keepdims: int = 0>(f)", "Cast"),
        ("q = Floor(emb) p = ReduceMax<keepdims: int = 0>(q)", "Floor"),
        ("q = Greater(emb, zero) f = Cast<to: int = 1>(q) p = ReduceMax<keepdims: int = 0>(f)", "Greater"),
        ("q = Shape(emb) f = Cast<to: int = 1>(q) p = ReduceMax<keepdims: int = 0>(f)", None),
    ],
)
def test_steps_comparisons_and_whole_numbers_are_dead_ends(nodes: str, dead: str | None) -> None:
    model = forward(
        f"e = Gather(emb, ids) m = ReduceMean<keepdims: int = 0>(e, one) {nodes} n = Add(m, p) z = MatMul(n, W)",
        {"emb": (7, 4), "W": (4, 2)},
        {**AXIS, "zero": np.float32(0.0).reshape(())},
    )
    (site,) = kx.scan(differentiated(model)).sites
    assert site.dense_uses == ()
    assert [use.op for use in site.dead_ends] == ([] if dead is None else [dead])


@pytest.mark.parametrize(
    ("nodes", "shape", "reason", "remedy"),
    [
        (
            "r = Gather(rel, k) e = Gather(emb, ids) m = ReduceMean<keepdims: int = 0>(e, one) "
            "u = Unsqueeze(m, one) v = MatMul(u, r) s = Squeeze(v, one) z = MatMul(s, W)",
            (6, 4, 4),
            "Gather 'r' looks rows up in it, and it is 6 x 4 x 4: a table has two dimensions",
            "store it as [6, 16], and reshape the looked-up rows",
        ),
        (
            "p = Unsqueeze(ids, last) at = Concat<axis: int = -1>(p, p) x = GatherND(rel, at) "
            "f = Gather(emb, ids) e = Add(x, f) " + MEAN,
            (4, 4, 4),
            "GatherND 'x' looks rows up in it, and it is 4 x 4 x 4: a table has two dimensions",
            "store it as [16, 4], and add each part's first row to its ids",
        ),
        (
            "t = Tanh(rel) x = Gather(t, ids) f = Gather(emb, ids) e = Add(x, f) " + MEAN,
            (7, 4),
            "Gather 'x' looks up rows of what Tanh 't' computes from it: its gradient is dense",
            "look the rows up in the parameter itself, and compute with the looked-up rows",
        ),
    ],
)
def test_a_lookup_that_makes_no_table_is_named(
    nodes: str, shape: tuple[int, ...], reason: str, remedy: str
) -> None:
    first = "" if "k)" not in nodes else "k = ReduceMax<keepdims: int = 0>(ids, one) "
    constants = {**AXIS, "last": np.array([-1], np.int64)}
    model = differentiated(forward(first + nodes, {"emb": (7, 4), "rel": shape, "W": (4, 2)}, constants))
    verdicts = {str(each.weight.name): each for each in find_tables(read_training_graph(model))}
    assert verdicts["emb"].site is not None
    aside = verdicts["rel"].aside
    assert aside is not None
    assert (aside.reason, aside.remedy) == (reason, remedy)
    assert all(verdicts[name].aside is None for name in ("emb", "W"))
