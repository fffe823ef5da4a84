"""What only a real device shows: memory there, page-locked memory, graphs of stages, in-place updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from corpus_cases import marked

from kfac_onnx.api import transform
from kfac_onnx.device.providers import provider_list
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.feeding import Feeder
from kfac_onnx.runtime.feed.pinned import Pinned
from kfac_onnx.runtime.step.probe import in_place_problem
from kfac_onnx.runtime.step.tensors import Buffer, Device, device_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.cuda

NAME = "torchjoint_in__nplm_pad0"


def opened(**options: Any) -> tuple[TrainingSession, list[dict[str, np.ndarray]]]:
    case, graph = marked(NAME)
    model = transform(case.path, lr=0.01, rest="sgd", target="cuda", deterministic=True)
    session = TrainingSession(model, parameters=graph.initial(case), providers=["cuda"], **options)
    names = [item.name for item in session.batch_inputs]
    return session, [{key: case.feed(which)[key] for key in names} for which in ("in", "in2")]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, bool, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (257, 33)])
def test_a_buffer_goes_there_and_back(dtype: Any, shape: tuple[int, ...]) -> None:
    provider_list(["cuda"])
    array = (np.arange(int(np.prod(shape))) % 7).reshape(shape).astype(dtype)
    bf16 = dtype is ml_dtypes.bfloat16
    element = onnx.TensorProto.BFLOAT16 if bf16 else onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    buffer = Buffer(array, int(element), Device("cuda", 0))
    assert buffer.value.device_name() == "cuda"
    assert buffer.read().tobytes() == array.tobytes()
    buffer.write(array[::-1].copy() if shape else array)
    assert buffer.read().tobytes() == (array[::-1] if shape else array).tobytes()


def test_parameters_and_states_are_there() -> None:
    session, batches = opened()
    with session:
        session.step(batches[0])
        for holder in session._holders.values():
            for buffer in holder.buffers:
                assert buffer.array is None
                assert buffer.value.device_name() == "cuda"
        assert session.describe()["device"] == "cuda:0"


@pytest.mark.parametrize(
    "scatter",
    [("ScatterND", "none"), ("ScatterND", "add"), ("ScatterElements", "none"), ("ScatterElements", "add")],
)
def test_tables_are_written_in_place(scatter: tuple[str, str]) -> None:
    providers = provider_list(["cuda"])
    assert in_place_problem([scatter], providers, device_of(providers)) is None


def test_batches_start_in_page_locked_memory() -> None:
    session, batches = opened()
    with session:
        assert Pinned().problem is None
        assert isinstance(session._open.feeder, Feeder)
        assert session._open.feeder.problem is None
        session.step(batches[0])


def test_batches_made_ahead_change_nothing(tmp_path: Path) -> None:
    session, batches = opened()
    session.close()
    np.savez(tmp_path / "d.npz", **{key: np.concatenate([b[key] for b in batches] * 4) for key in batches[0]})
    size = len(next(iter(batches[0].values()))) // 2
    runs = []
    for depth in (0, 1, 3):
        session, _ = opened()
        with session:
            session.fit(Batches(tmp_path / "d.npz", size, seed=1), steps=30, prefetch=depth)
            runs.append({key: array.tobytes() for key, array in session.states.items()})
    assert runs[0] == runs[1] == runs[2]


def test_graphs_of_stages_change_nothing() -> None:
    """Losses and states with CUDA graphs are those without, and the gradients' stage has one."""
    runs = []
    for graphs in (False, True):
        session, batches = opened(cuda_graph=graphs)
        with session:
            losses = [session.step(batches[t % 2])["loss"] for t in range(60)]
            runs.append((losses, session.states))
            if graphs:
                assert "gradients" not in session.cuda_graph_problems, session.cuda_graph_problems
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-5)  # the user's own graph may add atomically
    for key, array in runs[0][1].items():
        limit = 1e-4 * float(np.abs(array).max(initial=0.0)) + 1e-12
        np.testing.assert_allclose(runs[1][1][key], array, rtol=0, atol=limit, err_msg=key)


def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    session, batches = opened()
    with session:
        for t in range(12):
            if t == 6:
                session.save(tmp_path / "run.ckpt")
            session.step(batches[t % 2])
        wanted = {key: array.tobytes() for key, array in session.states.items()}
    with TrainingSession.resume(tmp_path / "run.ckpt", providers=["cuda"]) as session:
        for t in range(6, 12):
            session.step(batches[t % 2])
        found = {key: array.tobytes() for key, array in session.states.items()}
    assert found == wanted
