"""`inspect --provider`: where the nodes of a step run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from corpus_cases import GRAPHS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def made(run: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    def make(*options: str) -> Path:
        path = tmp_path / "step.onnx"
        outcome = run(
            "transform", GRAPHS / "torchjoint_in__nplm.onnx", "-o", path, "--preset", "adagrad", *options
        )
        assert outcome.code == 0
        return path

    return make


def test_a_model_for_cuda_stays_there(run: Callable[..., Any], made: Callable[..., Path]) -> None:
    outcome = run("inspect", made("--target", "cuda"), "--provider", "cuda")
    assert outcome.code == 0
    assert f"placement with {CUDA}, " in outcome.out
    assert "nothing that was inserted falls back to the host or makes a step copy a value" in outcome.out
    assert "Inserted operators that fall back to the host" not in outcome.out


def test_a_model_for_the_cpu_falls_back(run: Callable[..., Any], made: Callable[..., Path]) -> None:
    outcome = run("inspect", made("--shape", "dense"), "--provider", "cuda")
    assert outcome.code == 0  # it is shown, not checked
    assert "Inserted operators that fall back to the host" in outcome.out
    assert "the provider has no kernel for Unique" in outcome.out
    assert "Copied in each step because of inserted operators" in outcome.out
    assert "a model made with `transform --target cuda` has operators for it" in outcome.out


def test_the_same_as_json(run: Callable[..., Any], made: Callable[..., Path]) -> None:
    data = run("inspect", made("--shape", "dense"), "--provider", "cuda", "--json").data["placement"]
    assert data["provider"] == CUDA
    assert data["measured"] is (data["predicted_because"] is None)
    assert [node["op_type"] for node in data["fallbacks"]] == ["Unique"]
    assert {copy["direction"] for copy in data["copies"]} == {"to host", "to device"}
    assert data["inserted"][CUDA] > data["inserted"][CPU] > 0
    assert data["user_fallbacks"] == []
    assert run("inspect", made(), "--json").data.get("placement") is None


def test_the_cpu_is_asked_itself(run: Callable[..., Any], made: Callable[..., Path]) -> None:
    data = run("inspect", made(), "--provider", "cpu", "--json").data["placement"]
    assert (data["measured"], data["predicted_because"]) == (True, None)
    assert set(data["inserted"]) == {CPU}


def test_a_provider_without_a_table_must_work(run: Callable[..., Any], made: Callable[..., Path]) -> None:
    outcome = run("inspect", made(), "--provider", "DmlExecutionProvider")
    assert outcome.code == 1
    assert "has no execution provider" in outcome.err


def test_deterministic_is_a_target_of_its_own(run: Callable[..., Any], made: Callable[..., Path]) -> None:
    path = made("--target", "cuda", "--deterministic")
    assert "lower{target=cuda,deterministic=true}" in run("inspect", path).out
    outcome = run("inspect", path, "--provider", "cuda")
    assert "nothing that was inserted falls back to the host" in outcome.out
