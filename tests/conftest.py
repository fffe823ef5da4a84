"""What every test may rely on, however pytest was started."""

from __future__ import annotations

import signal
from functools import cache
from typing import TYPE_CHECKING

import pytest

pytest_plugins = ["browser", "golden_files", "running", "shared_readings", "small_models", "toy_sessions"]
"""Fixtures that tests of several rooms share; the modules are in tests/support."""

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter


def pytest_configure() -> None:
    """Let SIGINT interrupt: a shell that starts a job in the background has it ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@cache
def why_no_gpu() -> str | None:
    """Return why nothing can run on CUDA here, in words; None where it can."""
    from kfac_onnx.device.providers import provider_list
    from kfac_onnx.errors import UserError

    try:
        provider_list(["cuda"])
    except UserError as e:
        return e.message
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `cuda` where there is no GPU."""
    if item.get_closest_marker("cuda") is not None and why_no_gpu() is not None:
        pytest.skip(f"needs a GPU: {why_no_gpu()}")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Say in a line of its own how many tests wanted a GPU."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "needs a GPU" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests on CUDA were skipped: {why_no_gpu()}")
