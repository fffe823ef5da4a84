"""Decay of a table's looked-up rows: what decay of the whole table in each step would take off each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from corpus_cases import GRAPHS, initial_state
from corpus_steps import compare
from preset_names import ALL, PER_EXAMPLE

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.api import TransformOptions
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import State
from kfac_onnx.passes.standard import PLAIN
from kfac_onnx.reports.inspect import inspect
from kfac_onnx.runtime.schedules import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

REPEATED, PADDED, TIED = "torchjoint_in__nplm", "torchjoint_in__nplm_pad0", "ortart_legloss__gpt_tied"
RATE, DECAY, V, D = 0.5, 0.2, 7, 3
WHOLE = ("plain-momentum", "plain-adam")
"""Those whose step is of the whole table, so that every row decays in every step."""
TABLE = np.random.default_rng(5).normal(size=(V, D)).astype(np.float32)
# float32 rows of size 1 after a rounding or two in each of ten steps
CLOSE = {"rtol": 2e-6, "atol": 0.0}


@pytest.mark.parametrize("name", [REPEATED, PADDED, TIED])
@pytest.mark.parametrize("preset", ALL)
def test_steps_equal_the_reference(name: str, preset: str) -> None:
    """Of repeated ids, dropped lookups, rows that come in every second step, and a table that is tied."""
    compare(name, preset, threads=4, steps=5, rest="sgd", table_decay=1.0)


@pytest.mark.parametrize("name", ["torchjoint_in__lookup_axis1", "torchjoint_in__nplm_mixed_bf16emb"])
def test_other_layouts_and_precisions(name: str) -> None:
    compare(name, "half", threads=1, steps=5, rest="sgd", table_decay=1.0)


def graph() -> ir.Model:
    """Return a training graph of the mean of rows times s: without a gradient where s = 0."""
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    model (int64[N, 3] ids, float s) => (float loss) {
        e = Gather(emb, ids) y = Mul(e, s) loss = ReduceMean<keepdims: int = 0>(y)
    }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(TABLE, "emb"))
    return kx.differentiate(model, loss_output="loss", train=("emb",))


def decaying(preset: str, **options: Any) -> ir.Model:
    scale = {"grad_scale": 1.0} if preset in PER_EXAMPLE else {}
    return kx.transform(graph(), preset=preset, lr=RATE, table_decay=DECAY, **scale, **options)


IDS: list[Sequence[Sequence[int]]] = [
    [[0, 1, 1]],
    [[1, 2, 0], [1, 1, 1]],
    [[3, 3, 3]],
    [[0, 4, -3]],
    [[2, 1, 3]],
]


@pytest.mark.parametrize("preset", [*ALL, *PLAIN])
def test_without_a_gradient_a_row_is_left_the_product_of_all_steps_since(preset: str) -> None:
    """Under a schedule, with a step that is skipped, and rows that nobody ever looks up."""
    text = "cosine:warmup=3,steps=12,final=0.1"
    factors = np.ones(V)
    expected = TABLE.astype(np.float64)
    with kx.TrainingSession(decaying(preset), schedule=text, threads=2) as session:
        for step, ids in enumerate([*IDS, *IDS]):
            bad = step == 3
            before = {name: value.tobytes() for name, value in session.states.items()}
            metrics = session.step({"ids": np.array(ids), "s": np.float32(np.nan if bad else 0.0)})
            assert metrics["skipped"] is bad
            if bad:
                after = {name: value.tobytes() for name, value in session.states.items()}
                assert {name for name in before if before[name] != after[name]} <= {
                    "kfac/emb/slot",
                    "kfac/emb/decay.slot",
                }
                continue
            factors *= 1 - RATE * parse(text).factor(step) * DECAY
            rows = np.arange(V) if preset in WHOLE else np.unique(np.array(ids) % V)
            expected[rows] *= factors[rows, None]
            factors[rows] = 1.0
        after = np.asarray(session.parameters["emb"], np.float64)
        np.testing.assert_allclose(after, expected, **CLOSE)
        assert not np.allclose(TABLE + 1.01 * (after - TABLE), expected, **CLOSE)
        assert preset in WHOLE or np.array_equal(after[5:], TABLE[5:])


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", [*ALL, "plain-adagrad"])
def test_the_written_model_decays_alike_on_any_host(preset: str, target: str) -> None:
    """There an id comes as often as it is looked up."""
    import onnxruntime as ort

    model = decaying(preset, target=target)
    states = metadata.read_list(model, "state", State)
    assert inspect(model).sites[0].decay == DECAY
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # a CPU adds rows one after the other then
    host = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    kept = {state.input: initial_state(state, {"emb": TABLE}) for state in states}
    with kx.TrainingSession(decaying(preset)) as session:
        for ids in IDS:
            batch = {"ids": np.array(ids), "s": np.asarray(1.0, np.float32)}
            session.step(batch)
            news = host.run([state.output for state in states], batch | kept)
            kept = {state.input: np.asarray(new) for state, new in zip(states, news, strict=True)}
        np.testing.assert_allclose(kept["emb"], session.parameters["emb"], rtol=2e-6, atol=2e-6)


def test_a_run_goes_on_where_it_stopped(tmp_path: Any) -> None:
    ends = []
    for stop in (None, 3):
        session = kx.TrainingSession(decaying("adaptive"))
        for step, ids in enumerate(IDS):
            if step == stop:
                session.save(tmp_path / "run.ckpt")
                session.close()
                session = kx.TrainingSession.resume(tmp_path / "run.ckpt")
            session.step({"ids": np.array(ids), "s": np.float32(1.0)})
        ends.append(session.parameters["emb"].tobytes())
        session.close()
    assert ends[0] == ends[1]


def test_a_rule_has_a_decay_of_its_own() -> None:
    text = TransformOptions(table_decay=0.1, rules=("emb=adagrad{table-decay=0.3}", "o*=plain-sgd")).text
    assert 'insert-embedding-kfac{preset=adagrad,only=[emb],rate="kfac/lr of emb",table-decay=0.3}' in text
    assert "insert-embedding-kfac{table-decay=0.1}" in text
    assert 'insert-optimizer{method=sgd,parameters=all,only=[o*],rate="kfac/lr of o*"}' in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "insert-embedding-kfac{shape=dense,table-decay=0.1}",
            "table-decay belongs to the step of a table, and shape=dense leaves that to the host\n"
            "  in:   insert-embedding-kfac\n"
            "  help: let the optimizer that takes the gradients decay, or set shape=rows",
        ),
        (
            "insert-optimizer{table-decay=0.1}",
            "table-decay is set, and this optimizer gets no embedding table\n"
            "  in:   insert-optimizer\n"
            "  help: weight-decay is that of other parameters; `scan MODEL` lists the tables",
        ),
    ],
)
def test_where_it_cannot_be_it_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        kx.transform(GRAPHS / f"{REPEATED}.onnx", pipeline=f"find-embeddings,{text},close-step,dce,lower")
    assert str(caught.value) == message


def test_the_dense_shape_says_so_by_its_option() -> None:
    with pytest.raises(UserError) as caught:
        TransformOptions(shape="dense", table_decay=0.1)
    assert str(caught.value) == (
        "shape=dense inserts no optimizer, so table_decay cannot be set\n"
        "  help: leave it to the optimizer that takes the gradients, or set shape=rows"
    )
