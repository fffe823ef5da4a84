"""Arms on a GPU: what they are opened with, what does not fit there, its rates, and what cannot be asked for."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from fake_device import FakeCuda

from kfac_onnx.bench import arms, gpu_rates, measure, place
from kfac_onnx.bench.arms import ARMS, choose
from kfac_onnx.bench.gpu_rates import GpuRates
from kfac_onnx.bench.place import HOST, Place, place_of
from kfac_onnx.bench.results import Results, Settings
from kfac_onnx.bench.roofline import floor_of
from kfac_onnx.bench.run import check
from kfac_onnx.bench.workloads import cases, write_parameters
from kfac_onnx.device.provider_options import CUDA
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import open_step
from kfac_onnx.runtime.step import cuda_graphs

if TYPE_CHECKING:
    from pathlib import Path

GPU = place_of("cuda", {"device_id": "1"}, cuda_graph=True)


def test_a_place() -> None:
    assert (HOST.on_gpu, HOST.target, HOST.torch_device, HOST.providers) == (
        False, "cpu", "cpu", ["CPUExecutionProvider"]
    )  # fmt: skip
    assert HOST.describe() == {}
    assert HOST.free_bytes() is None
    assert Place(CUDA, (("device_id", "1"),), cuda_graph=True) == GPU
    assert (GPU.on_gpu, GPU.index, GPU.target, GPU.torch_device) == (True, 1, "cuda", "cuda:1")
    assert GPU.providers == [(CUDA, {"device_id": "1"})]
    assert place_of("cuda", {}, cuda_graph=False).providers == [CUDA]


def test_the_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "0, NVIDIA A, 81559 MiB, 580.1\n1, NVIDIA B, 143771 MiB, 580.1\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said))
    assert GPU.describe() == {"gpu": "NVIDIA B", "gpu memory": "143771 MiB", "driver": "580.1"}


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 30)])
def test_a_card_that_nobody_names(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert GPU.describe() == {"gpu": "unknown: nvidia-smi does not answer"}


def test_free_memory_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        status, device = 0, -1

        def cudaSetDevice(self, index: int) -> int:  # noqa: N802  CUDA's name
            Runtime.device = index
            return 0

        def cudaMemGetInfo(self, free: Any, total: Any) -> int:  # noqa: N802  CUDA's name
            free._obj.value, total._obj.value = 70_000_000_000, 80_000_000_000
            return self.status

    assert GPU.free_bytes() is None
    monkeypatch.setattr("kfac_onnx.runtime.feed.pinned.loaded_library", lambda stem: "libcudart.so.13")
    monkeypatch.setattr(place.ctypes, "CDLL", lambda path: Runtime())
    assert GPU.free_bytes() == 70e9
    assert Runtime.device == 1
    assert measure.available_bytes(GPU) == 70e9
    Runtime.status = 2
    assert measure.available_bytes(GPU) == float("inf")


def test_dense_adam_is_the_fused_one_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    on_gpu = [arm.name for arm in choose((), torch=True, gpu=True) if arm.torch]
    on_cpu = [arm.name for arm in choose((), torch=True) if arm.torch]
    assert "torch-fused-adam" in on_gpu
    assert "torch-adam" not in on_gpu
    assert "torch-fused-adam" not in on_cpu
    assert "torch-adam" in on_cpu


def test_our_arm_is_opened_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a stand-in for the device: the graph is lowered for it, and a step is made."""
    (case,) = cases("mf", vocab_sizes=(50,), widths=(4,), lookups=(16,))
    write_parameters(case, tmp_path / "p.safetensors")

    def losses(trainee: Any) -> list[float]:
        return [trainee.step(batch) for batch, _ in zip(case.batches(0), range(12), strict=False)]

    on_cpu = losses(arms.open_arm(ARMS["half"], case, tmp_path / "p.safetensors", threads=1))
    fake = FakeCuda(monkeypatch)
    given: list[Any] = []

    def providers(them: Any) -> list[str]:
        given.append(them)
        return ["CPUExecutionProvider"]

    monkeypatch.setattr(open_step, "provider_list", providers)
    monkeypatch.setattr(open_step, "device_of", lambda them: fake.device)
    monkeypatch.setattr(cuda_graphs, "on_host", lambda info: False)
    at = place_of("cuda", {"device_id": "0"}, cuda_graph=False)
    trainee = arms.open_arm(ARMS["half"], case, tmp_path / "p.safetensors", threads=1, place=at)
    assert given == [[(CUDA, {"device_id": "0"})]]
    assert "lower{target=cuda}" in str(trainee.session._open.metadata)  # type: ignore[attr-defined]
    np.testing.assert_allclose(losses(trainee), on_cpu, rtol=1e-4)
    trainee.close()


