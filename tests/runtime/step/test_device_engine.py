"""Steps on a device that is not the CPU: the numbers of the CPU, and what crosses the bus in a step.

The device is made of host memory (`fake_device`): kernels are the CPU's, all else is as with a real one.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from fake_device import FakeCuda
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException  # pyright: ignore

import kfac_onnx as kx
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession, evaluation, open_step
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.step import cuda_graphs, stepper
from kfac_onnx.runtime.step.device_engine import DeviceEngine
from kfac_onnx.runtime.step.tensors import Buffer, read_value, write_value

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

DATA = Path(__file__).parents[2] / "data" / "graphs"
GRAPHS = ["torchjoint_in__nplm", "ortart_dyncore__nplm"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A device, on which every session is opened from here on."""
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(open_step, "device_of", lambda providers: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: False)
    return fake


def bits(session: TrainingSession) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.states.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, bool, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 4)])
def test_a_buffer_goes_there_and_back(cuda: FakeCuda, dtype: Any, shape: tuple[int, ...]) -> None:
    array = (np.arange(int(np.prod(shape))) % 2).reshape(shape).astype(dtype)
    element = (
        int(onnx.TensorProto.BFLOAT16)
        if dtype is ml_dtypes.bfloat16
        else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    )
    buffer = Buffer(array, element, cuda.device)
    assert buffer.array is None
    found = buffer.read()
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    changed = (1 - array.astype(np.int64)).astype(dtype)
    buffer.write(changed)
    assert buffer.view().tobytes() == changed.tobytes()
    assert found.tobytes() == array.tobytes(), "what was read is a copy"


def test_a_value_that_is_no_column_goes_up_whole(cuda: FakeCuda) -> None:
    buffer = Buffer(np.zeros((4,), np.float32), int(onnx.TensorProto.FLOAT), cuda.device)
    write_value(buffer.value, np.arange(8, dtype=np.float32)[::2], buffer.element)
    np.testing.assert_array_equal(read_value(buffer.value, buffer.element), [0, 2, 4, 6])


def test_no_room_is_a_sentence(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    import onnxruntime as ort

    def full(*_: object) -> None:
        raise RuntimeException("CUDA failure 2: out of memory ; GPU=0")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    with pytest.raises(UserError) as error:
        Buffer(np.zeros((1000, 500), np.float32), int(onnx.TensorProto.FLOAT), cuda.device)
    assert error.value.message == (
        "device cuda:0 has no room for 0.00 GB: CUDA failure 2: out of memory ; GPU=0"
    )


@pytest.mark.parametrize("stage_inputs_on_host", [False, True])
def test_steps_give_the_bits_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    toy: ModuleType,
    open_toy: Callable[..., TrainingSession],
    stage_inputs_on_host: bool,
) -> None:
    """Learning rates change from step to step, one step is skipped, shapes change, roots are refreshed."""
    batches = toy.batches(8)
    batches[3] = {name: array[:3] for name, array in batches[3].items()}

    def trained() -> tuple[list[Any], dict[str, bytes]]:
        with open_toy(schedule="linear:steps=12") as session:
            losses = [session.step(batch)["loss"] for batch in batches]
            return losses, bits(session)

    losses, states = trained()
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(open_step, "device_of", lambda providers: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: stage_inputs_on_host)
    fake.inputs_on_host = stage_inputs_on_host
    found, there = trained()
    assert found == losses
    assert there == states


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("preset", ["half", "adagrad", "r1.7", "plain-adam"])
def test_a_graph_lowered_for_cuda_gives_the_numbers_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, graph_case: Callable[..., Any], name: str, preset: str
) -> None:
    """One thread, where ScatterND adds rightly: the bodies differ only in the order of float32 sums."""
    on_cpu = graph_case(name, preset=preset, lr=0.01)
    with on_cpu.open() as session:
        losses = [session.step(on_cpu.batches[n % 2])["loss"] for n in range(6)]
        states = session.states
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(open_step, "device_of", lambda providers: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: False)
    case = graph_case(name, preset=preset, lr=0.01, target="cuda")
    with case.open() as session:
        found = [session.step(case.batches[n % 2])["loss"] for n in range(6)]
        there = session.states
    np.testing.assert_allclose(found, losses, rtol=1e-5)  # float32, sums of some thousand terms
    for key, array in states.items():
        size = float(np.abs(array).max(initial=0.0))
        np.testing.assert_allclose(there[key], array, rtol=0, atol=1e-4 * size + 1e-12, err_msg=key)


