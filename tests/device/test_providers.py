"""Execution providers: what is missing is said, and nothing falls back on the CPU unless it was asked to."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException  # pyright: ignore

from kfac_onnx import metadata
from kfac_onnx.cli.main import main
from kfac_onnx.cli.options import provider_names
from kfac_onnx.device import providers
from kfac_onnx.device.providers import provider_list, require_providers
from kfac_onnx.errors import UserError
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime.gradcheck.verify import verify_gradients
from kfac_onnx.runtime.step.tensors import open_session, session_maker

if TYPE_CHECKING:
    from collections.abc import Sequence

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
SET = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
GPU_WHEEL = "onnxruntime-gpu[cuda,cudnn]"
NO_CUDA = (
    f"this onnxruntime has no execution provider '{CUDA}'\n"
    f"  help: it is in another wheel: pip uninstall onnxruntime && pip install '{GPU_WHEEL}'"
)
MISSING = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


class GpuWheel:
    """Stands for the GPU wheel on a machine: the sessions it makes have the providers that `work`."""

    def __init__(self, patch: pytest.MonkeyPatch, *, work: Sequence[str], raises: str | None = None) -> None:
        self.opened: list[list[str]] = []
        self.preloaded = 0
        real = ort.InferenceSession

        def session(*given: Any, providers: Sequence[Any], **others: Any) -> Any:
            names = [item if isinstance(item, str) else item[0] for item in providers]
            assert names == [CPU] or others["enable_fallback"] == 0, "onnxruntime would fall back by itself"
            self.opened.append(names)
            if raises is not None and CUDA in names:
                raise RuntimeException(raises)
            made = real(*given, providers=[CPU], **others)
            has = [name for name in names if name in work]
            made.get_providers = lambda: [*has, CPU]
            return made

        def preload() -> None:
            self.preloaded += 1
            sys.stdout.write("Failed to load libcublas\n")

        patch.setattr(ort, "InferenceSession", session)
        patch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        patch.setattr(ort, "preload_dlls", preload, raising=False)
        patch.setattr(providers.sys, "platform", "linux")


def libraries(patch: pytest.MonkeyPatch, error: str | None) -> list[str]:
    """Have the system's loader find every library, or fail with this error; return what it was asked for."""
    asked: list[str] = []

    def load(path: str, *_: object) -> object:
        asked.append(Path(path).name)
        if error is not None:
            raise OSError(error)
        return object()

    patch.setattr(ctypes, "CDLL", load)
    return asked


def plain_wheel(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ort, "get_available_providers", lambda: [CPU])


def test_the_cpu_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "InferenceSession", None)
    assert provider_list([CPU]) == [CPU]
    assert provider_list(["cpu"]) == [CPU]
    assert provider_list([(CPU, {"arena": 1})]) == [(CPU, {"arena": "1"})]


def test_the_wheel_that_has_the_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_wheel(monkeypatch)
    with pytest.raises(UserError) as error:
        provider_list([CUDA])
    assert str(error.value) == NO_CUDA