class TestWhatDoesNotFit:
    class Arm:
        state_bytes = 0

        def __init__(self, error: str | None) -> None:
            self.error, self.closed = error, False

        def step(self, batch: object) -> float:
            if self.error:
                raise RuntimeError(self.error)
            return 0.0

        def close(self) -> None:
            self.closed = True

    @pytest.fixture
    def found(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        (case,) = cases("mf", vocab_sizes=(50,), widths=(4,), lookups=(16,))
        opened: dict[str, Any] = {}

        def call(errors: dict[str, str]) -> Any:
            def open_arm(arm: Any, *_: object, **__: object) -> Any:
                opened[arm.name] = self.Arm(errors.get(arm.name))
                return opened[arm.name]

            monkeypatch.setattr(measure, "open_arm", open_arm)
            chosen = [ARMS[name] for name in ("plain-sgd", "half", "torch-fused-adam")]
            times = measure.measure(
                case, chosen, tmp_path, steps=2, threads=1, seconds=0.1, tell=lambda _: None, place=GPU
            )
            return times, opened

        return call

    def test_it_is_left_out_with_the_reason(self, found: Any) -> None:
        times, opened = found({"torch-fused-adam": "CUDA out of memory. Tried to allocate 38.15 GiB."})
        assert times["half"].ms is not None
        assert times["torch-fused-adam"].skipped == (
            "does not fit into the GPU's memory: CUDA out of memory. Tried to allocate 38.15 GiB."
        )
        assert opened["torch-fused-adam"].closed

    def test_another_failure_is_none_of_memory(self, found: Any) -> None:
        with pytest.raises(RuntimeError, match="illegal address"):
            found({"half": "an illegal address"})

    def test_what_ratios_are_to_must_fit(self, found: Any) -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            found({"plain-sgd": "CUDA out of memory"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"provider": "DmlExecutionProvider"},
            "the benchmark runs on cpu or cuda, not on 'DmlExecutionProvider'",
        ),
        ({"provider": "cuda", "memory": True}, "memory is measured on the CPU alone"),
        ({"provider": "cuda", "profile": True}, "profile is measured on the CPU alone"),
        ({"cuda_graph": True}, "CUDA graphs and options are for the CUDA provider"),
        ({"lm_examples": 0}, "lm examples must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_asked_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check(Settings(**settings))
    assert error.value.message == message


def test_settings_say_the_command() -> None:
    settings = Settings(
        provider="cuda", provider_options={"device_id": "1"}, cuda_graph=True, lm_examples=1024
    )
    assert settings.command().endswith(
        "--lm-examples 1024 --provider cuda --provider-option device_id=1 --cuda-graph"
    )
    results = Results(settings, {}, ())
    assert Results.from_json(results.to_json()) == results


def test_a_larger_batch_of_text() -> None:
    (case,) = cases("lm", vocab_sizes=(1,), lm_examples=1024)
    assert case.name == "lm D=64 batch 1,024"
    batch = next(case.batches(0))
    assert batch["ids"].shape == (1024, 4)
    assert sum(case.lookups.values()) == 4096


class TestRates:
    @pytest.fixture
    def rates(self, monkeypatch: pytest.MonkeyPatch) -> GpuRates:
        """Of the CPU's kernels, by way of a stand-in for a device."""
        fake = FakeCuda(monkeypatch)
        monkeypatch.setattr("kfac_onnx.runtime.step.tensors.device_of", lambda them: fake.device)
        monkeypatch.setattr(gpu_rates, "_LARGE", 400_000)
        monkeypatch.setattr(gpu_rates, "_REPEATS", 5)
        monkeypatch.setattr(gpu_rates, "_CHAIN", 4)
        return GpuRates(HOST)

    def test_they_are_measured(self, rates: GpuRates) -> None:
        assert rates.copy_ms(400_000) > 0
        assert rates.gram_ms(2048, 64) > 0
        assert rates.product_ms(2048, 64) > 0
        assert rates.gather_ms(10**6, 4096, 1) == pytest.approx(36 * 4096 * rates.copy_ms(400_000) / 3.2e6)
        assert rates.scatter_ms(10**6, 4096, 1) == pytest.approx(64 * 4096 * rates.copy_ms(400_000) / 3.2e6)

    def test_a_floor_is_made_of_them(self, rates: GpuRates) -> None:
        (case,) = cases("mf", vocab_sizes=(1000,), widths=(16,), lookups=(512,))
        floor = floor_of(case, rates)
        assert floor.floor_ms == pytest.approx(sum(floor.parts.values()))
        assert set(floor.parts) == {"gather a", "count", "gᵀg", "rows · root", "row scaling", "finite check"}

    @pytest.mark.parametrize("kind", ["copy", "product", "gram"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_nothing_is_optimized_away(self, kind: str, count: int, tmp_path: Path) -> None:
        """The session of K operators runs K of them."""
        given, made = {"copy": ((6,), (6,)), "product": ((6, 4), (6, 4)), "gram": ((6, 4), (4, 4))}[kind]
        model = gpu_rates._chain(kind, count, given, made)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        import onnx

        nodes = onnx.load(tmp_path / "o.onnx").graph.node
        assert len(nodes) == count
        feeds = {item.name: np.ones(item.shape, np.float32) for item in session.get_inputs()}
        assert len(session.run(None, feeds)) == (count if kind == "gram" else 1)
