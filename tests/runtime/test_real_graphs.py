"""Sessions over graphs that exporters really wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from preset_names import ALL

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GRAPHS = [
    "ortart_legcore__nplm",
    "ortart_dyncore__bert_sum",
    "ortart_legcore__lookup_int32",
    "torchjoint_in__nplm_pad0",
    "torchjoint_in__nplm_sum",
]
HALF = {"ortart_dyncore__nplm_bf16": 2e-2, "ortart_dyncore__nplm_fp16": 2e-3}


@pytest.mark.parametrize("name", [*GRAPHS, *HALF])
def test_training_starts_at_the_exporters_loss_and_repeats_bit_for_bit(
    graph_case: Callable[..., Any], name: str
) -> None:
    case = graph_case(name)
    runs = []
    for threads in (1, 4):
        for _ in range(2):
            session = case.open(threads=threads)
            losses = [session.step(case.batches[index % 2])["loss"] for index in range(6)]
            runs.append((losses, {n: array.tobytes() for n, array in session.parameters.items()}))
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    # float32 forward passes agree to a few roundings, half precision to one of its own
    assert runs[0][0][0] == pytest.approx(case.loss, rel=HALF.get(name, 1e-5))
    assert runs[0][0][4] < runs[0][0][0]


@pytest.mark.parametrize("name", GRAPHS[:2])
def test_a_step_that_is_not_finite_leaves_every_state(graph_case: Callable[..., Any], name: str) -> None:
    case = graph_case(name)
    session = case.open()
    session.step(case.batches[0])
    broken = [key for key, array in session.parameters.items() if array.ndim == 1][-1]
    far = np.where(np.arange(session.parameters[broken].size) % 2, 3e38, -3e38).astype(np.float32)
    session.assign({broken: far})  # finite, but every second logit is -inf below the largest
    states = [key for key in session.states if not key.endswith("/slot")]  # which is scratch
    before = {key: session.states[key].tobytes() for key in states}
    assert session.step(case.batches[1])["skipped"]
    assert {key: session.states[key].tobytes() for key in states} == before


@pytest.mark.parametrize("name", [GRAPHS[0], GRAPHS[3]])
def test_an_id_out_of_range_names_the_graphs_own_input(graph_case: Callable[..., Any], name: str) -> None:
    case = graph_case(name)
    session = case.open()
    check = session._plan.step.id_checks[0]
    ids = next(key for key, array in case.batches[0].items() if array.dtype.kind == "i" and "lab" not in key)
    wrong = case.batches[0][ids].copy()
    wrong.flat[0] = check.vocab_size + 7
    with pytest.raises(UserError) as error:
        session.step({**case.batches[0], ids: wrong})
    assert error.value.message == (
        f"id {check.vocab_size + 7} in input '{ids}' is not a row of parameter '{check.parameter}',"
        f" which has {check.vocab_size} rows"
    )


def test_dropout_is_live_and_follows_the_seed(graph_case: Callable[..., Any]) -> None:
    case = graph_case("ortart_dyncore__nplm_dropout")

    def losses(seed: int) -> list[float]:
        session = case.open(seed=seed)
        return [session.step(case.batches[0])["loss"] for _ in range(3)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
    session = case.open(seed=1)
    assert session.evaluate(case.batches[:1]) == session.evaluate(case.batches[:1])


@pytest.mark.parametrize("preset", [*ALL, "plain-adam", "plain-sgd"])
def test_presets_resume_exactly(graph_case: Callable[..., Any], tmp_path: Path, preset: str) -> None:
    case = graph_case(GRAPHS[0], preset=preset)
    session = case.open()
    for index in range(3):
        session.step(case.batches[index % 2])
    session.save(tmp_path / "run.ckpt")
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1, model=case.model)
    for index in range(3, 6):
        assert session.step(case.batches[index % 2]) == resumed.step(case.batches[index % 2])
    for name, array in session.states.items():
        assert array.tobytes() == resumed.states[name].tobytes(), name


@pytest.mark.parametrize("name", GRAPHS)
def test_the_exported_forward_graph_has_the_sessions_loss(
    graph_case: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    case = graph_case(name)
    session = case.open()
    session.step(case.batches[0])
    session.export(tmp_path / "trained.onnx")
    loaded = ort.InferenceSession(tmp_path / "trained.onnx")
    used = {item.name for item in loaded.get_inputs()}
    loss = loaded.run([session._plan.step.loss], {k: v for k, v in case.batches[1].items() if k in used})[0]
    reduction = 1 if session._open._reduction != "sum" else len(next(iter(case.batches[1].values())))
    # the same nodes at the same weights; constant folding may round differently
    assert session.evaluate(case.batches[1:]) == pytest.approx(float(loss) / reduction, rel=1e-6)


def test_a_drop_in_graph_hands_out_gradients_and_keeps_the_parameters(graph_case: Callable[..., Any]) -> None:
    case = graph_case(GRAPHS[0], shape="dense")
    session = case.open()
    metrics = session.step(case.batches[0])
    assert metrics["loss"] == pytest.approx(case.loss, rel=1e-5)  # float32 forward pass
    for name, array in session.parameters.items():
        assert array.tobytes() == case.values[name].tobytes()
    gradients = {name: metrics["outputs"][f"{name}_grad"] for name in session.parameters}
    session.assign({name: case.values[name] - np.float32(0.01) * g for name, g in gradients.items()})
    assert session.step(case.batches[0])["loss"] < metrics["loss"]