def test_only_a_batch_and_scalars_cross_the_bus(cuda: FakeCuda, toy: ModuleType, open_toy: Any) -> None:
    """A step's bytes do not grow with the vocabulary, and a batch goes up once."""
    crossed: list[dict[str, int]] = []
    for vocab in (64, 4096):
        with open_toy(model={"vocab": vocab}) as session:
            batches = [
                {name: array % 64 if array.dtype.kind == "i" else array for name, array in batch.items()}
                for batch in toy.batches(6)
            ]
            for batch in batches[:4]:
                session.step(batch)
            cuda.reset()
            session.step(batches[4])
            crossed.append(dict(cuda.copies))
            size = sum(array.nbytes for array in batches[4].values())
            assert cuda.copies["up"] <= size + 64, "more than the batch and some scalars went up"
            assert sorted(cuda.uploads, reverse=True)[: len(batches[4])] == sorted(
                (array.nbytes for array in batches[4].values()), reverse=True
            )
    assert crossed[0] == crossed[1]


def test_a_learning_rate_is_written_when_it_changes(cuda: FakeCuda, toy: ModuleType, open_toy: Any) -> None:
    with open_toy() as session:
        batches = toy.batches(5)
        for batch in batches[:3]:
            session.step(batch)
        cuda.reset()
        session.step(batches[3])
        assert 4 not in cuda.uploads
        for name in session.learning_rates:
            session.learning_rates[name] *= 2
        cuda.reset()
        session.step(batches[4])
        assert cuda.uploads.count(4) == len(session.learning_rates)


def test_fitting_copies_each_batch_once(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, toy: ModuleType, open_toy: Any, tmp_path: Path
) -> None:
    """Ahead of its step, with the losses of a run without a thread; arrays are not bound at all."""
    arrays = {name: np.concatenate([batch[name] for batch in toy.batches(6)]) for name in toy.batches(1)[0]}
    np.savez(tmp_path / "data.npz", **arrays)
    size = len(next(iter(arrays.values()))) // 6
    losses: dict[int, list[float | None]] = {}
    for depth in (0, 1, 3):
        with open_toy() as session:
            rows: list[Any] = []
            cuda.reset()
            session.fit(
                Batches(tmp_path / "data.npz", size, seed=1), steps=12, prefetch=depth, metrics=rows.append
            )
            losses[depth] = [row["loss"] for row in rows]
            whole = [n for n in cuda.uploads if n > 64]
            assert len(whole) == 12 * sum(array[:size].nbytes > 64 for array in arrays.values())
            assert not {*arrays} & {name for name in cuda.bound if name not in session._open.engine._batch}
    assert losses[0] == losses[1] == losses[3]


def test_wrong_ids_are_found_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, graph_case: Callable[..., Any]
) -> None:
    """A device's Gather does not fail for them: it returns zeros. So they are looked at first."""
    case = graph_case("torchjoint_in__nplm", target="cuda")
    with case.open() as session:
        session.evaluate(case.batches[:1])  # what runs is open from here on
        check = session._plan.step.id_checks[0]
        ids = case.batches[0][check.ids].copy()
        ids.flat[-1] = check.vocab_size
        monkeypatch.setattr(stepper.Stepper, "step", None)
        monkeypatch.setattr(session._open.evaluator, "_session", None)
        for call in (session.step, lambda batch: session.evaluate([batch])):
            with pytest.raises(UserError) as error:
                call({**case.batches[0], check.ids: ids})
            assert error.value.message == (
                f"id {check.vocab_size} in input '{check.ids}' is not a row of parameter '{check.parameter}',"
                f" which has {check.vocab_size} rows"
            )


