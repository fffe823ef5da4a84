"""What every test may rely on, however pytest was started."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Let SIGINT interrupt: a shell that starts a job in the background has it ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