def test_a_provider_without_a_wheel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_wheel(monkeypatch)
    with pytest.raises(UserError) as error:
        provider_list(["XnnpackExecutionProvider"])
    assert str(error.value) == (
        f"this onnxruntime has no execution provider 'XnnpackExecutionProvider'\n  help: it has {CPU}"
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("CUDAExecutionProvder", f"; did you mean '{CUDA}'?"),
        ("CUDA", "; did you mean 'cuda'?"),
        ("abacus", ""),
    ],
)
def test_an_unknown_name_is_an_error_even_with_a_fallback(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    plain_wheel(monkeypatch)
    with pytest.raises(UserError) as error:
        provider_list([name, CPU])
    assert str(error.value) == (
        f"there is no execution provider '{name}'{near}\n  help: this onnxruntime has {CPU}"
    )


def test_missing_libraries_are_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = GpuWheel(monkeypatch, work=[])
    asked = libraries(monkeypatch, MISSING)
    with pytest.raises(UserError) as error:
        provider_list([CUDA])
    assert str(error.value) == (
        f"the execution provider '{CUDA}' cannot be created here: {MISSING}\n"
        f"  help: it needs NVIDIA's CUDA and cuDNN: pip install '{GPU_WHEEL}', "
        "or set LD_LIBRARY_PATH to where they are"
    )
    assert asked == ["libonnxruntime_providers_cuda.so"]
    assert wheel.preloaded == 1
    assert capfd.readouterr().out == "", "what onnxruntime prints would break --json"


def test_tensorrt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    GpuWheel(monkeypatch, work=[])
    libraries(monkeypatch, "libnvinfer.so.10: cannot open shared object file: No such file or directory")
    with pytest.raises(UserError, match=r"needs NVIDIA's TensorRT and CUDA"):
        provider_list([TENSORRT, CUDA])


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    GpuWheel(monkeypatch, work=[])
    libraries(monkeypatch, None)
    with pytest.raises(UserError) as error:
        provider_list([CUDA])
    assert str(error.value) == (
        f"the execution provider '{CUDA}' cannot be created here\n"
        "  help: is there a GPU with a driver for it? `nvidia-smi` says so"
    )


def test_what_onnxruntime_raises_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    GpuWheel(monkeypatch, work=[CUDA], raises="CUDA failure 100: no CUDA-capable device is detected\nat a.cc")
    libraries(monkeypatch, None)
    with pytest.raises(UserError) as error:
        provider_list([CUDA])
    assert error.value.message == (
        f"the execution provider '{CUDA}' cannot be created here: "
        "CUDA failure 100: no CUDA-capable device is detected"
    )


def test_a_working_provider_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = GpuWheel(monkeypatch, work=[CUDA])
    assert provider_list([(CUDA, {"device_id": 0}), CPU]) == [(CUDA, {**SET, "device_id": "0"}), CPU]
    assert wheel.opened == [[CUDA]]


def test_what_follows_is_fallen_back_on_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    GpuWheel(monkeypatch, work=[])
    libraries(monkeypatch, MISSING)
    with caplog.at_level(logging.WARNING):
        assert provider_list([CUDA, CPU]) == [CPU]
    assert caplog.messages == [
        f"the execution provider '{CUDA}' cannot be created here: {MISSING}; '{CPU}' is used instead"
    ]


def test_one_that_is_not_the_first_is_fallen_back_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    GpuWheel(monkeypatch, work=[CUDA])
    libraries(monkeypatch, "libnvinfer.so.10: cannot open")
    with caplog.at_level(logging.WARNING):
        assert provider_list([TENSORRT, CUDA]) == [(CUDA, SET)]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(f"; '{CUDA}' is used instead")


def test_a_last_provider_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    GpuWheel(monkeypatch, work=[])
    libraries(monkeypatch, MISSING)
    with pytest.raises(UserError, match=MISSING):
        provider_list([CPU, CUDA])


def test_a_session_that_came_without_its_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime only logs a warning and runs on the CPU."""
    GpuWheel(monkeypatch, work=[])
    libraries(monkeypatch, MISSING)
    token = session_maker.set(ort.InferenceSession)
    try:
        with pytest.raises(UserError, match=rf"^the execution provider '{CUDA}' cannot .* here: {MISSING}"):
            open_session(onnx.load(GRAPHS / "torchjoint_in__nplm.onnx"), [CUDA], threads=1)
    finally:
        session_maker.reset(token)


def test_a_session_that_has_its_providers_is_taken() -> None:
    session = ort.InferenceSession(
        (GRAPHS / "torchjoint_in__nplm.onnx").read_bytes(), providers=[CPU], enable_fallback=0
    )
    require_providers(session, [(CPU, {})])


def test_verify_refuses_sessions_that_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider works when it is tried, and its session for the graph comes without it."""
    GpuWheel(monkeypatch, work=[])
    libraries(monkeypatch, MISSING)
    monkeypatch.setattr(providers, "_problem", lambda *_: None)
    with np.load(GRAPHS / "torchjoint_in__nplm.npz") as data:
        values = {name[3:]: data[name] for name in data.files if name.startswith("in:")}
    graph = read_training_graph(GRAPHS / "torchjoint_in__nplm.onnx")
    parameters = {item.name for item in metadata.read_list(graph, "parameters", metadata.Parameter)}
    given = {name: values.pop(name) for name in parameters}
    with pytest.raises(UserError, match=f"'{CUDA}' cannot be created here"):
        verify_gradients(graph, values, parameters=given, providers=[CUDA])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), [CPU]),
        (("cuda",), [CUDA]),
        (("cuda,cpu",), [CUDA, CPU]),
        (("cuda", "cpu"), [CUDA, CPU]),
        (("cuda, DmlExecutionProvider",), [CUDA, "DmlExecutionProvider"]),
        ((",",), [CPU]),
    ],
)
def test_the_option(words: tuple[str, ...], names: list[str]) -> None:
    assert provider_names(words) == names


VERBS = [
    "verify {graph} --data {data} --provider cuda",
    "verify --golden {golden} --provider cuda",
    "train {graph} --data {data} --parameters {data} --provider cuda",
    "demo --steps 2 --provider cuda",
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    with np.load(GRAPHS / "torchjoint_in__nplm.npz") as data:
        arrays = {name[3:]: data[name] for name in data.files if name.startswith("in:")}
    np.savez(tmp_path / "data.npz", **arrays)
    return {
        "graph": GRAPHS / "torchjoint_in__nplm.onnx",
        "data": tmp_path / "data.npz",
        "golden": GRAPHS.parent / "golden" / "01_basic.npz",
    }


@pytest.mark.parametrize("words", [*VERBS, "bench mf --steps 1 --provider cuda"])
def test_every_verb_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], files: dict[str, Path], words: str
) -> None:
    plain_wheel(monkeypatch)
    assert main(words.format(**files).split()) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith(f"error: {NO_CUDA}\n")


@pytest.mark.parametrize("words", VERBS)
def test_every_verb_falls_back_when_asked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], files: dict[str, Path], words: str
) -> None:
    plain_wheel(monkeypatch)
    main(f"{words.format(**files)},cpu".split())
    err = capfd.readouterr().err
    assert f"warning: this onnxruntime has no execution provider '{CUDA}'; '{CPU}' is used instead" in err
    assert CUDA not in err.split("is used instead", 1)[1]