def test_ids_that_the_graph_computes_are_looked_at_in_evaluation(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, graph_case: Callable[..., Any]
) -> None:
    case = graph_case("jax2onnx__nplm_wrap", target="cuda")
    seen: list[int] = []
    monkeypatch.setattr(evaluation, "check_ids", lambda check, ids, origin: seen.append(int(ids.max())))
    with case.open() as session:
        loss = session.evaluate(case.batches[:1])
        assert loss == pytest.approx(case.loss, rel=1e-5)
        computed = session._open.evaluator._computed
        assert computed
        assert len(seen) == len(computed)
        assert all(largest < session._plan.step.id_checks[0].vocab_size for largest in seen)


def test_a_wrong_id_in_a_step_leaves_everything(cuda: FakeCuda, toy: ModuleType, open_toy: Any) -> None:
    with open_toy() as session:
        batch = toy.batches(1)[0]
        session.step(batch)
        before = bits(session)
        name = next(name for name, array in batch.items() if array.dtype == np.int64)
        with pytest.raises(UserError, match=r"(is not a row of|cannot be run)"):
            session.step({**batch, name: np.full_like(batch[name], 10**6)})
        assert bits(session) == before
        session.step(batch)


def test_a_checkpoint_goes_on_on_either_device(
    monkeypatch: pytest.MonkeyPatch, toy: ModuleType, open_toy: Any, tmp_path: Path
) -> None:
    batches = toy.batches(6)
    with open_toy() as session:
        for batch in batches[:3]:
            session.step(batch)
        session.save(tmp_path / "run.ckpt")
        for batch in batches[3:]:
            session.step(batch)
        states = bits(session)
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(open_step, "device_of", lambda providers: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: False)
    with TrainingSession.resume(tmp_path / "run.ckpt", threads=1) as session:
        for batch in batches[3:]:
            session.step(batch)
        assert bits(session) == states
        session.save(tmp_path / "there.ckpt")
    monkeypatch.undo()
    with TrainingSession.resume(tmp_path / "there.ckpt", threads=1) as session:
        assert bits(session) == states


def test_evaluation_and_export_read_the_device(cuda: FakeCuda, graph_case: Any, tmp_path: Path) -> None:
    case = graph_case("torchjoint_in__nplm", target="cuda")
    with case.open() as session:
        assert session.evaluate(case.batches[:1]) == pytest.approx(case.loss, rel=1e-5)
        session.step(case.batches[0])
        assert session.evaluate(case.batches[:1]) != pytest.approx(case.loss, rel=1e-7)
        session.export(tmp_path / "out.onnx")
        trained = dict(session.parameters)
    stored = {item.name: item for item in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for name, array in trained.items():
        if name in stored:
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored[name]), array)


