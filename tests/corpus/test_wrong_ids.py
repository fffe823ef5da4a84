"""Ids and labels that are no rows, fed to real graphs: a sentence, or what the graph itself makes of them.

Nothing is read or written outside a tensor: onnxruntime's own kernels check every index on the CPU (Gather,
GatherND, GatherElements, ScatterND, ScatterElements, tried below), and a step that fails leaves every bit as it
was. What graphs do on their own stays theirs: they wrap, clip, or take an id as no row (one-hot).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from corpus_cases import marked

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession

GRAPHS = {
    "ortart_legcore__nplm": "half",  # Gather
    "ortart_legcore__twotower": "adaptive",  # two tables: one is wrong, the other must not move
    "ortart_legcore__lookup_int32": "half",
    "ortart_legloss__lookup_gather_op": "adagrad",  # GatherElements
    "ortart_legcore__lookup_concat": "half",  # tables joined to one
    "ortart_legloss__lookup_onehot": "half",
    "torchjoint_in__nplm_pad0": "r1.7",
    "torchjoint_in__dlrm_offsets_sum": "half",  # bags with offsets
    "jax2onnx__nplm_clip": "half",
    "jax2onnx__nplm_wrap": "half",
    "jax2onnx__nplm_bf16": "half",
    "jax2onnx__rnn_scan_bptt": "half",  # lookups in loops
    "ortmodule_leg__nplm": "half",  # predictions come before the loss
    "ortart_legloss__gpt_tied": "plain-adam",
}
LIMITS = [2**31 - 1, -(2**31), 2**31, 2**33, 2**62, 2**63 - 1, -(2**63)]


REASONS = ("is not a row of parameter", "is no class of the scores", "cannot be run through the graph")


def opened(name: str, preset: str) -> tuple[TrainingSession, dict[str, np.ndarray], list[int]]:
    case, graph = marked(name)
    model = transform(case.path, preset=preset)
    session = TrainingSession(model, parameters=graph.initial(case), threads=1)
    feed = {**case.feed(), **graph.fed_back(case)}
    sizes = {site.vocab_size for site in metadata.read_list(model, "sites", metadata.Site)}
    return session, {item.name: feed[item.name] for item in session.batch_inputs}, sorted(sizes)


def bits(session: TrainingSession) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in session.states.items()}


def stepped(session: TrainingSession, batch: dict[str, np.ndarray]) -> str:
    """Make a step; return `kept`, `skipped`, or the error."""
    try:
        return "skipped" if session.step(batch)["skipped"] else "kept"
    except UserError as e:
        return str(e)


@pytest.mark.parametrize("name", GRAPHS)
def test_wrong_ids_and_labels(name: str) -> None:
    session, batch, sizes = opened(name, GRAPHS[name])
    session.step(batch)
    refused = 0
    for key, array in batch.items():
        if array.dtype.kind not in "iu" or array.size == 0:
            continue
        bounds = np.iinfo(array.dtype)
        wrong = [-1, *(-size - 1 for size in sizes), *sizes, sizes[-1] + 1, *LIMITS]
        for value in [number for number in wrong if bounds.min <= number <= bounds.max]:
            given = array.copy()
            given.flat[given.size // 2] = value
            before = bits(session)
            said = stepped(session, {**batch, key: given})
            refused += said not in ("kept", "skipped")
            assert (said == "kept") == (bits(session) != before), (key, value, said)
            for state, kept in session.states.items():
                assert np.isfinite(np.asarray(kept, np.float64)).all(), (key, value, state)
            if said not in ("kept", "skipped"):
                assert any(text in said for text in REASONS)
                assert said.endswith("nothing was written")
    assert session.step(batch)["skipped"] is False
    lenient = ("clip", "wrap", "onehot", "bf16")  # these take any id; jax2onnx's labels are one-hot
    assert refused > 0 or any(word in name for word in lenient)


@pytest.mark.parametrize("wrong", [120, -121, 2**40, -(2**63)])
def test_a_wrong_id_in_one_table_leaves_the_other_alone(wrong: int) -> None:
    session, batch, _ = opened("ortart_legcore__twotower", "half")
    session.step(batch)
    before = bits(session)
    user = batch["user"].copy()
    user[4] = wrong
    with pytest.raises(UserError) as error:
        session.step({**batch, "user": user})
    assert error.value.message == (
        f"id {wrong} in input 'user' is not a row of parameter 'user_emb.weight', which has 120 rows"
    )
    assert bits(session) == before


def test_an_id_of_the_wrong_type_or_size_is_refused() -> None:
    session, batch, _ = opened("ortart_legcore__nplm", "half")
    ids = batch["ids"]
    before = bits(session)
    for given in (ids.astype(np.float32), ids.astype(np.uint64), ids[None], ids[:, :0], ids.astype(bool)):
        with pytest.raises(UserError):
            session.step({**batch, "ids": given})
    assert bits(session) == before


def failing(operator: str, index: np.ndarray, **attributes: Any) -> str:
    """Return onnxruntime's error for an operator on float32[5, 3] with these indices."""
    index_type = onnx.helper.np_dtype_to_tensor_dtype(index.dtype)
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", 1, [5, 3]), info("index", index_type, list(index.shape))]
    feed = {"x": np.zeros((5, 3), np.float32), "index": index}
    if operator.startswith("Scatter"):
        shape = index.shape if operator == "ScatterElements" else (*index.shape[:-1], 3)
        inputs.append(info("updates", 1, list(shape)))
        feed["updates"] = np.ones(shape, np.float32)
    node = onnx.helper.make_node(operator, [item.name for item in inputs], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "g", inputs, [info("y", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=r"(?i)ind") as error:  # onnxruntime's errors share no class
        session.run(None, feed)
    return str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("wrong", [5, -6, 2**31 - 1, -(2**31), 2**62, -(2**63)])
def test_the_kernels_that_steps_are_made_of_check_their_indices(wrong: int, dtype: Any) -> None:
    if not np.iinfo(dtype).min <= wrong <= np.iinfo(dtype).max:
        pytest.skip("no such number")
    rows = np.array([[1, wrong, 2]], dtype)
    assert "Gather" in failing("Gather", rows, axis=0)
    assert "GatherElements" in failing("GatherElements", rows.T.repeat(3, axis=1), axis=0)
    assert "ScatterElements" in failing("ScatterElements", rows.T.repeat(3, axis=1), axis=0, reduction="add")
    if dtype is np.int64:  # these take no other
        assert "GatherND" in failing("GatherND", rows.T)
        assert "ScatterND" in failing("ScatterND", rows.T, reduction="add")
        assert "ScatterND" in failing("ScatterND", rows.T)
