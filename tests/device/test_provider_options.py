"""Options of providers: what CUDA does not have is refused by name, the rest reaches ONNX Runtime as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import onnxruntime as ort
import pytest

from kfac_onnx.cli.main import main
from kfac_onnx.cli.options import chosen_providers, provider_option
from kfac_onnx.device import providers
from kfac_onnx.device.provider_options import CUDA, checked_options, option_pairs
from kfac_onnx.device.providers import provider_list
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = "CPUExecutionProvider"
SET = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


def test_what_is_set_unless_given() -> None:
    assert checked_options(CUDA, {}) == SET
    given = {"use_tf32": True, "device_id": 1, "gpu_mem_limit": 8_000_000_000}
    assert checked_options(CUDA, given) == {
        **SET, "use_tf32": "1", "device_id": "1", "gpu_mem_limit": "8000000000"
    }  # fmt: skip


def test_the_words_of_a_switch() -> None:
    assert checked_options(CUDA, {"use_tf32": "True"})["use_tf32"] == "1"
    assert checked_options(CUDA, {"prefer_nhwc": "false"})["prefer_nhwc"] == "0"


def test_other_providers_keep_their_options() -> None:
    assert checked_options(CPU, {"arena": 1}) == {"arena": "1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": 1}, "'CUDAExecutionProvider' has no option 'device'; did you mean 'device_id'?"),
        ({"device_id": -1}, "the option 'device_id' of 'CUDAExecutionProvider' must be a whole number, not '-1'"),
        ({"device_id": "one"}, "the option 'device_id' of 'CUDAExecutionProvider' must be a whole number, not 'one'"),
        ({"use_tf32": 2}, "the option 'use_tf32' of 'CUDAExecutionProvider' must be 0 or 1, not '2'"),
        (
            {"arena_extend_strategy": "double"},
            "the option 'arena_extend_strategy' of 'CUDAExecutionProvider' must be one of kNextPowerOfTwo, kSameAsRequested, not 'double'",
        ),
        ({"enable_cuda_graph": 1}, "the option 'enable_cuda_graph' of 'CUDAExecutionProvider' cannot be given"),
        ({"user_compute_stream": 0}, "the option 'user_compute_stream' of 'CUDAExecutionProvider' cannot be given"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        checked_options(CUDA, options)
    assert error.value.message == message


def test_the_list_of_providers_has_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(providers, "_problem", lambda *_: None)
    assert provider_list(["cuda"]) == [(CUDA, SET)]
    assert provider_list([("cuda", {"device_id": 1}), "cpu"]) == [(CUDA, {**SET, "device_id": "1"}), CPU]


def test_a_wrong_option_is_an_error_even_with_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(UserError, match="has no option 'devic_id'"):
        provider_list([("cuda", {"devic_id": 1}), "cpu"])


@pytest.mark.parametrize(("words", "pairs"), [((), {}), (("a=1", "b = x=y"), {"a": "1", "b": "x=y"})])
def test_the_words(words: tuple[str, ...], pairs: dict[str, str]) -> None:
    assert option_pairs(words) == pairs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "--provider-option wants NAME=VALUE, not 'a'"),
        (["=1"], "--provider-option wants NAME=VALUE, not '=1'"),
        (["a="], "--provider-option wants NAME=VALUE, not 'a='"),
        (["a=1", "a=2"], "--provider-option names 'a' twice"),
    ],
)
def test_words_that_are_no_pairs(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        option_pairs(words)
    assert error.value.message == message


@pytest.fixture
def chosen() -> Callable[..., list[Any]]:
    """Return what a command with the option gets."""

    @click.command()
    @provider_option
    @click.pass_context
    def command(ctx: click.Context, provider: tuple[str, ...]) -> list[Any]:
        return chosen_providers(ctx, provider)

    def call(*words: str) -> list[Any]:
        return command.main([*words], standalone_mode=False)

    return call


def test_the_first_provider_gets_the_options(chosen: Callable[..., list[Any]]) -> None:
    assert chosen() == [CPU]
    assert chosen("--provider", "cuda") == [CUDA]
    words = ("--provider", "cuda,cpu", "--provider-option", "device_id=1", "--provider-option", "use_tf32=1")
    assert chosen(*words) == [(CUDA, {"device_id": "1", "use_tf32": "1"}), CPU]


def test_the_cpu_has_no_options(chosen: Callable[..., list[Any]]) -> None:
    with pytest.raises(UserError) as error:
        chosen("--provider-option", "device_id=1")
    assert error.value.message == "--provider-option is given, but the CPU has no options"


def test_a_command_says_what_cuda_has(capfd: pytest.CaptureFixture[str]) -> None:
    words = "train m.onnx --data d.npz --provider cuda --provider-option device_id"
    assert main(words.split()) == 1
    assert capfd.readouterr().err == "error: --provider-option wants NAME=VALUE, not 'device_id'\n"


def test_two_wheels_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr(providers, "_installed", lambda: {"onnxruntime", "onnxruntime-gpu"})
    with pytest.raises(UserError) as error:
        provider_list(["cuda"])
    assert str(error.value) == (
        "this onnxruntime has no execution provider 'CUDAExecutionProvider': the packages 'onnxruntime' and "
        "'onnxruntime-gpu' are installed over each other\n  help: keep one: pip uninstall -y onnxruntime "
        "onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def test_what_is_installed() -> None:
    assert "onnxruntime" in providers._installed() or "onnxruntime-gpu" in providers._installed()
