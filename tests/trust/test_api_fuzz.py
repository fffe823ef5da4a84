"""The API fuzz in its short mode, and that it sees what does not hold."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kfac_onnx as kx

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trust_api_fuzz", Path(__file__).with_name("api_fuzz.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_wrong_values_end_in_sentences(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    count, problems = fuzz.harness(600, 0, tmp_path)
    assert count == 600
    assert problems == []


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (kx.UserError("no"), "no sentence: 'no'"),
        (TypeError("unhashable type: 'dict'"), "TypeError: unhashable type: 'dict'"),
        (TypeError("scan() got an unexpected keyword argument 'x'"), None),
        (kx.UserError("the graph has no loss"), None),
    ],
)
def test_what_does_not_hold_is_seen(fuzz: ModuleType, error: Exception, problem: str | None) -> None:
    def call(**arguments: Any) -> None:
        raise error

    assert fuzz.problem_of(fuzz.Target("call", call, {}), {}) == problem