class TestGraphs:
    """Stages as CUDA graphs, on sessions that take the run option for what it is: nothing."""

    @pytest.fixture
    def graphs(self, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> list[int]:
        """The ids that runs are made with; every session counts as one that can be captured."""
        import onnxruntime as ort

        made: list[int] = []
        run = ort.InferenceSession.run_with_iobinding

        class Options:
            number = 0

            def add_run_config_entry(self, key: str, value: str) -> None:
                self.number = int(value)

        def counted(session: Any, binding: Any, options: Any = None) -> None:
            if options is not None:
                made.append(options.number)
            run(session, binding)

        monkeypatch.setattr(ort, "RunOptions", Options)
        monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", counted)
        return made

    def test_what_is_captured(self, graphs: list[int], graph_case: Callable[..., Any]) -> None:
        case = graph_case("torchjoint_in__nplm", target="cuda", preset="half")
        batches = [case.batches[n % 2] for n in range(40)]
        with case.open() as session:
            losses = [session.step(batch)["loss"] for batch in batches]
            states = bits(session)
        assert graphs == []
        with case.open(cuda_graph=True) as session:
            assert isinstance(session._open.engine, DeviceEngine)
            assert [session.step(batch)["loss"] for batch in batches] == losses
            assert bits(session) == states
            writing = {r.stage.name for r in session._open.engine.runners if r.stage.writes}
            assert writing
            assert writing <= {*session.cuda_graph_problems}
            assert all("writes" in session.cuda_graph_problems[name] for name in writing)
            assert "gradients" not in session.cuda_graph_problems
            graphs.clear()
            for batch in batches[:4]:
                session.step(batch)
        assert len(graphs) == 4, "the gradients' stage, in steps without a refresh"
        assert min(graphs) > 0

    def test_another_shape_is_another_graph(self, graphs: list[int], graph_case: Callable[..., Any]) -> None:
        case = graph_case("torchjoint_in__nplm", target="cuda")
        small = {name: array[:3] for name, array in case.batches[1].items()}
        mixed = [[case.batches[0], small, small][n % 3] for n in range(60)]
        with case.open() as session:
            losses = [session.step(batch)["loss"] for batch in mixed]
        with case.open(cuda_graph=True) as session:
            assert [session.step(batch)["loss"] for batch in mixed] == losses

    def test_what_draws_is_not_captured(self, graphs: list[int], toy: ModuleType, open_toy: Any) -> None:
        with open_toy(model={"dropout": True}, cuda_graph=True) as session:
            for batch in toy.batches(3):
                session.step(batch)
            assert (
                session.cuda_graph_problems["gradients"]
                == "Dropout would draw the same numbers at every step"
            )

    def test_the_cpu_has_none(self, monkeypatch: pytest.MonkeyPatch, open_toy: Any) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError) as error:
            open_toy(cuda_graph=True)
        assert error.value.message == "there are no CUDA graphs on the device 'cpu'"


def test_bodies_are_those_of_the_device(
    monkeypatch: pytest.MonkeyPatch, graph_case: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def adding(session: TrainingSession) -> set[str]:
        return {
            f"{node.op_type}"
            for runner in session._open.engine.runners
            if not runner.stage.one_thread
            for function in runner.stage.model.functions
            for node in function.node
            if any(a.name == "reduction" and a.s == b"add" for a in node.attribute)
        }

    case = graph_case("torchjoint_in__nplm", target="cuda")
    with case.open() as session:
        assert "ScatterND" not in adding(session), "it loses sums on the CPU with several threads"
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(open_step, "device_of", lambda providers: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: False)
    plain = graph_case("torchjoint_in__nplm")
    with caplog.at_level(logging.WARNING), plain.open() as session:
        assert "was lowered for 'cpu'" in caplog.text
        assert "ScatterElements" not in adding(session)


def test_the_flag_of_the_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from kfac_onnx.cli.main import main

    with np.load(DATA / "torchjoint_in__nplm.npz") as data:
        arrays = {name[3:]: data[name] for name in data.files if name.startswith("in:")}
    np.savez(tmp_path / "d.npz", **arrays)
    words = f"train {DATA}/torchjoint_in__nplm.onnx --data {tmp_path}/d.npz --parameters {tmp_path}/d.npz --cuda-graph"
    assert main(words.split()) == 1
    assert "there are no CUDA graphs on the device 'cpu'" in capfd.readouterr().err


def test_it_is_the_models_target_that_is_asked_for() -> None:
    from kfac_onnx.cli.options import target_of

    assert target_of(["CPUExecutionProvider"]) == "cpu"
    assert target_of(["CUDAExecutionProvider", "CPUExecutionProvider"]) == "cuda"
    assert target_of([("CUDAExecutionProvider", {"device_id": "1"})]) == "cuda"
    assert kx.transform is not None
