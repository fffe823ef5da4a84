"""Skipped steps: what was not finite and where, and the limit that stops a run of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from corpus_cases import marked

from kfac_onnx.api import transform
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.step.skip_causes import Cause, advice, look_at, reasons

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

NAN, INF = float("nan"), float("inf")


# --- looking at one array ---------------------------------------------------------------------------


def test_finite_arrays_have_no_cause() -> None:
    for array in (np.zeros((3, 2)), np.zeros(()), np.zeros((0, 4)), np.full(3, 3e38, np.float32)):
        assert look_at("gradient", "W", array) is None


@pytest.mark.parametrize(
    ("bad", "what"),
    [([NAN], "NaN"), ([INF], "infinite"), ([-INF, INF], "infinite"), ([NAN, INF], "not finite")],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_entries_are_counted_and_the_first_is_found(bad: list[float], what: str, dtype: Any) -> None:
    array = np.zeros((4, 5), dtype)
    array[2, 3 : 3 + len(bad)] = bad
    cause = look_at("gradient", "fc.weight", array)
    assert cause is not None
    assert (cause.what, cause.bad, cause.total, cause.index) == (what, len(bad), 20, (2, 3))


def test_rows_carry_the_id_they_belong_to() -> None:
    rows, ids = np.zeros((64, 8), np.float32), np.arange(64) * 10
    rows[[17, 40, 41], [0, 7, 3]] = NAN
    cause = look_at("gradient", "user.weight", rows, ids=ids, rows=True)
    text = "gradient of 'user.weight': 3 of 64 rows are NaN, the first at lookup 17, id 170"
    assert str(cause) == text
    # ids that are not those of the rows (merged ones) are not guessed
    cause = look_at("gradient", "user.weight", rows, ids=ids[:5], rows=True)
    assert str(cause) == "gradient of 'user.weight': 3 of 64 rows are NaN, the first at lookup 17"


def test_a_large_array_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_onnx.runtime.step.skip_causes.PIECE", 16)
    array = np.zeros((50, 3), np.float32)
    array[33, 1], array[49, 2] = INF, NAN
    cause = look_at("parameter", "W", array)
    assert str(cause) == "parameter 'W': 2 of 150 entries are not finite, the first at [33, 1]"
    cause = look_at("gradient", "W", array, rows=True)
    assert str(cause) == "gradient of 'W': 2 of 50 rows are not finite, the first at lookup 33"


def test_sentences() -> None:
    one = Cause("input", "y", "NaN", 1, 6, (3,))
    assert str(one) == "batch input 'y': 1 of 6 entries is NaN, at [3]"
    loss = Cause("loss", "anything", "infinite", 1, 1)
    assert str(loss) == "loss is infinite"
    total = Cause("update", "W", "sum", 0, 8, largest=3.1e38)
    assert str(total) == "update of 'W': entries up to 3.1e+38, whose sum is beyond float32"
    assert reasons((one, loss)) == f"{one}; {loss}"
    assert reasons((one,) * 5) == f"{one}; {one}; {one}; and 2 more"
    assert reasons(()).startswith("something was not finite, and is not found again")
    assert json.loads(json.dumps(one.to_json())) == {
        "kind": "input", "name": "y", "what": "NaN", "bad": 1, "total": 6, "index": [3], "rows": False,
        "id": None, "largest": 0.0, "text": str(one),
    }  # fmt: skip


def test_advice_names_the_earliest_reason() -> None:
    y, W = Cause("input", "y", "NaN", 1, 6, (3,)), Cause("parameter", "W", "infinite", 1, 6, (3,))
    loss = Cause("loss", "loss", "NaN", 1, 1)
    assert advice((y, W, loss), 0.5) == f"clean the data: {y}"
    assert advice((W, loss), 0.5) == f"start from finite values: {W}"
    assert advice((loss,), 0.5) == (
        "lower the learning rate (it is 0.5), raise the damping, or look for examples with extreme values in"
        " the data"
    )


# --- skipped steps of a session -----------------------------------------------------------------------


def texts(metrics: Any) -> list[str]:
    assert metrics["skipped"] is True
    return [str(cause) for cause in metrics["skip"]]


def test_kept_steps_say_nothing(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    assert "skip" not in open_toy().step(toy.batches(1)[0])


def test_a_batch_that_is_not_finite(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    session = open_toy()
    y = toy.batches(1)[0]["y"]
    y[[2, 4]] = NAN, INF
    found = texts(session.step({"ids": np.arange(6), "y": y}))
    assert found[:2] == ["batch input 'y': 2 of 6 entries are not finite, the first at [2]", "loss is NaN"]


def test_rows_of_a_table_that_is_not_finite(open_toy: Callable[..., TrainingSession]) -> None:
    """Only a run with a far too large rate gets there: the update is finite, the row that it makes is not."""
    session = open_toy()
    session._holders["emb.weight"].live.view()[9] = INF
    skip = session.step({"ids": np.array([1, 9, 2, 9]), "y": np.zeros(4, np.float32)})["skip"]
    assert "loss is infinite" in [str(cause) for cause in skip] or "loss is NaN" in map(str, skip)


@pytest.mark.parametrize(
    ("preset", "rest"),
    [("half", "sgd"), ("half", "adam"), ("r1.7", "momentum"), ("adagrad", "adagrad"), ("adaptive", "adam"),
     ("plain-adam", "adam"), ("plain-sgd", "sgd"), ("plain-adagrad", "adagrad")],
)  # fmt: skip
def test_every_preset_blames_what_was_fed(graph_case: Callable[..., Any], preset: str, rest: str) -> None:
    case = graph_case("ortart_legcore__twotower", preset=preset, rest=rest)
    session = case.open()
    session.step(case.batches[0])
    before = {key: array.tobytes() for key, array in session.states.items()}
    target = case.batches[0]["target"].copy()
    target[2] = INF
    metrics = session.step({**case.batches[0], "target": target})
    found = texts(metrics)
    assert found[0] == "batch input 'target': 1 of 6 entries is infinite, at [2]"
    assert found[1] in ("loss is NaN", "loss is infinite")
    user = int(case.batches[0]["user"][2])
    (gradient,) = [c for c in metrics["skip"] if (c.kind, c.name) == ("gradient", "user_emb.weight")]
    if preset == "plain-adam":  # the whole table's gradient
        assert (gradient.bad, gradient.index[0], gradient.total) == (16, user, 120 * 16)
    else:
        assert (gradient.bad, gradient.index, gradient.total, gradient.id) == (1, (2,), 6, user)
    assert {key: array.tobytes() for key, array in session.states.items()} == before


def test_a_diverged_parameter_is_found_with_the_id(graph_case: Callable[..., Any]) -> None:
    case = graph_case("ortart_legcore__twotower")
    session = case.open()
    user = int(case.batches[0]["user"][3])
    session._holders["user_emb.weight"].live.view()[user] = INF
    found = texts(session.step(case.batches[0]))
    assert found[0] == f"parameter 'user_emb.weight': 1 of 6 rows is infinite, at lookup 3, id {user}"
    session._holders["user_emb.weight"].live.view()[user] = 0
    session._holders["user_mlp.0.weight"].live.view()[5, 7] = NAN
    assert texts(session.step(case.batches[0]))[0] == (
        "parameter 'user_mlp.0.weight': 1 of 256 entries is NaN, at [5, 7]"
    )


def test_a_factor_that_overflows_alone(graph_case: Callable[..., Any]) -> None:
    """Gradients of 1e20 are finite and their squares are not: the factor is blamed, its root is not repeated."""
    case = graph_case("ortart_legcore__twotower")
    session = case.open()
    session.step(case.batches[0])
    weight = session.parameters["item_mlp.2.bias"] * np.float32(1e20)
    session.assign({"item_mlp.2.bias": weight + np.float32(1e19)})
    found = texts(session.step(case.batches[0]))
    tables = [text for text in found if "user_emb" in text]
    assert tables == [
        "new factor 'kfac/user_emb.weight/G': 256 of 256 entries are infinite, the first at [0, 0]"
    ]


def test_a_factor_whose_trace_overflows_is_skipped_at_once(graph_case: Callable[..., Any]) -> None:
    """Kept at a step without a refresh, it would make each later step a refresh that fails, for ever."""
    case = graph_case("ortart_legcore__twotower")
    session = case.open()
    for _ in range(2):
        session.step(case.batches[0])
    signs = np.resize([1, -1], 16)  # entries are finite, and so is their sum
    factor = session._holders["kfac/user_emb.weight/G"].live
    before = factor.read()
    factor.write(np.outer(signs, signs) * 9e36)
    assert texts(session.step(case.batches[0])) == [
        "new factor 'kfac/user_emb.weight/G': entries up to 8.55e+36, whose sum is beyond float32"
    ]
    factor.write(before)
    assert session.step(case.batches[0])["skipped"] is False


@pytest.mark.parametrize("rest", ["sgd", "adam", "momentum", "adagrad"])
def test_weights_beyond_half_precision_are_skipped(graph_case: Callable[..., Any], rest: str) -> None:
    """70000 is finite in float32, where the step is computed, and infinite in float16, where it is stored."""
    case = graph_case("ortart_dyncore__nplm_fp16", rest=rest, rest_lr=1e7)
    session = case.open()

    def kept() -> dict[str, bytes]:
        states = session.states.items()
        return {key: array.tobytes() for key, array in states if not key.endswith("slot")}  # which is scratch

    before = kept()
    found = texts(session.step(case.batches[0]))
    assert all(text.startswith("update of 'core.") for text in found)
    assert kept() == before


@pytest.mark.parametrize("name", ["ortart_dyncore__nplm_fp16", "ortart_dyncore__nplm_bf16"])
def test_half_precision_graphs(graph_case: Callable[..., Any], name: str) -> None:
    case = graph_case(name)
    session = case.open()
    key = next(key for key, array in session.parameters.items() if array.ndim == 2 and "emb" not in key)
    session._holders[key].live.view()[1, 2] = INF
    found = texts(session.step(case.batches[0]))
    assert found[0].startswith(f"parameter '{key}': 1 of ")
    assert found[0].endswith("entries is infinite, at [1, 2]")


def test_dropout_does_not_hide_a_bad_parameter(graph_case: Callable[..., Any]) -> None:
    case = graph_case("ortart_dyncore__nplm_dropout")
    session = case.open(seed=3)
    key = next(key for key, array in session.parameters.items() if array.ndim == 1)
    session._holders[key].live.view()[0] = NAN
    for _ in range(3):
        assert texts(session.step(case.batches[0]))[0].startswith(f"parameter '{key}': 1 of ")


def test_what_is_computed_again_sees_the_same_dropout(graph_case: Callable[..., Any]) -> None:
    """A bad state of the optimizer skips the step and leaves the loss, which depends on what was dropped."""
    case = graph_case("ortart_dyncore__nplm_dropout", rest="momentum")
    losses: set[float] = set()
    with case.open(seed=3) as session:
        name = next(
            n for n, holder in session._holders.items() if holder.state.role != "parameter" and "fc" in n
        )
        session._holders[name].live.view()[:] = NAN
        for _ in range(3):
            made = session.step(case.batches[0])
            assert made["skipped"]
            loss = session._plan.step.loss
            again = session._open.skips._computed((loss,), case.batches[0])[loss]
            np.testing.assert_allclose(again, made["loss"], rtol=1e-6)  # float32, another thread count
            losses.add(made["loss"])
    assert len(losses) == 3


def test_a_graph_whose_loss_lies_outside() -> None:
    case, graph = marked("ortmodule_leg__nplm")
    session = TrainingSession(transform(case.path), parameters=graph.initial(case), threads=1)
    batch = {"ids": case.feed()["ids"]}
    fed = np.array(graph.fed_back(case)["pred_grad"])
    fed[1, 5] = NAN
    found = texts(session.step({**batch, "pred_grad": fed}))
    assert found[0] == f"batch input 'pred_grad': 1 of {fed.size} entries is NaN, at [1, 5]"
    assert found[1].startswith("gradient of 'emb.weight': ")
    session._holders["emb.weight"].live.view()[:] = INF
    session.forward(batch)
    found = texts(session.step({**batch, "pred_grad": np.zeros_like(fed)}))
    assert found[0].startswith("parameter 'emb.weight': ")
    assert found[1].startswith("prediction 'pred': ")


def test_the_finder_is_opened_once(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfac_onnx.runtime.step import skips

    opened: list[int] = []
    real = skips.open_session
    monkeypatch.setattr(skips, "open_session", lambda *a, **k: (opened.append(1), real(*a, **k))[1])
    session, batch = open_toy(), toy.batches(1)[0]
    bad = {**batch, "y": np.full(6, NAN, np.float32)}
    session.step(batch)
    assert opened == []
    for _ in range(4):
        session.step(bad)
    assert len(opened) <= 1


def test_a_finder_that_fails_does_not_stop_the_run(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        message = "no memory"
        raise UserError(message)

    monkeypatch.setattr("kfac_onnx.runtime.step.skips.open_session", broken)
    session, batch = open_toy(), toy.batches(1)[0]
    found = texts(session.step({**batch, "y": np.full(6, NAN, np.float32)}))
    assert found[0] == "batch input 'y': 6 of 6 entries are NaN, the first at [0]"
    assert session.step(batch)["skipped"] is False


def test_skips_are_logged(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], caplog: pytest.LogCaptureFixture
) -> None:
    session, batch = open_toy(), toy.batches(1)[0]
    session.step(batch)
    with caplog.at_level("WARNING", logger="kfac_onnx"):
        session.step({**batch, "y": np.full(6, NAN, np.float32)})
    assert caplog.messages[0].startswith(
        "batch 2 was skipped: batch input 'y': 6 of 6 entries are NaN, the first at [0]; loss is NaN; "
    )


# --- the limit ------------------------------------------------------------------------------------------


def broken(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, "y": np.full_like(batch["y"], NAN)}


def test_so_many_skips_in_a_row_stop_the_run(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    good = toy.batches(4)
    batches = [*good[:2], *map(broken, good[:3]), good[3]]
    session, rows = open_toy(), []
    with pytest.raises(UserError) as error:
        session.fit(batches, skip_limit=3, metrics=rows.append, checkpoint=tmp_path / "run.ckpt")
    assert error.value.message.startswith(
        "the last 3 steps were all skipped, because something was not finite:"
        " batch input 'y': 6 of 6 entries are NaN, the first at [0]; loss is NaN; "
    )
    assert error.value.help == (
        "clean the data: batch input 'y': 6 of 6 entries are NaN, the first at [0];"
        f" the parameters before them are in '{tmp_path / 'run.ckpt'}'"
    )
    assert [("skip" in row, row["skipped"]) for row in rows] == [(False, False)] * 2 + [(True, True)] * 3
    assert rows[2]["skip"][0] == "batch input 'y': 6 of 6 entries are NaN, the first at [0]"
    plain = open_toy()
    plain.fit(good[:2])
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1)
    for name, array in plain.states.items():
        assert array.tobytes() == resumed.states[name].tobytes(), name
    assert (resumed.committed, resumed.skipped, resumed.position) == (2, 3, 5)


def test_a_kept_step_starts_the_count_anew(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    good = toy.batches(6)
    batches = [batch if index % 3 == 0 else broken(batch) for index, batch in enumerate(good)]
    result = open_toy().fit(batches, skip_limit=3)
    assert (result.steps, result.skipped) == (6, 4)
    assert result.last_skip[0] == Cause("input", "y", "NaN", 6, 6, (0,))
    session = open_toy()
    with pytest.raises(UserError):
        session.fit(batches, skip_limit=2)
    assert session.position == 3
    # the count belongs to one call of fit
    assert session.fit([broken(good[0])], skip_limit=2).skipped == 1


def test_without_a_limit_a_run_goes_on(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    batches = [broken(batch) for batch in toy.batches(12)]
    assert open_toy().fit(batches, skip_limit=None).skipped == 12
    with pytest.raises(UserError, match="the last 10 steps were all skipped"):
        open_toy().fit(batches)
    with pytest.raises(UserError, match=r"^skip_limit must be at least 1, got 0"):
        open_toy().fit(batches, skip_limit=0)
    with pytest.raises(UserError, match=r"^the last step was skipped"):
        open_toy().fit(batches, skip_limit=1)
