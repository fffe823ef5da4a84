"""The memory of a machine, and what does not fit into it."""

from __future__ import annotations

import os

import pytest

from kfac_onnx.cli import main as cli
from kfac_onnx.disk import memory
from kfac_onnx.disk.memory import machine_memory, require_memory
from kfac_onnx.errors import UserError

resource = pytest.importorskip("resource")


def test_the_smaller_of_machine_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 10}.__getitem__)
    for limit, expected in ((resource.RLIM_INFINITY, 1000), (5000, 1000), (700, 700)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert machine_memory() == expected


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> int:
        raise ValueError

    monkeypatch.setattr(os, "sysconf", unknown)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    require_memory(1 << 61, "everything")


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    require_memory(1000, "it")
    with pytest.raises(UserError, match="it needs 1,001 bytes of memory, and this machine has 1,000"):
        require_memory(1001, "it")


def test_memory_that_runs_out_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cli.cli, "main", full)
    assert cli.main(["scan", "x"]) == 1
    assert capsys.readouterr().err.startswith("error: the memory ran out\n")
